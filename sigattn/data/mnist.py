"""Reads the four files of MNIST, Fashion-MNIST and other sets of that form.

The folder must have train-images-idx3-ubyte, train-labels-idx1-ubyte,
t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each plain or as .gz. The
Debian package dataset-fashion-mnist installs such a folder,
/usr/share/datasets/fashion-mnist.
"""

import gzip
import math
import zlib

import numpy as np

from sigattn.data import hub

SPLITS = {"train": "train", "test": "t10k"}
_MOST_BYTES = 2**32  # the largest size of one unpacked file


def is_source(source: str) -> bool:
  """Whether `source` is a folder with such files."""
  return _file(source, "train-images-idx3-ubyte") is not None


def _file(source, name):
  folder = hub.local(source)
  paths = (folder / name, folder / f"{name}.gz")
  return next((path for path in paths if path.is_file()), None)


def read(
  source: str, split: str, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
  """The images (M, H, W) and their classes (M,) of a split, both uint8.

  split: a key of SPLITS. max_pixels: the largest image that is allowed. Raises
  ValueError for a file that is missing, is damaged or holds something else.
  """
  prefix = SPLITS[split]
  images = _idx(source, f"{prefix}-images-idx3-ubyte", 3, max_pixels)
  targets = _idx(source, f"{prefix}-labels-idx1-ubyte", 1, max_pixels)
  if not len(images) == len(targets) > 0:
    raise ValueError(
      f"config.data.source={source!r}; {split!r} has {len(images)} images and "
      f"{len(targets)} classes: must have one class for each image, and at "
      "least one image"
    )
  return images, targets


def _idx(source, name, ndim, max_pixels):
  """The array of one file: a header of big-endian sizes, and the bytes."""
  path = _file(source, name)
  if path is None:
    raise ValueError(f"config.data.source={source!r}; lacks {name}[.gz]")
  opened = gzip.open if path.suffix == ".gz" else open
  try:
    with opened(path, "rb") as file:
      header = file.read(4 + 4 * ndim)
      if len(header) < 4 + 4 * ndim or header[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(f"is no idx file of {ndim} axes of bytes")
      shape = tuple(np.frombuffer(header[4:], ">u4").tolist())
      size = math.prod(shape)
      if size > _MOST_BYTES or math.prod(shape[1:]) > max_pixels:
        raise ValueError(
          f"says that it has the shape {shape}; must have at most config.data."
          f"max_pixels={max_pixels} in an image, and {_MOST_BYTES} bytes"
        )
      content = file.read(size + 1)
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise ValueError(f"{path}: cannot be read: {error}") from error
  if len(content) != size:
    raise ValueError(f"{path}: does not hold its {size} bytes")
  return np.frombuffer(content, np.uint8).reshape(shape)
