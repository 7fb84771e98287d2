"""Writes small data sets in the form of MNIST."""

import gzip

import numpy as np

PREFIXES = {"train": "train", "test": "t10k"}


def content(array: np.ndarray) -> bytes:
  """An idx file of bytes: a magic number, big-endian sizes, and the array."""
  header = [0x800 + array.ndim, *array.shape]
  return np.array(header, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write(folder, **counts):
  """Writes noise in ten classes; counts: how many images each split has.

  The training files are compressed, as Debian's are.
  """
  folder.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)
  for split, count in counts.items():
    arrays = {
      "images-idx3": rng.integers(256, size=(count, 28, 28)),
      "labels-idx1": np.arange(count) % 10,
    }
    for name, array in arrays.items():
      file = f"{PREFIXES[split]}-{name}-ubyte"
      data = content(array)
      if split == "train":
        (folder / f"{file}.gz").write_bytes(gzip.compress(data))
      else:
        (folder / file).write_bytes(data)
  return folder
