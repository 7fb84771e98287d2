"""Small speech configs and recordings for the tests of speech."""

import io

import datasets
import numpy as np
import soundfile

from configs import speech_sigmoid


def small(**values):
  """A speech model of width 16 and one layer."""
  config = speech_sigmoid.get_config("runlocal")
  config.model.depth = 1
  config.update_from_flattened_dict(values)
  return config


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(1, 3, shape).astype(np.float32)


def encode_audio(audio, rate, kind="WAV"):
  """A file object with the audio in a format of libsndfile."""
  content = io.BytesIO()
  soundfile.write(content, audio, rate, format=kind)
  content.seek(0)
  return content


def recording(seconds, rate=8000, channels=1):
  """The bytes of a FLAC file of noise."""
  audio = noise(int(seconds * rate), channels) / 20
  return encode_audio(np.clip(audio, -1, 1), rate, "FLAC").getvalue()


def write_folder(path, rows):
  """Writes (encoded audio, text) rows as both splits of a data set.

  Returns the config's values for it.
  """
  table = datasets.Dataset.from_list(
    [
      {"audio": {"bytes": content, "path": "x"}, "text": text}
      for content, text in rows
    ]
  ).cast_column("audio", datasets.Audio(decode=False))
  for split in ("train", "test"):
    table.to_parquet(path / f"{split}.parquet")
  return {"data.source": str(path)}
