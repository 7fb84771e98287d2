"""Reads the documents of a source, one after the other.

A source is a local file of text, JSON or parquet, a local folder of them (see
text_files), or a data set of the Hugging Face Hub. `DocumentIterator` can save
its place. If a source has only the split train, but must provide a test split
too, about every twentieth document is held out, and at least one.
"""

import copy
import logging
import time
import zlib
from typing import Any, NamedTuple

import grain
import jax

from sigattn.data import hub, text_files

_logger = logging.getLogger(__name__)

# The King James Bible, one verse per line; the licence is beside the file.
EMBEDDED = {"kjv": "kjv.txt.xz"}
# The test split of a stream has the documents whose checksum this divides. The
# text decides, so that a document that occurs twice is not in both splits. If
# that is no document, or all, the one with the smallest checksum is held out.
_HELD_OUT_EVERY = 20
# The split that is all of a source without splits of its own. Only other data
# than those of a run are evaluated by it, see run_dir.with_data.
WHOLE = "all"
_LEAST_SHARE = 0.01  # of the characters: a smaller held-out part is warned of
FEW = (
  "results on so little text say little. To hold out more, name files of your "
  "choice test (test.txt, test/a.txt) and the others train, or give "
  "--config.data.eval_source"
)
_SECONDS_BETWEEN_MESSAGES = 5
_SHOWN = 3  # documents that an error names


class Origin(NamedTuple):
  """A split of a source, and the keys of config.data that name them.

  column, lines: config.data.text_column and lines.
  held_out: whether the source has only train, from which a test split is made.
  """

  source: str
  split: str
  key: str = "source"
  split_key: str = "split"
  column: str = "text"
  lines: bool = False
  held_out: bool = False

  def __str__(self):
    if self.split_key == "split":  # no config names it
      return f"source={self.source!r}, split={self.split!r}"
    return (
      f"config.data.{self.key}={self.source!r}, config.data.{self.split_key}="
      f"{self.split!r}"
    )


class Progress:
  """Logs the progress of work that takes longer than 5 seconds."""

  def __init__(self, what: str) -> None:
    self._what, self._said = what, time.monotonic()

  def say(self, how_far: str) -> None:
    if time.monotonic() - self._said > _SECONDS_BETWEEN_MESSAGES:
      self._said = time.monotonic()
      _logger.info("%s: %s", self._what, how_far)


class Corrupt:
  """Names documents that are not text, and ends a run with too many of them.

  The number of documents of a stream is not known before its end. Until then
  the share refers to the documents read so far, and at first to the first
  `at_least`; at the end of an epoch, to those of the epoch. One document may
  always be corrupt, unless max_share is 0. In a run of several processes, each
  process counts the documents that it reads. A resumed run counts from 0.
  """

  def __init__(self, max_share: float = 0.0, at_least: int = 0) -> None:
    self._max_share, self._at_least = max_share, at_least
    self._read, self._why = 0, {}

  def add(self, row: int, why: str) -> None:
    """row: the number of the document within an epoch, from 0."""
    self._read = max(self._read, row + 1)
    if row in self._why:
      return  # it was counted in an earlier epoch
    if not self._max_share:
      hint = (
        "; config.data.max_corrupt_share is the share of documents that may be "
        "no text, and are skipped: --config.data.max_corrupt_share=0.1"
      )
      raise ValueError(why + hint * bool(self._at_least))
    self._why[row] = why
    self._validate_share(max(self._read, self._at_least))
    text_files.warn_once(f"skipped: {why}")

  def end(self, count: int) -> None:
    """count: how many documents an epoch had that has ended."""
    self._validate_share(count)

  def _validate_share(self, count):
    """Raises ValueError if too many of the first `count` documents are bad."""
    corrupt, most = len(self._why), max(int(self._max_share * count), 1)
    if corrupt > most:
      raise ValueError(
        f"{corrupt} documents are corrupt, of the first {count}; "
        f"config.data.max_corrupt_share={self._max_share} allows {most}: "
        + "; ".join(self._why.values())
      )


class Documents(grain.IterDataset):
  """A dataset of the texts of a split; see DocumentIterator."""

  def __init__(
    self, origin: Origin, in_training: bool, corrupt: Corrupt | None = None
  ) -> None:
    super().__init__()
    self._arguments = origin, in_training, corrupt

  def __iter__(self) -> "DocumentIterator":
    return DocumentIterator(*self._arguments)


class DocumentIterator(grain.DatasetIterator):
  """Iterates over the texts of a split.

  in_training: whether to read only this process's share of the documents, and
  to start again at the end, which a None marks. corrupt: counts the documents
  that are not text, which are skipped; None: nothing counts them.

  The state includes that of the `datasets` stream of one part of the source,
  which is the files of one kind.
  """

  def __init__(
    self, origin: Origin, in_training: bool, corrupt: Corrupt | None = None
  ) -> None:
    import datasets.distributed

    super().__init__()
    self._origin, self._in_training = origin, in_training
    self._corrupt = corrupt
    self._is_held_out = None  # a function, made when a document is there
    self._counts = {True: (0, 0), False: (0, 0)}  # see _count
    self._said_blank = False
    self._no_text = {}  # {document: why it is no text}, of the first few
    self._parts = []  # (kind of the files, stream, its state at the beginning)
    with hub.reading(origin):
      for kind, stream in _open(origin):
        # In an evaluation, the processes divide the rows, not the documents.
        if in_training:
          stream = datasets.distributed.split_dataset_by_node(
            stream, jax.process_index(), jax.process_count()
          )
        self._parts.append((kind, stream, stream.state_dict()))
    self._begin(epoch=0)

  def _begin(self, epoch, part=0, place=None, row=0, any_document=False):
    """row: documents so far in this epoch. any_document: if one was text."""
    self._epoch, self._part, self._row = epoch, part, row
    self._any = any_document
    kind, self._stream, start = self._parts[part]
    # Before anything is read, the stream would return its previous state.
    self._place = start if place is None else place
    with hub.reading(self._origin):
      self._stream.load_state_dict(copy.deepcopy(self._place))
      self._examples = text_files.examples(kind, iter(self._stream))

  def __next__(self) -> str | None:
    while (example := self._next()) is not None:
      document = self._text(*example)
      if document is not None:
        is_in = self._is_in(document)
        self._count(is_in, document)
        if is_in:
          self._any = True
          return document
    if self._corrupt is not None:
      self._corrupt.end(self._row)
    if not self._any:
      raise ValueError(_no_documents(self._origin, self._no_text))
    if not self._in_training:
      self._say_what_is_evaluated()
      raise StopIteration
    self._begin(self._epoch + 1)
    return None

  def _is_in(self, document):
    """Whether the document belongs to the split, if splits are made here."""
    if not self._origin.held_out or self._origin.split == WHOLE:
      return True
    if self._is_held_out is None:
      self._is_held_out = _held_out(self._origin)
    return self._is_held_out(document) == (self._origin.split == "test")

  def _count(self, is_in, document):
    """Counts documents and characters inside and outside of the split."""
    documents, characters = self._counts[is_in]
    self._counts[is_in] = documents + 1, characters + len(document)

  def _say_what_is_evaluated(self):
    (documents, characters), (others, rest) = (
      self._counts[True],
      self._counts[False],
    )
    if self._origin.split == WHOLE or _is_evaluated_whole(self._origin):
      text_files.inform_once(
        f"{self._origin.source!r}: {documents} of {documents} documents are "
        "evaluated"
      )
    if not self._origin.held_out or self._origin.split != "test":
      return
    share = characters / (characters + rest)
    said = (
      f"{self._origin.source!r}: {documents} of {documents + others} documents "
      f"are held out, {share:.1%} of the characters"
    )
    if share >= _LEAST_SHARE:
      text_files.inform_once(said)
    else:
      text_files.warn_once(f"{said}: {FEW}")

  def _next(self):
    """The next example of this epoch, None at its end."""
    while True:
      with hub.reading(self._origin):
        example = next(self._examples, None)
      self._place = None
      if example is not None or self._part + 1 == len(self._parts):
        return example
      self._begin(
        self._epoch, self._part + 1, row=self._row, any_document=self._any
      )

  def _text(self, place, example):
    """The text of the next example; None if it is corrupt or blank.

    place: its file and line, if they are known.
    """
    row, column, source = self._row, self._origin.column, self._origin.source
    self._row += 1
    # If the split is made here, a document has the same number in each split.
    part = "" if self._origin.held_out else f"split {self._origin.split!r}, "
    place = place or f"{source!r}, {part}document {row + 1}"
    is_object = isinstance(example, dict)  # a line of JSON may be anything
    if is_object and (why := example.get(text_files.WHY)):
      self._skip(row, why)
      return None
    if row == 0 and is_object and column not in example:
      raise ValueError(
        f"config.data.text_column={column!r}; must be a column of "
        f"{source!r}, which has {sorted(example)}"
      )
    document = example.get(column) if is_object else None
    if isinstance(document, str):
      return None if self._is_blank(document, place) else document
    shown = repr(example)
    if not is_object:
      wrong = f"must be an object with config.data.text_column={column!r}, not"
    elif column in example:
      wrong = (
        f"config.data.text_column={column!r} must be text, not "
        f"{document!r:.100}"
      )
    else:
      wrong = (
        f"has no column config.data.text_column={column!r}, only "
        f"{sorted(example)}"
      )
    self._skip(
      row,
      f"{place}: {wrong}: "
      f"{shown if len(shown) <= 300 else shown[:300] + '...'}",
    )
    return None

  def _is_blank(self, document, place):
    """Whether a text has only blanks and NULs; the first one is named.

    From empty texts a model would learn that a beginning is followed by
    nothing.
    """
    if any(x != "\0" and not x.isspace() for x in document):
      return False
    if not self._said_blank and not self._origin.lines:
      self._said_blank = True
      why = "has only blanks or NULs" if document else "is empty"
      text_files.warn_once(f"{place}: {why}; such documents are left out")
    return True

  def _skip(self, row, why):
    """Notes that a document is no text."""
    if len(self._no_text) < _SHOWN:
      self._no_text[row] = why
    if self._corrupt is not None:
      self._corrupt.add(row, why)

  def get_state(self) -> dict[str, Any]:
    place = self._place
    return {
      "epoch": self._epoch,
      "part": self._part,
      "row": self._row,
      "place": self._stream.state_dict() if place is None else place,
      "any_document": self._any,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    self._begin(**state)


def _held_out(origin):
  """The function that says whether a document is held out.

  It reads documents until there is one for each split.
  """
  seen, divided = set(), set()
  origin = origin._replace(held_out=False, split="train")
  for document in DocumentIterator(origin, in_training=False):
    seen.add(checksum := _checksum(document))
    if checksum % _HELD_OUT_EVERY == 0:
      divided.add(checksum)
    if 0 < len(divided) < len(seen):
      return lambda x: _checksum(x) % _HELD_OUT_EVERY == 0
  if len(seen) == 1:  # there is nothing to divide
    return lambda x: False
  return lambda x: _checksum(x) == min(seen)


def _checksum(document):
  return zlib.crc32(document.encode())


def _is_evaluated_whole(origin):
  """Whether the source is only evaluated, and has no splits of its own."""
  if origin.key != "eval_source" or origin.held_out:
    return False
  return set(text_files.find(origin.source, origin.key) or ()) == {"train"}


def _no_documents(origin, no_text):
  """no_text: the first reasons why a document is no text."""
  message = f"{origin}: contains no documents"
  if origin.held_out and origin.split != WHOLE:
    message += (
      ": a source without a test split holds out about every "
      f"{_HELD_OUT_EVERY}th document, and at least one, so it must have two "
      "that differ; give more documents, or config.data.eval_source"
    )
  if no_text:
    message += f". Documents that are no text: {'; '.join(no_text.values())}"
  return message


def read_first(origin: Origin, corrupt: Corrupt) -> None:
  """Raises ValueError if no document of the whole source can be read."""
  next(DocumentIterator(origin, in_training=False, corrupt=corrupt))


def _open(origin):
  """Opens a source: [(kind of its files, datasets.IterableDataset)]."""
  import datasets

  source, split = origin.source, origin.split
  files = text_files.find(source, origin.key)
  if files is not None:
    # Without splits, all is the split that the config says.
    part = files["train"] if set(files) == {"train"} else files[split]
    return text_files.open_files(part, origin.column, origin.lines)
  if not hub.is_hub_name(source):
    raise hub.unknown_source(source, EMBEDDED, "file or ", origin.key)
  name, _, subset = source.partition(":")
  try:
    return [("", datasets.load_dataset(
      name, subset or None, split=split, streaming=True
    ))]  # fmt: skip
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    raise ValueError(
      "there is no such file or folder here, and no such data set of the Hub: "
      f"{error}"
    ) from error
