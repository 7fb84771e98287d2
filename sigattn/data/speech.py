"""Transcribed speech: where it comes from, and how it becomes arrays.

Three kinds of config.data.source: the embedded set, a local folder of parquet
files, and a data set of the Hugging Face Hub.
"""

import functools
import io
import math
import os
import unicodedata
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
import pyarrow.parquet
import scipy.signal
import soundfile
from absl import logging
from ml_collections import ConfigDict

from sigattn.data import hub, loader
from sigattn.validate import Field, real, sequence, text, whole

# 535 prompts of one speaker, 18.6 minutes; licence and credit lie beside it.
EMBEDDED = {"spoken_prompts": "spoken_prompts.parquet"}
_SPLITS = ("train", "test")
# Of the embedded set: by transcript, so that none is in both splits.
_HELD_OUT_EVERY = 10  # one transcript in so many
_TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence")
BLANK = 0  # CTC's; character i of the alphabet has the index i + 1


def _increasing():
  """Positive numbers, each greater than the one before."""
  positive = sequence(real(above=0), "positive numbers")

  def is_right(values):
    return positive.is_right(values) and list(values) == sorted(set(values))

  return Field(
    is_right, "must be finite, positive and each greater than the one before"
  )


FIELDS = {
  "data.source": text(),
  "data.train_split": text(),
  "data.eval_split": text(),
  "data.sample_rate": whole(low=1000),
  "data.alphabet": Field(
    lambda x: isinstance(x, str) and 0 < len(x) == len(set(x)),
    "must be characters, each once",
  ),
  "data.bucket_seconds": _increasing(),
  "augment.speeds": _increasing(),
}


def _speeds_are_hundredths(config):
  speeds = config.augment.speeds
  if any(abs(100 * speed - round(100 * speed)) > 1e-6 for speed in speeds):
    raise ValueError(f"config.augment.speeds={speeds!r}; must be hundredths")


def _source_has_the_splits(config):
  """Looks up what the source offers, without loading it.

  The columns of a folder are known only once it is opened.
  """
  splits = _splits(config)
  for key in ("train_split", "eval_split"):
    value = config.data[key]
    for part in value.split("+"):
      if part not in splits:
        raise ValueError(
          f"config.data.{key}={value!r}; choose from {sorted(splits)}, or "
          "join several by +"
        )


RULES = (_speeds_are_hundredths, _source_has_the_splits)


def _splits(config):
  source = config.data.source
  if source in EMBEDDED:
    hub.embedded(source, EMBEDDED[source])
    return _SPLITS
  return hub.splits(_builder(config))


def _builder(config):
  return hub.builder(config.data.source, EMBEDDED)


def open_source(config: ConfigDict, split: str) -> "Source":
  """The Source of a split. ValueError where there is no such split."""
  for part in split.split("+"):
    hub.validate_split(config.data.source, part, _splits(config))
  if config.data.source in EMBEDDED:
    return Source(config, split, _embedded(config.data.source, split), True)
  return Source(config, split, _TableRecordings(config, split), False)


def transcript(text: str, alphabet: str) -> str:
  """The text in the alphabet's characters: what is said, as it is learned.

  Lower case where the alphabet has no upper case; accents, punctuation and all
  else that is not in the alphabet dropped; words one space apart.
  """
  if alphabet == alphabet.lower():
    text = text.lower()
  text = unicodedata.normalize("NFKD", text).replace("\u2019", "'")
  kept = "".join(
    c if c in alphabet else " " if c.isspace() or c == "-" else "" for c in text
  )
  return " ".join(kept.split())


def encode(text: str, alphabet: str) -> np.ndarray:
  """int32 indices of the characters; ValueError for one that is unknown."""
  try:
    return np.array([alphabet.index(c) + 1 for c in text], np.int32)
  except ValueError as error:
    raise ValueError(f"{text=}; must be of {alphabet=}") from error


def spell(indices: Iterable[int], alphabet: str) -> str:
  """The text of indices without blanks."""
  return "".join(alphabet[i - 1] for i in indices)


def read(
  file: str | os.PathLike[str] | BinaryIO, sample_rate: int
) -> np.ndarray:
  """float32 samples in -1..1 of a path or file object, at `sample_rate`.

  Channels are averaged. Whatever libsndfile reads: WAV, FLAC, Opus, MP3, ...
  """
  audio_SC, rate = soundfile.read(file, dtype="float32", always_2d=True)
  return resample(audio_SC.mean(axis=1), rate, sample_rate)


def resample(audio_S: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
  """The same sound with another number of samples a second."""
  if rate == new_rate:
    return audio_S
  common = math.gcd(rate, new_rate)
  up, down = new_rate // common, rate // common
  return scipy.signal.resample_poly(audio_S, up, down).astype(np.float32)


class _Recordings:
  """Encoded recordings, their transcripts and lengths, by index."""

  def __init__(self, recordings, texts, seconds):
    self._recordings, self.texts, self.seconds = recordings, texts, seconds

  def __getitem__(self, i):
    return self._recordings[i]


def _embedded(name, split):
  table = pyarrow.parquet.read_table(hub.embedded(name, EMBEDDED[name]))
  rows = [
    row
    for row in table.to_pylist()
    if _SPLITS[zlib.crc32(row["text"].encode()) % _HELD_OUT_EVERY == 0]
    in split.split("+")
  ]
  return _Recordings(
    [row["audio"] for row in rows],
    [row["text"] for row in rows],
    [row["duration"] for row in rows],
  )


class _TableRecordings(_Recordings):
  """A split that `datasets` reads; the lengths are read once and cached."""

  def __init__(self, config, split):
    import datasets

    source = config.data.source
    self._origin = f"config.data.source={source!r}, split {split!r}"
    table = hub.table(source, _builder(config), split)
    audio = hub.column(source, table.features, datasets.Audio, ("audio",))
    text = _text_column(source, table.features)
    # Undecoded: `datasets` would decode with torchcodec, and so want torch.
    table = table.select_columns([audio, text]).cast_column(
      audio, datasets.Audio(decode=False)
    )
    lengths = table.map(
      functools.partial(_duration, audio=audio, origin=self._origin),
      with_indices=True,
      remove_columns=table.column_names,
      desc="lengths of the recordings",
    )
    super().__init__(table, table[text][:], lengths["seconds"][:])
    self._audio = audio

  def __getitem__(self, i):
    return self._recordings[int(i)][self._audio]


def _text_column(source, columns):
  names = [name for name in _TEXT_COLUMNS if name in columns]
  if len(names) == 1:
    return names[0]
  raise ValueError(
    f"config.data.source={source!r}; needs one column called "
    f"{' or '.join(_TEXT_COLUMNS)}; its columns are {dict(columns)}"
  )


def _duration(example, row, audio, origin):
  try:
    return {"seconds": soundfile.info(_open(example[audio])).duration}
  except Exception as error:  # libsndfile's, and those of files.
    path = example[audio] and example[audio]["path"]
    raise ValueError(f"{origin}, row {row}, {path=}: {error!r}") from error


def _open(encoded):
  content = encoded["bytes"]
  return encoded["path"] if content is None else io.BytesIO(content)


class Source(loader.ExampleSource):
  """A split of recordings in buckets of similar length.

  buckets: the indices of the utterances in each, longest last; a batch is of
  one bucket, and all of a bucket's batches have one shape.
  """

  def __init__(
    self, config: ConfigDict, split: str, rows: _Recordings, in_memory: bool
  ):
    data, self._rows, self.in_memory = config.data, rows, in_memory
    self._rate, self._speeds = data.sample_rate, tuple(config.augment.speeds)
    self._origin = f"config.data.source={data.source!r}, split {split!r}"
    self._texts = [transcript(text, data.alphabet) for text in rows.texts]
    self._targets = [encode(text, data.alphabet) for text in self._texts]
    self._seconds = np.array(rows.seconds, np.float64)
    self._max_seconds = np.array(data.bucket_seconds)
    self._bucket = np.searchsorted(self._max_seconds, self._seconds)
    self.buckets = [
      np.flatnonzero(self._bucket == b) for b in range(len(self._max_seconds))
    ]
    if num_too_long := int((self._bucket == len(self._max_seconds)).sum()):
      logging.warning(
        "%s: %d of %d recordings are longer than config.data.bucket_seconds "
        "and left out of training", self._origin, num_too_long, len(self)
      )  # fmt: skip
    self._cache = {}  # what is in memory, by index and speed

  def __len__(self) -> int:
    return len(self._texts)

  def train(
    self, indices_B: np.ndarray, rng: np.random.Generator
  ) -> loader.Batch:
    """A batch, each utterance at one of the speeds of config.augment.

    float32 `audio` (B, S) in -1..1, int32 `samples` (B,) of it that are no
    padding, int32 `target` (B, U) and `characters` (B,), likewise.
    """
    speeds = rng.choice(self._speeds, len(indices_B))
    audio = [
      self._at_speed(i, speed)
      for i, speed in zip(indices_B.tolist(), speeds.tolist(), strict=True)
    ]
    return self._batch(indices_B, audio, min(*self._speeds, 1.0))

  def evaluate(self, indices_B: np.ndarray) -> loader.Batch:
    """The same as recorded, and float32 `seconds` (B,)."""
    audio = [self._at_speed(i, 1.0) for i in indices_B.tolist()]
    batch = self._batch(indices_B, audio, 1.0)
    seconds = self._seconds[indices_B].astype(np.float32)
    return batch | {"seconds": seconds}

  def _at_speed(self, i, speed):
    """As if played at another speed, higher or lower (Ko et al., 2015)."""
    if (i, speed) in self._cache:
      return self._cache[i, speed]
    if speed == 1:
      audio_S = self._decode(i)
    else:  # To decode takes ten times as long as to resample.
      audio_S = resample(self._at_speed(i, 1.0), round(100 * speed), 100)
    if self.in_memory:
      self._cache[i, speed] = audio_S
    return audio_S

  def _decode(self, i):
    encoded = self._rows[i]
    try:
      return read(_open(encoded), self._rate)
    except Exception as error:  # libsndfile's, and those of files.
      path = encoded and encoded["path"]
      raise ValueError(
        f"{self._origin}, row {i}, {path=}: {error!r}"
      ) from error

  def _batch(self, indices_B, audio, slowest):
    bucket = self._bucket[indices_B[0]]
    # A recording may be a sample longer than the seconds of its header say.
    samples = math.ceil(self._max_seconds[bucket] * self._rate / slowest) + 1
    characters = max(1, *(len(self._targets[i]) for i in self.buckets[bucket]))
    targets = [self._targets[i] for i in indices_B]
    for i, audio_S in zip(indices_B.tolist(), audio, strict=True):
      if len(audio_S) > samples:
        raise ValueError(
          f"{self._origin}, row {i}: longer than the {self._seconds[i]:.2f} "
          "seconds of its header"
        )
    return {
      "audio": _padded(audio, samples, np.float32),
      "samples": _lengths(audio),
      "target": _padded(targets, characters, np.int32),
      "characters": _lengths(targets),
    }


def _padded(rows, length, dtype):
  batch = np.zeros((len(rows), length), dtype)
  for row, values in zip(batch, rows, strict=True):
    row[: len(values)] = values
  return batch


def _lengths(rows):
  return np.array([len(row) for row in rows], np.int32)
