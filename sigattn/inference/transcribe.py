"""Transcribes recordings with a trained speech model.

  python -m sigattn transcribe --workdir=runs/speech_sigmoid/default a.wav b.mp3

prints one line of text per file. The files may have any sample rate and any
format that libsndfile reads.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import jax
import numpy as np
from absl import flags
from flax import nnx

from sigattn.data import speech as recordings
from sigattn.tasks import speech
from sigattn.training import checkpoint, setup


def transcribe(
  workdir: str | os.PathLike[str],
  files: Iterable[str | os.PathLike[str] | BinaryIO],
  step: int | str | None = None,
  beam_width: int | None = None,
) -> Iterator[str]:
  """Returns an iterator over the texts of the recordings.

  The model and all files are loaded before the first text is computed.

  Args:
    workdir: the folder of a run of the task "speech".
    files: paths, or file objects opened in binary mode.
    step: a number, "best", or None for the newest.
    beam_width: of the beam search. 1 means greedy decoding, and None means the
      run's config.eval.beam_width.

  Raises:
    ValueError: if there is no such run or step, if its task is another one, or
      if a file cannot be read or contains no sound.
  """
  if beam_width is not None and beam_width < 1:
    raise ValueError(f"{beam_width=}; must be >= 1")
  config, params, step = checkpoint.load(workdir, step)
  if config.task != "speech":
    raise ValueError(
      f"{workdir=}: a run of task {config.task!r}; must be 'speech'"
    )
  if beam_width is not None:
    config.eval.beam_width = beam_width
  audio = [_read(file, config.data.sample_rate) for file in files]
  return _texts(config, params, audio)


def _texts(config, params, audio):
  static = setup.graphdef(config)

  @jax.jit
  def predict(params, batch):
    return speech.predict(config, nnx.merge(static, params), batch)

  for audio_S in audio:
    samples = np.array([len(audio_S)], np.int32)
    padding = (0, _padded(config, len(audio_S)) - len(audio_S))
    batch = {"audio": np.pad(audio_S, padding)[None], "samples": samples}
    outputs = jax.device_get(predict(params, batch))
    yield speech.decode(config, {name: x[0] for name, x in outputs.items()})


def _padded(config, samples):
  """The number of samples to pad to, so that few shapes are compiled.

  It is the length of a bucket, or a multiple of the longest bucket's length.
  """
  edges = [int(x * config.data.sample_rate) for x in config.data.bucket_seconds]
  longer = (edges[-1] * times for times in itertools.count(2))
  return next(x for x in itertools.chain(edges, longer) if x >= samples)


def _read(file, sample_rate):
  if isinstance(file, (str, os.PathLike)) and not os.path.isfile(file):
    raise ValueError(f"{file}: no such file")
  try:
    audio_S = recordings.read(file, sample_rate)
  except Exception as error:  # errors of libsndfile and of the file system
    raise ValueError(f"{file}: cannot be read: {error}") from error
  if not len(audio_S):
    raise ValueError(f"{file}: holds no sound")
  return audio_S


def define_flags() -> None:
  """Defines the flags of `python -m sigattn transcribe`, except shared ones."""
  flags.DEFINE_integer(
    "beam_width",
    None,
    "Width of the beam search; 1 is greedy. The default is the run's own.",
  )


def run(flag_values: flags.FlagValues, files: list[str]) -> None:
  """Prints the text of each recording on its own line."""
  for text in transcribe(
    flag_values.workdir, files, flag_values.step, flag_values.beam_width
  ):
    print(text, flush=True)
