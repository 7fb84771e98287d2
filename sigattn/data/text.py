"""Reads texts and turns them into rows of tokens.

A row has L + 1 tokens, where L is config.data.length: the model reads all but
the last token and predicts all but the first. A batch contains

  token    int32 (B, L + 1); -1 is padding
  segment  int32 (B, L + 1), the number of a token's document within its row,
           from 1 on; 0 is padding. Missing if each row is from one document

There are three kinds of sources.

One text is embedded, or the content of a local .txt. It is cut at new positions
in each epoch. Its end is its test split, and the rest is its train split. The
end of the train split is the validation split, for runs that train on
train_without_validation.

A folder of tokens (see token_files) is cut in the same way. It holds its splits
and its tokenizer. Several documents may follow one another in a row.

A stream of documents is a local file of JSON or parquet, a local folder (see
text_files), a data set of the Hugging Face Hub (owner/name or
owner/name:subset), or a .txt with config.data.lines=True. If a local stream is
both trained on and evaluated, and has only the split train, about every
twentieth document is in its test split, and at least one. If other data than
those of a run are evaluated, the split WHOLE has all documents of such a
source, or the whole of one text. If config.data.eval_source is such a source,
or one text, config.data.eval_split is the name of all of it.
"""

import functools
import itertools
import lzma
import pathlib
from collections.abc import Iterable, Iterator

import grain
import grain.experimental
import jax
import numpy as np
from ml_collections import ConfigDict

from sigattn.data import (
  hub,
  loader,
  text_documents,
  text_files,
  token_files,
  tokenizers,
)
from sigattn.validate import (
  Field,
  flag,
  items,
  real,
  sequence,
  text,
  whole,
)

EMBEDDED = text_documents.EMBEDDED
WHOLE = text_documents.WHOLE
_SPLITS = ("train", "test")  # of a stream from which documents are held out
# The end of one text is its test split. A part of the same length before it,
# the end of the train split, is its validation split.
_TEXT_SPLITS = (*hub.TRAIN_SPLITS, "validation", "test")
_HELD_OUT_SHARE = 0.05
# One text is held in memory with its tokens, 4 bytes each.
_LONGEST_TEXT = 2**30
# The documents and characters that one call of the tokenizer gets. The library
# encodes texts in parallel threads, and all of their pieces are in memory.
_ENCODED_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 2**20
# A shuffle window is in memory, so it ends at this size, however few documents
# it has.
_WINDOW_CHARACTERS = 2**26
# The characters of a window whose pieces are shuffled together. The tokens of
# that many characters are in memory, and are made before the first of them is
# used.
_SHUFFLED_CHARACTERS = 2**23
LARGEST_VOCABULARY = 2**22


FIELDS = {
  "data.source": Field(
    lambda value: value == "" or text().is_right(value),
    f"{text().wanted}, or '' where config.data.mixture is given",
  ),
  "data.mixture": sequence(
    items(text(), real(low=1e-9, high=1e9)),
    "(source, share from 1e-9 to 1e9) pairs",
    empty=True,
  ),
  "data.eval_source": text(optional=True),
  "data.train_split": text(),
  "data.eval_split": text(),
  "data.text_column": text(),
  "data.lines": flag(),
  "data.tokenizer": text(),
  "data.vocab_size": whole(low=1, high=LARGEST_VOCABULARY, optional=True),
  "data.length": whole(low=1, high=2**24),
  "data.shuffle_window": whole(low=1, high=10**8),
  "data.packing_window": whole(low=1, high=2**20),
  "data.max_corrupt_share": real(low=0, high=1),
  "eval.rows": whole(low=1, high=10**12, optional=True),
}


def _one_of_source_and_mixture(config):
  data = config.data
  if data.source and data.mixture:
    raise ValueError(
      f"config.data.source={data.source!r}; must be '' with a config.data."
      "mixture, which would be trained on instead: to train on the source, set "
      "--config.data.mixture='()' and, if it is to be evaluated too, "
      f"--config.data.eval_source={data.source}"
    )
  if not data.source and not data.mixture:
    raise ValueError(
      "config.data.source=''; must be given where config.data.mixture is empty"
    )


def _sources_have_the_splits(config):
  """A rule: the config must fit what is known of the sources before reading.

  The splits of the Hub are known only when they are opened.
  """
  for origin in _origins(config):
    known = _splits(origin)
    if known is not None and origin.split not in known:
      raise ValueError(
        f"config.data.{origin.split_key}={origin.split!r}; choose from "
        f"{sorted(known)}, the splits of config.data.{origin.key}="
        f"{origin.source!r}{_named_as_splits(origin)}"
      )


def _named_as_splits(origin):
  """Says which file's name is the reason for the splits of a folder."""
  if origin.source in EMBEDDED or token_files.is_folder(origin.source):
    return ""
  by_split = text_files.find(origin.source, origin.key)
  [kinds, *_] = by_split.values()
  [[path, *_], *_] = kinds.values()
  return (
    f", because {path} is named as a split; name the other files as the split "
    f"{origin.split!r} ({origin.split}_0.txt, or a folder {origin.split})"
  )


def _one_text_has_the_rows(config):
  data = config.data
  if not _is_one_text(config):
    return
  if token_files.is_folder(data.source):
    unit, count = "tokens", len(_read_tokens(config, data.train_split))
  elif data.train_split == data.eval_split != "train":
    raise ValueError(
      f"config.data.train_split={data.train_split!r}; must be 'train'"
    )
  elif (
    data.train_split == data.eval_split and _eval_source(config) != data.source
  ):
    raise ValueError(
      f"config.data.eval_split={data.eval_split!r}; must not be "
      "config.data.train_split with a config.data.eval_source: 'test', say"
    )
  else:
    if _eval_source(config) == data.source:
      hub.validate_no_validation_in_training(data)
    # A tokenizer makes at most as many tokens as there are bytes.
    unit = "characters"
    count = len(_part(config, data.train_split).encode())
  if data.length >= count:
    raise ValueError(
      f"config.data.length={data.length!r}; must be less than {count}, "
      f"the {unit} of {data.train_split!r} of {data.source}"
      + ": give a longer text"
      * (count < 3)
    )
  rows = _num_rows(count, data.length)
  of = f"{data.source} in rows of config.data.length={data.length!r}"
  loader.validate_batch_size(config, rows, of)


def _tokens_have_their_tokenizer(config):
  """A rule: a folder of tokens must be read with its own tokenizer."""
  data = config.data
  if data.mixture or not token_files.is_folder(data.source):
    return
  wanted = hub.local(data.source) / token_files.TOKENIZER
  if (
    data.tokenizer == "characters"
    or tokenizer(config).content != wanted.read_bytes()
  ):
    raise ValueError(
      f"config.data.tokenizer={data.tokenizer!r}; must be {str(wanted)!r}, "
      f"which made the tokens of config.data.source={data.source!r}, or a copy"
    )


def _vocabulary_covers_the_tokenizer(config):
  data = config.data
  size = tokenizer(config).size
  if data.vocab_size is not None and data.vocab_size < size:
    raise ValueError(
      f"config.data.vocab_size={data.vocab_size}; must be at least "
      f"{size}, the size of config.data.tokenizer={data.tokenizer!r}"
    )


RULES = (
  _one_of_source_and_mixture,
  _sources_have_the_splits,
  _tokens_have_their_tokenizer,
  _vocabulary_covers_the_tokenizer,
  _one_text_has_the_rows,
)


def _origins(config):
  """The Origin of each source that a run reads."""
  data = config.data
  for name, _ in data.mixture:
    if name in EMBEDDED:
      raise ValueError(
        f"config.data.mixture: {name!r} is an embedded text; must be a file, a "
        "folder or a Hugging Face name"
      )
  if data.num_workers and not _is_one_text(config):
    raise ValueError(
      f"config.data.num_workers={data.num_workers}; must be 0: a "
      "stream is read by one thread, and encoded by all threads"
    )
  trained = [_origin(config, x, "train_split") for x, _ in _mixture(config)]
  return [*trained, _origin(config, _eval_source(config), "eval_split")]


def _origin(config, source, split_key, split=None):
  """The Origin of a source that is trained on or evaluated."""
  data = config.data
  evaluated = split_key == "eval_split" and data.eval_source is not None
  return text_documents.Origin(
    source,
    split or data[split_key],
    "eval_source" if evaluated else "mixture" if data.mixture else "source",
    split_key,
    data.text_column,
    data.lines,
    _is_held_out(config, source),
  )


def _is_held_out(config, source):
  """Whether the source must provide both splits, but has only one."""
  trained = [name for name, _ in _mixture(config)]
  if source not in trained or source != _eval_source(config):
    return False
  return source not in EMBEDDED and not has_splits(source)


def _eval_source(config):
  data = config.data
  if data.eval_source is None and data.mixture:
    raise ValueError(
      "config.data.eval_source=None; must be given if config.data.mixture is "
      "not empty"
    )
  if data.eval_source is not None and data.source in EMBEDDED:
    raise ValueError(
      f"config.data.eval_source={data.eval_source!r}; must be None with "
      f"config.data.source={data.source!r}, whose end is evaluated"
    )
  if data.eval_source is not None and token_files.is_folder(data.source):
    raise ValueError(
      f"config.data.eval_source={data.eval_source!r}; must be None with "
      f"config.data.source={data.source!r}, a folder of tokens with its splits"
    )
  return data.source if data.eval_source is None else data.eval_source


def _mixture(config):
  return config.data.mixture or ((config.data.source, 1.0),)


def has_splits(source: str) -> bool:
  """Whether a source has splits of its own; those of the Hub have."""
  if source in EMBEDDED:
    return False
  if token_files.is_folder(source):
    return True
  files = text_files.find(source)
  return files is None or set(files) != {"train"}


def _splits(origin):
  """The names of the splits; None if only the Hub knows them."""
  source, key = origin.source, origin.key
  if source in EMBEDDED:
    hub.embedded(source, EMBEDDED[source])
    return _TEXT_SPLITS
  if token_files.is_folder(source):
    if key != "source":
      raise ValueError(
        f"config.data.{key}: {source!r} is a folder of tokens, which can only "
        "be config.data.source"
      )
    return tuple(token_files.splits(source))
  files = text_files.find(source, key)
  if files is None:
    if not hub.is_hub_name(source):
      raise hub.unknown_source(source, EMBEDDED, "file or ", key)
    return None
  if origin.held_out:
    return _TEXT_SPLITS if _is_text(source, origin.lines) else _SPLITS
  # A single file is the split that the config says. So is a folder without
  # splits of its own that is only evaluated.
  is_whole = hub.local(source).is_file() or (
    key == "eval_source" and set(files) == {"train"}
  )
  return (origin.split,) if is_whole else tuple(files)


# One text.


def _is_one_text(config):
  """Whether the run trains on one text or on tokens, not on a stream."""
  data = config.data
  return not data.mixture and (
    token_files.is_folder(data.source) or _is_text(data.source, data.lines)
  )


def _is_text(source, lines):
  if source in EMBEDDED:
    return True
  path = hub.local(source)
  return path.is_file() and text_files.suffix(path) == ".txt" and not lines


@functools.lru_cache(maxsize=2)
def _whole(source):
  """The whole content of one text."""
  if source in EMBEDDED:
    path = hub.embedded(source, EMBEDDED[source])
    with lzma.open(path, "rt", encoding="utf-8") as file:
      return file.read()
  origin = text_documents.Origin(source, "train")
  [content] = text_documents.DocumentIterator(
    origin, in_training=False, corrupt=text_documents.Corrupt()
  )
  if not 2 <= len(content) <= _LONGEST_TEXT:
    raise ValueError(
      f"config.data.source={source!r}; has {len(content)} characters, must "
      f"have 2 to {_LONGEST_TEXT}: a longer text must be a folder of several "
      "files, or parquet or JSON lines"
    )
  return content


def _part(config, split):
  """The part of the config's one text that belongs to a split.

  If the text is only trained on, its train split is the whole text.
  """
  source = config.data.source
  if split == WHOLE:
    return _evaluated_text(source)
  content = _whole(source)
  hub.validate_split(source, split, _TEXT_SPLITS)
  if _eval_source(config) != source:
    return content
  part = _cut(content, split)
  if split != config.data.train_split:
    text_files.inform_once(
      f"{source!r}: the split {split!r} is {len(part)} of {len(content)} "
      "characters"
    )
  return part


def _evaluated_text(source):
  content = _whole(source)
  text_files.inform_once(
    f"{source!r}: all {len(content)} characters are evaluated"
  )
  return content


def _cut(content, split):
  size = max(int(_HELD_OUT_SHARE * len(content)), 1)
  test = len(content) - size
  begin, end = {
    "train": (0, test),
    "train_without_validation": (0, test - size),
    "validation": (test - size, test),
    "test": (test, None),
  }[split]
  return content[begin:end]


def tokenizer(config: ConfigDict) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a config; see sigattn.data.tokenizers.

  Raises ValueError if config.data.tokenizer does not name one.
  """
  data = config.data
  if data.tokenizer == "characters":
    return _characters(tuple(sorted(set(_origins(config)))))
  if data.tokenizer == "bytes":
    return tokenizers.Bytes()
  if not (path := hub.local(data.tokenizer, "tokenizer")).is_file():
    raise ValueError(
      f"config.data.tokenizer={data.tokenizer!r}; there is no such file: "
      "choose characters, bytes, or a tokenizer.json (`python -m sigattn "
      "train_tokenizer` trains one)"
    )
  largest = data.vocab_size or LARGEST_VOCABULARY
  return _tokenizer(path, largest, path.stat().st_mtime_ns)


def vocab_size(config: ConfigDict) -> int:
  """The number of tokens that a model knows, by config.data.vocab_size.

  None means the size of the tokenizer, rounded up to a multiple of 64.
  """
  return config.data.vocab_size or -(-tokenizer(config).size // 64) * 64


@functools.lru_cache(maxsize=4)
def _tokenizer(path, vocab_size, modified):
  del modified  # A file that was changed is read again.
  return tokenizers.read(path, vocab_size)


@functools.lru_cache(maxsize=4)
def _characters(origins):
  """The tokenizer of all characters that the sources have.

  It reads all sources to the end, because the alphabet must be the same in
  every run.
  """
  alphabet = set()
  for origin in origins:
    known = _splits(origin)
    if known is None:
      raise ValueError(
        f"config.data.{origin.key}={origin.source!r}; there is no such file or "
        "folder here. If it is a name of the Hugging Face Hub, "
        "config.data.tokenizer='characters' does not work with it, because all "
        "of its texts would have to be read first: choose bytes, or train a "
        "tokenizer (`python -m sigattn train_tokenizer`)"
      )
    if _is_text(origin.source, origin.lines):
      alphabet |= set(_whole(origin.source))
      continue
    progress = text_documents.Progress(
      f"reads the alphabet of {origin.source!r}"
    )
    documents = text_documents.Documents(origin, in_training=False)
    for count, document in enumerate(documents):
      alphabet.update(document)
      progress.say(f"{count} documents")
  return tokenizers.Characters("".join(sorted(alphabet)))


def open_source(config: ConfigDict, split: str) -> "_OneText | Stream":
  """Opens a split of config.data.source or config.data.mixture.

  Returns an ExampleSource for one text or tokens, otherwise a Stream. The first
  document is read. Raises ValueError if a source has no such split, if it has
  no documents or if it cannot be read.
  """
  if not _is_one_text(config):
    return Stream(config, split)
  other = _eval_source(config)
  if token_files.is_folder(config.data.source):
    return _OneText(config, _read_tokens(config, split), split)
  if other == config.data.source or _is_trained_on(config, split):
    return _OneText(config, _encoded(config, _part(config, split)), split)
  if _is_text(other, config.data.lines):
    hub.validate_split(other, split, _evaluated_splits(config))
    return _OneText(config, _encoded(config, _evaluated_text(other)), split)
  return Stream(config, split)


def _is_trained_on(config, split):
  """Whether a split is the one that a run trains on and does not evaluate."""
  return split == config.data.train_split != config.data.eval_split


def _evaluated_splits(config):
  """The splits that can be evaluated; None if only the Hub knows them."""
  data = config.data
  origin = _origin(config, _eval_source(config), "eval_split")
  if (known := _splits(origin)) is None:
    return None
  # The train split of a mixture is that of several sources.
  trained = [] if data.mixture or origin.held_out else [data.train_split]
  return dict.fromkeys([*known, *trained])


def files(source: str, key: str = "source") -> list[pathlib.Path]:
  """Returns the files of a local source that are read, those of all splits.

  key: the key of config.data, for the errors of text_files.find.
  """
  if token_files.is_folder(source):
    return token_files.files(source)
  by_split = text_files.find(source, key).values()
  names = {x for kinds in by_split for paths in kinds.values() for x in paths}
  return [pathlib.Path(name) for name in names]


def _read_tokens(config, split):
  source = config.data.source
  _tokens_have_their_tokenizer(config)
  hub.validate_split(source, split, token_files.splits(source))
  return token_files.read(source, split, tokenizer(config).size)


def _encoded(config, content):
  return _tokens(content, tokenizer(config))


def documents(
  source: str,
  split: str,
  column: str,
  lines: bool = False,
  max_corrupt_share: float = 0.0,
  at_least: int = 0,
) -> Iterable[str]:
  """Returns an iterable of the texts of a source.

  source: as in config.data.source. column, lines, max_corrupt_share: as in
  config.data.text_column and so on. at_least: as in text_documents.Corrupt.
  Raises ValueError if the source has no such split.
  """
  if _is_text(source, lines):
    hub.validate_split(source, split, _TEXT_SPLITS)
    return iter([_cut(_whole(source), split)])
  held_out = set(text_files.find(source) or ()) == {"train"}
  origin = text_documents.Origin(
    source, split, column=column, lines=lines, held_out=held_out
  )
  known = _splits(origin)
  if known is not None:
    hub.validate_split(source, split, known)
  corrupt = text_documents.Corrupt(max_corrupt_share, at_least)
  return text_documents.Documents(origin, in_training=False, corrupt=corrupt)


def _warn_of_few(config, split, tokens):
  """Warns of an evaluation of fewer tokens than a row of training has."""
  # In an evaluation at another length, data.length is that length.
  length = min(config.data.length, config.model.max_length)
  if tokens < length:
    text_files.warn_once(
      f"the split {split!r} has {tokens} tokens, fewer than a row of "
      f"config.data.length={length}: {text_documents.FEW}"
    )


def _num_rows(tokens, length):
  return -(-(tokens - 1) // length)


class _OneText(loader.ExampleSource):
  """Rows cut from the tokens (S,) of one long text.

  In training, row i of an epoch begins at a random token of [i L, (i + 1) L).
  In an evaluation, every token except the first is a target exactly once.
  """

  in_memory = True

  def __init__(self, config, token_S, split):
    if len(token_S) < 2:
      raise ValueError(
        f"{split=} of a text has {len(token_S)} tokens; must have 2 or more, "
        "since the first one is not predicted: give a longer text"
      )
    if split != config.data.train_split:
      _warn_of_few(config, split, len(token_S))
    self._length, self._tokens = config.data.length, token_S

  def __len__(self):
    return _num_rows(len(self._tokens), self._length)

  def train(self, indices_B, rng):
    start_B = indices_B * self._length
    start_B += rng.integers(self._length, size=len(indices_B))
    # No row reaches beyond the end of the text.
    last = max(len(self._tokens) - self._length - 1, 0)
    return self._rows(np.minimum(start_B, last))

  def evaluate(self, indices_B):
    return self._rows(indices_B * self._length)

  def _rows(self, start_B):
    index_BT = start_B[:, None] + np.arange(self._length + 1)
    real_BT = index_BT < len(self._tokens)
    token_BT = self._tokens[np.where(real_BT, index_BT, 0)].astype(np.int32)
    return {"token": np.where(real_BT, token_BT, -1)}


def _tokens(content, tokenizer):
  """The tokens of one text, int32 (S,).

  The text is encoded in pieces that end with a line. A tokenizer encodes pieces
  in parallel, and would need many times the memory for one string.
  """
  pieces, size = [[]], 0
  for line in content.splitlines(keepends=True):
    if size > _CHARACTERS_AT_ONCE // 16:
      pieces.append([])
      size = 0
    pieces[-1].append(line)
    size += len(line)
  encoded = tokenizer.encode(["".join(lines) for lines in pieces])
  return np.concatenate(encoded)


class Stream:
  """A stream of documents, which are packed into rows as they arrive."""

  def __init__(self, config: ConfigDict, split: str):
    """Opens the split and reads a document of each source."""
    self._config, self._split = config, split
    self._tokenizer = tokenizer(config)
    self._corrupt = {}  # {source: its Corrupt}
    origins = self._train_origins()
    if not origins or split == config.data.eval_split:
      origins.append(self._eval_origin())
    for origin in origins:
      text_documents.read_first(origin, self._corrupt_of(origin))

  def _train_origins(self):
    if self._split != self._config.data.train_split:
      return []
    return [
      _origin(self._config, source, "train_split")
      for source, _ in _mixture(self._config)
    ]

  def _eval_origin(self):
    config, split, source = (
      self._config,
      self._split,
      _eval_source(self._config),
    )
    known = _evaluated_splits(config)
    if split != WHOLE and known is not None:
      hub.validate_split(source, split, known)
    if (
      source != config.data.source
      and not config.data.mixture
      and _is_trained_on(config, split)
    ):
      return self._train_origins()[0]
    return _origin(config, source, "eval_split", split)

  def _corrupt_of(self, origin):
    data = self._config.data
    return self._corrupt.setdefault(
      origin.source,
      text_documents.Corrupt(data.max_corrupt_share, data.shuffle_window),
    )

  def train_batches(self, config: ConfigDict) -> Iterator[loader.Batch]:
    """Yields batches without end; each process reads its own documents.

    config.data.shuffle_window documents of a source are shuffled at a time, and
    then the pieces of up to a row into which they are cut, so that the rows of
    a long document are spread over those of others. The sources of a mixture
    alternate, by their shares of the rows.
    """
    mixture = _mixture(self._config)
    rows = [self._rows(x, train=True) for x in self._train_origins()]
    mixed = grain.IterDataset.mix(rows, [weight for _, weight in mixture])
    batches = mixed.batch(loader.batch_size(config), drop_remainder=True)
    return iter(
      grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=2
      )
    )

  def eval_batches(self, config: ConfigDict) -> Iterable[loader.Batch]:
    """Batches of the first config.eval.rows rows, with float32 `weight` (B,).

    Each pass over the result yields the rows (all of them if rows is None) in
    order; rows of weight 0 fill up the last batch. Each process reads all rows
    and yields its part of each batch.
    """
    return _EvalBatches(self, config.batch_size)

  def eval_rows(self) -> Iterator[loader.Batch]:
    """Yields the rows that are evaluated, each {"token", "segment"}."""
    rows = self._rows(self._eval_origin(), train=False)
    count = 0
    for row in itertools.islice(rows, self._config.eval.rows):
      yield row
      count += 1
    if count == 1:
      _warn_of_few(self._config, self._split, int((row["token"] >= 0).sum()))

  def _rows(self, origin, train):
    """A dataset of rows {"token", "segment"}, each (L + 1,)."""
    data, seed = self._config.data, self._config.seed
    pieces = grain.experimental.FlatMapIterDataset(
      _Blocks(
        origin,
        data.shuffle_window if train else None,
        seed,
        self._corrupt_of(origin),
      ),
      _Pieces(self._tokenizer, data.length),
    )
    packed = grain.experimental.FirstFitPackIterDataset(
      pieces,
      length_struct={"token": data.length + 1},
      num_packing_bins=data.packing_window,
      seed=seed,
      shuffle_bins=train,
      padding_struct={"token": -1},
    )
    return packed.map(
      lambda x: {"token": x["token"], "segment": x["token_segment_ids"]}
    )


class _EvalBatches:
  def __init__(self, stream, batch_size):
    self._stream, self._batch_size = stream, batch_size

  def __iter__(self):
    size, all_rows = self._batch_size, self._stream.eval_rows()
    share = size // jax.process_count()
    first = share * jax.process_index()
    while rows := list(itertools.islice(all_rows, size)):
      weight_B = (np.arange(size) < len(rows)).astype(np.float32)
      rows += [rows[-1]] * (size - len(rows))
      batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
      batch["weight"] = weight_B
      yield {name: x[first : first + share] for name, x in batch.items()}


class _Pieces(grain.experimental.FlatMapTransform):
  """Cuts texts into pieces of up to L + 1 tokens that overlap by one token.

  So every token of a document is a target exactly once. The first one is
  predicted from `end`. The pieces of a block are shuffled in training.
  """

  max_fan_out = 2**31

  def __init__(self, tokenizer, length):
    self._tokenizer, self._length = tokenizer, length

  def flat_map(self, block):
    end = np.array([self._tokenizer.end], np.int32)
    pieces = []
    for texts in _grouped(block.texts, _CHARACTERS_AT_ONCE, _ENCODED_AT_ONCE):
      for ids in self._tokenizer.encode(texts):
        ids = np.concatenate([end, ids, end])
        for start in range(0, len(ids) - 1, self._length):
          pieces.append({"token": ids[start : start + self._length + 1]})
    if block.seed is None:
      return pieces
    order = np.random.default_rng(block.seed).permutation(len(pieces))
    return [pieces[i] for i in order]


class _Block:
  """Texts, whose pieces are shuffled with the seed unless that is None.

  This is not a tuple, because grain would look for arrays in one.
  """

  def __init__(self, texts, seed):
    self.texts, self.seed = texts, seed


class _Blocks(grain.IterDataset):
  """A dataset of blocks, each of which follows another in a stream of texts.

  window: the number of documents that are shuffled together; None: all come
  once, in order. corrupt: as in DocumentIterator.
  """

  def __init__(self, origin, window, seed, corrupt=None):
    super().__init__()
    self._origin, self._window, self._seed = origin, window, seed
    self._corrupt = corrupt

  def __iter__(self):
    in_training = self._window is not None
    documents = text_documents.DocumentIterator(
      self._origin, in_training, self._corrupt
    )
    return _BlockIterator(self._origin, documents, self._window, self._seed)


class _BlockIterator(grain.DatasetIterator):
  """Iterates over _Blocks.

  A window ends when the epoch ends, however few documents it has, or when it
  holds too much text. The state is that of the documents at the beginning of
  the window, so a resumed run reads the window again.
  """

  def __init__(self, origin, documents, window, seed):
    super().__init__()
    self._origin, self._documents = origin, documents
    self._size, self._seed = window, seed
    self._window, self._start = -1, documents.get_state()
    self._blocks, self._place = [], 0

  def __next__(self):
    while self._place >= len(self._blocks):
      self._fill()
    self._place += 1
    return self._blocks[self._place - 1]

  def get_state(self):
    return {"start": self._start, "window": self._window, "place": self._place}

  def set_state(self, state):
    self._documents.set_state(state["start"])
    self._start, self._window = state["start"], state["window"] - 1
    self._blocks, self._place = [], 0
    if state["window"] >= 0:
      self._fill()
      self._place = state["place"]
    else:
      self._window = -1

  def _fill(self):
    self._start = self._documents.get_state()
    self._window += 1
    if self._size is None:
      texts = self._read(_ENCODED_AT_ONCE, _CHARACTERS_AT_ONCE)
      self._blocks = [_Block(texts, None)]
    else:
      texts = self._read(self._size, _WINDOW_CHARACTERS)
      rng = np.random.default_rng((self._seed, self._window))
      texts = [texts[i] for i in rng.permutation(len(texts))]
      self._blocks = [
        # From 1 on, because a last 0 would give the seed of the texts' order.
        _Block(x, (self._seed, self._window, number))
        for number, x in enumerate(_grouped(texts, _SHUFFLED_CHARACTERS), 1)
      ]
    self._place = 0

  def _read(self, count, characters):
    texts, size = [], 0
    progress = text_documents.Progress(
      f"fills the shuffle window from {self._origin}"
    )
    while len(texts) < count and size < characters:
      document = next(self._documents, None)
      if document is None and (texts or self._size is not None):
        break  # the end of an epoch
      if document is None:
        raise StopIteration
      texts.append(document)
      size += len(document)
      progress.say(f"{len(texts)} of {count} documents, {size} characters")
    return texts


def _grouped(texts, characters, count=None):
  """Groups consecutive texts into lists.

  A list ends as soon as it has that many characters, or `count` texts.
  """
  groups, size = [], characters
  for document in texts:
    if size >= characters or len(groups[-1]) == count:
      groups.append([])
      size = 0
    groups[-1].append(document)
    size += len(document)
  return groups
