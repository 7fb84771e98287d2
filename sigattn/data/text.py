"""Reads texts and turns them into rows of tokens.

A row has L + 1 tokens, where L is config.data.length: the model reads all but
the last token and predicts all but the first. A batch contains

  token    int32 (B, L + 1); -1 is padding
  segment  int32 (B, L + 1), the number of a token's document within its row,
           from 1 on; 0 is padding. Missing if each row is from one document

There are four kinds of sources. An embedded text is cut at new positions in
each epoch. A local file (parquet, JSON lines or text, compressed or not), a
local folder of such files, and a data set of the Hugging Face Hub (owner/name
or owner/name:subset) are streams of documents.
"""

import functools
import itertools
import lzma
from collections.abc import Iterable, Iterator

import grain
import grain.experimental
import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from sigattn.data import hub, loader, tokenizers
from sigattn.validate import added, items, real, sequence, text, whole

# The King James Bible, one verse per line; the licence is beside the file.
EMBEDDED = {"kjv": "kjv.txt.xz"}
_SPLITS = ("train", "test")  # of an embedded text
_HELD_OUT_SHARE = 0.05  # the end of an embedded text is its test split
_SUFFIXES = {  # {suffix of a local file: the builder in `datasets`}
  ".parquet": "parquet",
  ".json": "json",
  ".jsonl": "json",
  ".txt": "text",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Documents per call of the tokenizer: the tokenizers library encodes them in
# parallel threads.
_ENCODED_AT_ONCE = 64


FIELDS = {
  "data.source": text(),
  "data.mixture": sequence(
    items(text(), real(low=1e-9, high=1e9)),
    "(source, share from 1e-9 to 1e9) pairs",
    empty=True,
  ),
  "data.eval_source": text(optional=True),
  "data.train_split": text(),
  "data.eval_split": text(),
  "data.text_column": text(),
  "data.tokenizer": text(),
  "data.vocab_size": whole(low=1, high=2**22),
  "data.length": whole(low=1, high=2**24),
  "data.shuffle_window": whole(low=1, high=10**8),
  "data.packing_window": whole(low=1, high=2**20),
  "data.max_corrupt_share": added(real(low=0, high=1), before=0.0),
  "eval.rows": whole(low=1, high=10**12, optional=True),
}


def _sources_have_the_splits(config):
  """Compares the config with what is known of the sources before reading.

  Whether a stream has the split and the column is known only when it is read.
  """
  for split, key, source in _sources(config):
    _validate_source(key, source)
    if source in EMBEDDED and config.data[split] not in _SPLITS:
      raise ValueError(
        f"config.data.{split}={config.data[split]!r}; choose from "
        f"{sorted(_SPLITS)}"
      )


def _embedded_text_has_the_rows(config):
  data = config.data
  if data.source not in EMBEDDED or data.mixture:
    return
  # Characters bound the tokens of each tokenizer that is a file.
  characters = len(_embedded_split(data.source, data.train_split).encode())
  if data.length >= characters:
    raise ValueError(
      f"config.data.length={data.length!r}; must be less than {characters}, "
      f"the characters of {data.train_split!r} of {data.source}"
    )
  rows = _num_rows(characters, data.length)
  of = f"{data.source} in rows of config.data.length={data.length!r}"
  loader.validate_batch_size(config, rows, of)


def _vocabulary_covers_the_tokenizer(config):
  data = config.data
  size = tokenizer(config).size
  if data.vocab_size < size:
    raise ValueError(
      f"config.data.vocab_size={data.vocab_size}; must be at least "
      f"{size}, the size of config.data.tokenizer={data.tokenizer!r}"
    )


RULES = (
  _sources_have_the_splits,
  _vocabulary_covers_the_tokenizer,
  _embedded_text_has_the_rows,
)


def _sources(config):
  """What a run reads: [(key of its split, its own key, source)].

  Both keys are of config.data.
  """
  data, mixture = config.data, _mixture(config)
  for name, _ in data.mixture:
    if name in EMBEDDED:
      raise ValueError(
        f"config.data.mixture: {name!r} is an embedded text; must be a file, a "
        "folder or a Hugging Face name"
      )
  if data.source in EMBEDDED and not data.mixture:
    if data.eval_source is not None:
      raise ValueError(
        f"config.data.eval_source={data.eval_source!r}; must be None with "
        f"config.data.source={data.source!r}, whose end is evaluated"
      )
    splits = ("train_split", "eval_split")
    return [(split, "source", data.source) for split in splits]
  if data.num_workers:
    raise ValueError(
      f"config.data.num_workers={data.num_workers}; must be 0: a "
      "stream is read by one thread, and encoded by all threads"
    )
  key = "mixture" if data.mixture else "source"
  eval_key = "source" if data.eval_source is None else "eval_source"
  return [
    *(("train_split", key, name) for name, _ in mixture),
    ("eval_split", eval_key, _eval_source(data)),
  ]


def _eval_source(data):
  """The source of the evaluation if a stream is trained on."""
  if data.eval_source is not None:
    return data.eval_source
  if data.mixture or hub.local(data.source).is_file():
    raise ValueError(
      "config.data.eval_source=None; must be given if config.data.source is "
      "one file, or if config.data.mixture is not empty"
    )
  return data.source


def _mixture(config):
  return config.data.mixture or ((config.data.source, 1.0),)


def _validate_source(key, source):
  """key: config.data's key of the source."""
  path = hub.local(source, key)
  if source in EMBEDDED:
    hub.embedded(source, EMBEDDED[source])
  elif path.is_file():
    _builder(path, key)
  elif not path.is_dir() and not hub.is_hub_name(source):
    raise hub.unknown_source(source, EMBEDDED, "file or ", key)


def _builder(path, key="source"):
  """The name of the builder in `datasets` that reads a file."""
  suffixes = [x for x in path.suffixes if x not in _COMPRESSED]
  if not suffixes or suffixes[-1] not in _SUFFIXES:
    raise ValueError(
      f"config.data.{key}={str(path)!r}; its name must end in one of "
      f"{sorted(_SUFFIXES)}, compressed or not"
    )
  return _SUFFIXES[suffixes[-1]]


@functools.lru_cache(maxsize=1)
def _embedded(source):
  path = hub.embedded(source, EMBEDDED[source])
  with lzma.open(path, "rt", encoding="utf-8") as file:
    return file.read()


def _embedded_split(source, split):
  hub.validate_split(source, split, _SPLITS)
  whole_text = _embedded(source)
  cut = len(whole_text) - int(_HELD_OUT_SHARE * len(whole_text))
  return whole_text[:cut] if split == "train" else whole_text[cut:]


def tokenizer(config: ConfigDict) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a config; see sigattn.data.tokenizers.

  Raises ValueError if config.data.tokenizer does not name one.
  """
  data = config.data
  return _tokenizer(data.tokenizer, data.source, data.vocab_size)


@functools.lru_cache(maxsize=4)
def _tokenizer(name, source, vocab_size):
  if name == "bytes":
    return tokenizers.Bytes()
  if name == "characters":
    if source not in EMBEDDED:
      raise ValueError(
        f"config.data.tokenizer={name!r}; works only with the embedded texts "
        f"{sorted(EMBEDDED)}, not with config.data.source={source!r}: choose "
        "bytes, or train a tokenizer (`python -m "
        "sigattn train_tokenizer`)"
      )
    return tokenizers.Characters("".join(sorted(set(_embedded(source)))))
  if not (path := hub.local(name, "tokenizer")).is_file():
    raise ValueError(
      f"config.data.tokenizer={name!r}; choose characters, bytes, or a "
      "tokenizer.json (`python -m sigattn train_tokenizer` trains one)"
    )
  return tokenizers.File(path, vocab_size)


def open_source(
  config: ConfigDict, split: str
) -> "loader.ExampleSource | Stream":
  """Opens a split of config.data.source or config.data.mixture.

  Returns an ExampleSource for an embedded text, otherwise a Stream. Raises
  ValueError if an embedded text has no such split.
  """
  if config.data.source in EMBEDDED and not config.data.mixture:
    return _Embedded(config, split)
  return Stream(config, split)


def documents(source: str, split: str, column: str) -> Iterable[str]:
  """Returns an iterable of the texts of a source.

  source: as config.data.source. column: as config.data.text_column.
  """
  if source in EMBEDDED:
    return iter([_embedded_split(source, split)])
  return _Documents(source, split, column, _Corrupt(), endless=False)


def _num_rows(tokens, length):
  return -(-(tokens - 1) // length)


class _Embedded(loader.ExampleSource):
  """Rows cut from one long text.

  In training, row i of an epoch begins at a random token of [i L, (i + 1) L).
  In an evaluation, every token but the first is a target exactly once.
  """

  in_memory = True

  def __init__(self, config, split):
    self._length = config.data.length
    whole_text = _embedded_split(config.data.source, split)
    [self._tokens] = tokenizer(config).encode([whole_text])

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
    token_BT = self._tokens[np.where(real_BT, index_BT, 0)]
    return {"token": np.where(real_BT, token_BT, -1)}


class Stream:
  """A stream of documents, which are packed into rows as they arrive."""

  def __init__(self, config: ConfigDict, split: str):
    self._config, self._split = config, split
    self._tokenizer = tokenizer(config)
    self._corrupt = {}  # {source: what is known of its documents}

  def train_batches(self, config: ConfigDict) -> Iterator[loader.Batch]:
    """Yields batches without end; each process reads its own documents.

    config.data.shuffle_window documents of a source are shuffled at a time. The
    sources of a mixture alternate by their shares of the rows.
    """
    mixture = _mixture(self._config)
    rows = [
      self._rows(source, self._split, train=True) for source, _ in mixture
    ]
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
    data = self._config.data
    rows = self._rows(_eval_source(data), self._split, train=False)
    return itertools.islice(rows, self._config.eval.rows)

  def _rows(self, source, split, train):
    """A dataset of rows {"token", "segment"}, each (L + 1,)."""
    data, seed = self._config.data, self._config.seed
    corrupt = self._corrupt.setdefault(
      source, _Corrupt(data.max_corrupt_share, data.shuffle_window)
    )
    texts = _Documents(source, split, data.text_column, corrupt, endless=train)
    if train:
      texts = grain.experimental.WindowShuffleIterDataset(
        texts, window_size=data.shuffle_window, seed=seed
      )
    pieces = grain.experimental.FlatMapIterDataset(
      texts.batch(_ENCODED_AT_ONCE, batch_fn=list),
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

  Every token of a document is thus a target exactly once; the first one is
  predicted from `end`.
  """

  max_fan_out = 2**31

  def __init__(self, tokenizer, length):
    self._tokenizer, self._length = tokenizer, length

  def flat_map(self, texts):
    end = np.array([self._tokenizer.end], np.int32)
    pieces = []
    for ids in self._tokenizer.encode(texts):
      ids = np.concatenate([end, ids, end])
      for start in range(0, len(ids) - 1, self._length):
        pieces.append({"token": ids[start : start + self._length + 1]})
    return pieces


class _Corrupt:
  """Names the documents of a stream that are no text; ends a run with too many.

  How many documents a stream has is not known. The share is therefore that of
  the documents read so far, and at first of the first `at_least`. In a run of
  several processes, each of them counts what it reads itself. A run that is
  resumed counts from 0.
  """

  def __init__(self, max_share=0.0, at_least=0):
    self._max_share, self._at_least = max_share, at_least
    self._read, self._why = 0, {}

  def add(self, row, why):
    """row: the number of the document within an epoch, from 0."""
    self._read = max(self._read, row + 1)
    if row in self._why:
      return  # of another epoch
    if not self._max_share:
      raise ValueError(why)
    self._why[row] = why
    count = len(self._why)
    most = int(self._max_share * max(self._read, self._at_least))
    if count > most:
      raise ValueError(
        f"{count} documents are corrupt, of the first "
        f"{max(self._read, self._at_least)}; config.data.max_corrupt_share="
        f"{self._max_share} allows {most}: " + "; ".join(self._why.values())
      )
    logging.warning("skipped (%d of at most %d): %s", count, most, why)


class _Documents(grain.IterDataset):
  """A dataset of the texts of a split.

  corrupt: counts those that are no text, and are skipped. endless: whether to
  start again at the end, and to read this process's share of the documents
  instead of all.
  """

  def __init__(self, source, split, column, corrupt, endless):
    super().__init__()
    self._arguments = source, split, column, corrupt, endless

  def __iter__(self):
    return _DocumentIterator(*self._arguments)


class _DocumentIterator(grain.DatasetIterator):
  """Iterates over _Documents; its state holds that of the `datasets` stream."""

  def __init__(self, source, split, column, corrupt, endless):
    super().__init__()
    self._source, self._split, self._column = source, split, column
    self._corrupt, self._endless = corrupt, endless
    self._begin(epoch=0)

  def _begin(self, epoch, place=None, row=0):
    import datasets.distributed

    self._epoch, self._row = epoch, row
    with hub.reading(self._source):
      self._stream = _open(self._source, self._split)
      # In an evaluation, the processes divide the rows, not the documents.
      if self._endless:
        self._stream = datasets.distributed.split_dataset_by_node(
          self._stream, jax.process_index(), jax.process_count()
        )
      if place is not None:
        self._stream.load_state_dict(place)
      self._examples = iter(self._stream)

  def __next__(self):
    empty = False  # whether this epoch has no text so far
    while True:
      with hub.reading(self._source):
        example = next(self._examples, None)
      if example is not None:
        if (document := self._document(example)) is not None:
          return document
      elif not self._endless:
        raise StopIteration
      elif empty:
        raise ValueError(f"{self._source!r}: contains no documents")
      else:
        self._begin(self._epoch + 1)
        empty = True

  def _document(self, example):
    """The text of the next example; None if it is corrupt."""
    if self._column not in example:
      raise ValueError(
        f"config.data.text_column={self._column!r}; must be a column of "
        f"{self._source!r}, which has {sorted(example)}"
      )
    row, document = self._row, example[self._column]
    self._row += 1
    if isinstance(document, str):
      return document
    shown = repr(example)
    self._corrupt.add(
      row,
      f"{self._source!r}, split {self._split!r}, document {row}: config.data."
      f"text_column={self._column!r} must be text, not {document!r:.100}: "
      f"{shown if len(shown) <= 300 else shown[:300] + '...'}",
    )
    return None

  def get_state(self):
    return {
      "epoch": self._epoch,
      "row": self._row,
      "place": self._stream.state_dict(),
    }

  def set_state(self, state):
    self._begin(**state)


def _open(source, split):
  """Opens a file, folder or Hub name as a datasets.IterableDataset."""
  import datasets

  path = hub.local(source)
  if path.is_file():
    return datasets.load_dataset(
      _builder(path), data_files={split: str(path)}, split=split, streaming=True
    )
  if path.is_dir():
    return datasets.load_dataset(
      str(path.resolve()), split=split, streaming=True
    )
  name, _, subset = source.partition(":")
  return datasets.load_dataset(
    name, subset or None, split=split, streaming=True
  )
