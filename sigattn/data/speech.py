"""Reads transcribed speech and turns it into batches of arrays.

config.data.source is the name of the embedded data set, a local folder, or the
name of a data set on the Hugging Face Hub. A folder holds parquet files, or
recordings in one of the layouts of speech_files.
"""

import functools
import io
import itertools
import math
import os
import unicodedata
import zlib
from collections.abc import Iterable
from typing import BinaryIO

from sigattn import extras

extras.require("speech")

import jax
import numpy as np
import pyarrow.parquet
import scipy.signal
import soundfile
from absl import logging
from ml_collections import ConfigDict

from sigattn.data import hub, loader, log_mel, speech_files
from sigattn.validate import Field, real, sequence, text, whole

# 535 prompts of one speaker, 18.6 minutes; licence and credit are beside the
# file.
EMBEDDED = {"spoken_prompts": "spoken_prompts.parquet"}
_SPLITS = ("train", "test")
# One of this many transcripts is in the test split of the embedded set, and of
# a folder of recordings that has only train. The transcript decides, so that
# none is in both splits.
_HELD_OUT_EVERY = 10
# Samples per second. With a rate of 1 in its header, a short recording would be
# resampled to gigabytes.
RATES = (1000, 768_000)
# Samples are in [-1, 1], but in some files they are as large as integers.
# Beyond this limit the energies overflow float32.
_LOUDEST = 1e9
BLANK = 0  # CTC's blank; character i of the alphabet has index i + 1


def _increasing(low, high):
  """A field of numbers from `low` to `high` in increasing order."""
  within = sequence(
    real(low, high), f"numbers from {low} to {high}", longest=64
  )

  def is_right(values):
    return within.is_right(values) and list(values) == sorted(set(values))

  return Field(is_right, f"{within.wanted}, each greater than the one before")


FIELDS = {
  "data.source": text(),
  "data.train_split": text(),
  "data.eval_split": text(),
  "data.sample_rate": whole(*RATES),
  "data.alphabet": Field(
    lambda x: isinstance(x, str) and 0 < len(x) == len(set(x)) <= 2**16,
    f"must be 1 to {2**16} characters, each once",
  ),
  "data.max_corrupt_share": real(low=0, high=1),
  # From two windows of log_mel to an hour.
  "data.bucket_seconds": _increasing(0.05, 3600),
  "augment.speeds": _increasing(0.1, 10),
}


def _speeds_are_hundredths(config):
  speeds = config.augment.speeds
  if any(abs(100 * speed - round(100 * speed)) > 1e-6 for speed in speeds):
    raise ValueError(
      f"config.augment.speeds={speeds!r}; must be multiples of 0.01"
    )


def _source_has_the_splits(config):
  """A rule: the config must fit what is known of the source before reading.

  The columns of a folder are known only after it has been opened.
  _TableRecordings validates them then.
  """
  source, splits = config.data.source, _splits(config)
  for key in ("train_split", "eval_split"):
    value = config.data[key]
    for part in value.split("+"):
      if part not in splits:
        raise ValueError(
          f"config.data.{key}={value!r}; choose from {sorted(splits)}, or "
          "join several by +"
        )
  if source in EMBEDDED:
    split, seconds = config.data.train_split, config.data.bucket_seconds
    rows = _embedded_rows(source, split)
    loader.validate_batch_size(config, len(rows), f"{split!r} of {source}")
    if seconds[-1] < (shortest := min(row["duration"] for row in rows)):
      raise ValueError(
        f"config.data.bucket_seconds={seconds!r}; must reach {shortest:.2f}, "
        f"the shortest recording in {split!r} of {source}"
      )


RULES = (_speeds_are_hundredths, _source_has_the_splits)


def _splits(config):
  source = config.data.source
  if source in EMBEDDED:
    hub.embedded(source, EMBEDDED[source])
    return _SPLITS
  if (found := _found(source)) is not None:
    return tuple(found)
  return hub.splits(_builder(config))


def _found(source):
  """speech_files.find; if there is only train, a test split is held out."""
  found = speech_files.find(source)
  if found is None or set(found) != {"train"}:
    return found
  splits = {name: [] for name in _SPLITS}
  for row in found["train"]:
    splits[_split_of(row[1])].append(row)
  if not all(splits.values()):
    raise ValueError(
      f"config.data.source={source!r}; about every {_HELD_OUT_EVERY}th "
      "transcript is held out where no folder is called test, but of these "
      f"{len(found['train'])} that leaves a split empty: put some recordings "
      "into folders train and test"
    )
  return splits


def _split_of(transcript):
  return _SPLITS[zlib.crc32(transcript.encode()) % _HELD_OUT_EVERY == 0]


def _builder(config):
  return hub.builder(config.data.source, EMBEDDED)


def open_source(config: ConfigDict, split: str) -> "Source":
  """Opens a split of config.data.source, or several splits joined by +.

  Raises ValueError if the source has no such split or cannot be read.
  """
  for part in split.split("+"):
    hub.validate_split(config.data.source, part, _splits(config))
  if config.data.source in EMBEDDED:
    return Source(config, split, _embedded(config.data.source, split), True)
  return Source(config, split, _TableRecordings(config, split), False)


def transcript(text: str, alphabet: str) -> str:
  """Returns the text in the characters of the alphabet, which a model learns.

  The text becomes lower case if the alphabet has no upper case. Accents,
  punctuation and all other characters outside the alphabet are dropped. One
  space separates two words, if the alphabet has it; hyphens count as spaces.
  """
  if alphabet == alphabet.lower():
    text = text.lower()
  text = unicodedata.normalize("NFKD", text).replace("\u2019", "'")
  kept = "".join(
    c if c in alphabet else " " if c.isspace() or c == "-" else "" for c in text
  )
  return (" " if " " in alphabet else "").join(kept.split())


def encode(text: str, alphabet: str) -> np.ndarray:
  """Returns the int32 index of each character, from 1 on; 0 is CTC's blank.

  Raises ValueError for a character outside the alphabet.
  """
  try:
    return np.array([alphabet.index(c) + 1 for c in text], np.int32)
  except ValueError as error:
    raise ValueError(f"{text=}; must consist of {alphabet=}") from error


def spell(indices: Iterable[int], alphabet: str) -> str:
  """Returns the text of indices, which must not contain the blank."""
  return "".join(alphabet[i - 1] for i in indices)


def frames(
  config: ConfigDict, samples: int | np.ndarray | jax.Array
) -> int | np.ndarray | jax.Array:
  """Returns the number of log-mel frames of recordings.

  It is below 1 for a recording that is shorter than a window. samples: the
  lengths at config.data.sample_rate, an int or an array.
  """
  if config.model.features == "whisper":
    return log_mel.whisper_frames(samples)
  return log_mel.frames(samples, config.data.sample_rate)


def tokens(config: ConfigDict, samples: int | np.ndarray) -> np.ndarray:
  """Returns the number of tokens that the convolutions make of the frames.

  A recording that is shorter than a window counts as one frame. samples: as in
  `frames`.
  """
  tokens = np.maximum(frames(config, samples), 1)
  for _, stride in config.model.convolutions:
    tokens = -(-tokens // stride)
  return tokens


def needed_tokens(target_U: np.ndarray) -> int:
  """Returns how many tokens CTC needs for a target.

  They are one for each character, and a blank between two equal ones.
  """
  return len(target_U) + int((target_U[1:] == target_U[:-1]).sum())


def read(
  file: str | os.PathLike[str] | BinaryIO, sample_rate: int
) -> np.ndarray:
  """Reads a recording: float32 samples (S,) in [-1, 1] at `sample_rate` Hz.

  file: a path, or a file object opened in binary mode, in a format that
  libsndfile reads: WAV, FLAC, Opus, MP3, ... Channels are averaged. Raises
  ValueError for a rate outside of RATES, and for samples that are not finite or
  larger than _LOUDEST.
  """
  with soundfile.SoundFile(file) as recording:
    _validate_rate(recording.samplerate)
    audio_SC = recording.read(dtype="float32", always_2d=True)
  audio_S = audio_SC.mean(axis=1)
  # This also finds NaN, because NaN is not below anything.
  if wrong := np.flatnonzero(~(np.abs(audio_S) <= _LOUDEST)).tolist():
    raise ValueError(
      f"sample {wrong[0]} is {audio_S[wrong[0]]}; must be finite and at most "
      f"{_LOUDEST:g}"
    )
  return resample(audio_S, recording.samplerate, sample_rate)


def _validate_rate(rate):
  low, high = RATES
  if not low <= rate <= high:
    raise ValueError(
      f"{rate} samples per second in its header; must be from {low} to {high}"
    )


def resample(audio_S: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
  """Resamples audio from `rate` to `new_rate` samples per second."""
  if rate == new_rate:
    return audio_S
  common = math.gcd(rate, new_rate)
  up, down = new_rate // common, rate // common
  return scipy.signal.resample_poly(audio_S, up, down).astype(np.float32)


class _Recordings:
  """Encoded recordings by index, with their transcripts and lengths.

  unreadable: {index: why} of recordings whose length is unknown (NaN).
  """

  def __init__(self, recordings, texts, seconds, unreadable=()):
    self._recordings, self.texts, self.seconds = recordings, texts, seconds
    self.unreadable = dict(unreadable)

  def __getitem__(self, i):
    return self._recordings[i]


@functools.lru_cache(maxsize=2)
def _embedded_table(name):
  file = hub.embedded(name, EMBEDDED[name])
  return pyarrow.parquet.read_table(file).to_pylist()


def _embedded_rows(name, split):
  return [
    row
    for row in _embedded_table(name)
    if _split_of(row["text"]) in split.split("+")
  ]


def _embedded(name, split):
  rows = _embedded_rows(name, split)
  return _Recordings(
    [row["audio"] for row in rows],
    [row["text"] for row in rows],
    [row["duration"] for row in rows],
  )


class _TableRecordings(_Recordings):
  """A split read by `datasets`, which caches the lengths of the recordings."""

  def __init__(self, config, split):
    import datasets

    source = config.data.source
    self._origin = f"config.data.source={source!r}, split {split!r}"
    found = _found(source)
    if found is None:
      table = hub.table(source, _builder(config), split)
    else:
      rows = [row for part in split.split("+") for row in found[part]]
      table = datasets.Dataset.from_dict({
        "audio": [{"bytes": None, "path": path} for path, _ in rows],
        "text": [text for _, text in rows],
      })  # fmt: skip
    audio = hub.column(
      source,
      table.features,
      "Audio",
      lambda x: hub.is_encoded(x, datasets.Audio),
      ("audio",),
    )
    text = _text_column(source, table.features)
    table = table.select_columns([audio, text])
    if isinstance(table.features[audio], datasets.Audio):
      # The audio stays encoded: `datasets` would need torch to decode it.
      table = table.cast_column(audio, datasets.Audio(decode=False))
    lengths = table.map(
      functools.partial(
        _duration,
        audio=audio,
        origin=self._origin,
        source=source,
        skips=int(config.data.max_corrupt_share * len(table)) > 0,
      ),
      with_indices=True,
      remove_columns=table.column_names,
      desc="Reading the lengths of the recordings",
    )
    super().__init__(
      table,
      table[text][:],
      lengths["seconds"][:],
      ((i, why) for i, why in enumerate(lengths["corrupt"][:]) if why),
    )
    self._audio = audio

  def __getitem__(self, i):
    return hub.encoded(self._recordings[int(i)][self._audio])


def _text_column(source, columns):
  names = [name for name in speech_files.TEXT_COLUMNS if name in columns]
  if len(names) == 1:
    return names[0]
  raise ValueError(
    f"config.data.source={source!r}; needs one column called "
    f"{' or '.join(speech_files.TEXT_COLUMNS)}; its columns are {dict(columns)}"
  )


def _duration(example, row, audio, origin, source, skips):
  """The length, or why it cannot be read; raises if nothing is skipped."""
  encoded = hub.encoded(example[audio])
  try:
    header = soundfile.info(_open(encoded, source))
    _validate_rate(header.samplerate)
    return {"seconds": header.duration, "corrupt": ""}
  except Exception as error:  # errors of libsndfile and of files
    why = loader.why_unreadable(origin, row, encoded, error)
    if not skips:
      raise loader.CorruptExampleError(why) from error
    return {"seconds": math.nan, "corrupt": why}


def _open(encoded, source):
  content = encoded["bytes"]
  if content is None:
    return hub.file_of(source, encoded["path"])
  return io.BytesIO(content)


class Source(loader.ExampleSource):
  """A split of recordings, grouped into buckets of similar length.

  buckets: the indices of the utterances of each bucket, longest last. Each
  batch comes from one bucket, and all batches of a bucket have one shape.
  """

  def __init__(
    self, config: ConfigDict, split: str, rows: _Recordings, in_memory: bool
  ):
    data, self._rows, self.in_memory = config.data, rows, in_memory
    self._rate, self._speeds = data.sample_rate, tuple(config.augment.speeds)
    self._tokens = functools.partial(tokens, config)
    self._source = data.source
    self._origin = f"config.data.source={data.source!r}, split {split!r}"
    self._texts = [transcript(text, data.alphabet) for text in rows.texts]
    self._targets = [encode(text, data.alphabet) for text in self._texts]
    self._seconds = np.array(rows.seconds, np.float64)
    self.max_corrupt = int(data.max_corrupt_share * len(self._texts))
    self.unreadable = rows.unreadable | self._too_short()
    # This sorts behind all buckets.
    self._seconds[list(self.unreadable)] = math.nan
    self._max_seconds = np.array(data.bucket_seconds)
    self._bucket = np.searchsorted(self._max_seconds, self._seconds)
    self.buckets = [
      np.flatnonzero(self._bucket == b) for b in range(len(self._max_seconds))
    ]
    num_too_long = int((self._bucket == len(self._max_seconds)).sum())
    if num_too_long := num_too_long - len(self.unreadable):
      logging.warning(
        "%s: %d of %d recordings are longer than all of "
        "config.data.bucket_seconds and are left out of training",
        self._origin, num_too_long, len(self)
      )  # fmt: skip
    self._cache = {}  # {(index, speed): samples}, if in_memory

  def __len__(self) -> int:
    return len(self._texts)

  def _too_short(self):
    """{index: why} of recordings that are too short for their transcripts.

    Their lengths are those of their headers. Raises CorruptExampleError if no
    recording may be corrupt.
    """
    samples = {
      i: math.ceil(seconds * self._rate)
      for i, seconds in enumerate(self._seconds.tolist())
      if not math.isnan(seconds)
    }
    tokens = self._tokens(np.array([*samples.values()], np.int64))
    needed = [needed_tokens(self._targets[i]) for i in samples]
    places = np.array([*samples], np.int64)[tokens < needed].tolist()
    if places and not self.max_corrupt:
      raise loader.CorruptExampleError(
        f"{len(places)} of {len(self)} recordings are too short for their "
        f"transcripts. The first is {self._why_too_short(places[0], samples)}. "
        "Correct the transcripts, use smaller strides in "
        "config.model.convolutions, or let config.data.max_corrupt_share, the "
        "share of recordings that may be skipped, be large enough"
      )
    return {i: self._why_too_short(i, samples) for i in places}

  def _why_too_short(self, i, samples):
    """The message for a recording. samples: {i: its length}."""
    target_U = self._targets[i]
    why = (
      f"the recording has {self._tokens(samples[i])} tokens, and CTC needs "
      f"{needed_tokens(target_U)} for the {len(target_U)} characters of the "
      "transcript"
    )
    return loader.why_unreadable(
      self._origin, i, self._rows[i], ValueError(why)
    )

  def train(
    self, indices_B: np.ndarray, rng: np.random.Generator
  ) -> loader.Batch:
    """Returns a batch, each utterance at a random one of config.augment.speeds.

    {"audio": float32 (B, S) in [-1, 1], "samples": int32 (B,),
     "target": int32 (B, U), "characters": int32 (B,)}
    samples and characters are the lengths of audio and target without padding.
    """
    speeds = rng.choice(self._speeds, len(indices_B))
    return self._batch(indices_B, speeds, min(*self._speeds, 1.0))

  def evaluate(self, indices_B: np.ndarray) -> loader.Batch:
    """Returns a batch at the recorded speed, with float32 `seconds` (B,)."""
    batch = self._batch(indices_B, np.ones(len(indices_B)), 1.0)
    seconds = self._seconds[indices_B].astype(np.float32)
    return batch | {"seconds": seconds}

  def _at_speed(self, i, speed):
    """The samples played at another speed, which shifts the pitch.

    Ko et al., 2015.
    """
    if (i, speed) in self._cache:
      return self._cache[i, speed]
    if speed == 1:
      audio_S = self._decode(i)
    else:  # Decoding takes ten times as long as resampling, so decode once.
      audio_S = resample(self._at_speed(i, 1.0), round(100 * speed), 100)
    if self.in_memory:
      self._cache[i, speed] = audio_S
    return audio_S

  def _decode(self, i):
    encoded = self._rows[i]
    try:
      return read(_open(encoded, self._source), self._rate)
    except Exception as error:  # errors of libsndfile and of files
      why = loader.why_unreadable(self._origin, i, encoded, error)
      raise loader.CorruptExampleError(why) from error

  def _usable(self, i, speed, samples):
    """_at_speed, or at the recorded speed if it is else too short.

    Raises CorruptExampleError if the recording is longer than its header says,
    or too short for its transcript.
    """
    audio_S = self._at_speed(i, speed)
    if self._tokens(len(audio_S)) < needed_tokens(self._targets[i]):
      if speed > 1:
        return self._usable(i, 1.0, samples)
      raise loader.CorruptExampleError(
        self._why_too_short(i, {i: len(audio_S)})
      )
    if len(audio_S) > samples:
      raise loader.CorruptExampleError(
        f"{self._origin}, row {i}: the recording is longer than the "
        f"{self._seconds[i]:.2f} seconds in its header"
      )
    return audio_S

  def why_corrupt(self, index: int) -> str:
    if index in self.unreadable:
      return self.unreadable[index]
    seconds = self._max_seconds[self._bucket[index]]
    try:
      self._usable(index, 1.0, math.ceil(seconds * self._rate) + 1)
    except loader.CorruptExampleError as error:
      return str(error)
    return f"{self._origin}, row {index}: was readable at the second attempt"

  def _batch(self, indices_B, speeds_B, slowest):
    """A batch. The next recording of the bucket replaces a corrupt one."""
    bucket = self._bucket[indices_B[0]]
    # A recording may be one sample longer than the seconds in its header.
    samples = math.ceil(self._max_seconds[bucket] * self._rate / slowest) + 1
    characters = max(1, *(len(self._targets[i]) for i in self.buckets[bucket]))
    rows = self.buckets[bucket]
    read_B, audio = [], []
    for i, speed in zip(indices_B.tolist(), speeds_B.tolist(), strict=True):
      after = int(np.searchsorted(rows, i, side="right"))
      others = (int(rows[(after + j) % len(rows)]) for j in range(len(rows)))
      read, audio_S = self.first_readable(
        itertools.chain([i], others),
        lambda i, speed=speed: self._usable(i, speed, samples),
      )
      read_B.append(read)
      audio.append(audio_S)
    targets = [self._targets[i] for i in read_B]
    return self.marks(indices_B, np.array(read_B)) | {
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
