"""Labelled images: where they come from, and how they become arrays.

Three kinds of config.data.source: an embedded set, a local folder of images
or of parquet files, and a data set of the Hugging Face Hub.
"""

import io
import math
import pathlib

import numpy as np
from PIL import Image, ImageOps

from sigattn import check as checks
from sigattn.data import augment, hub

_FOLDER = pathlib.Path(__file__).parent / "embedded"
EMBEDDED = {  # name: file, splits, classes
  # 10,000 and 2,000 of its images; its licence lies beside it.
  "fashion_mnist": (_FOLDER / "fashion_mnist.npz", ("train", "test"), 10),
}
_MODES = {1: "L", 3: "RGB"}  # Pillow's names, by the number of channels


def check(config):
  """ValueError for a bad value of config.data or of what augments an image.

  Looks up what the source offers, without loading it. The columns and classes
  of a folder are known only once it is opened.
  """
  checks.number(config, "data.image_size", low=1)
  checks.choice(config, "data.channels", _MODES)
  checks.number(config, "data.num_classes", low=1)
  _check_moments(config)
  checks.choice(config, "augment.crop", augment.CROPS)
  checks.number(config, "augment.pad", low=0)
  checks.number(config, "augment.min_area", above=0, high=1)
  checks.number(config, "augment.randaugment_layers", low=0)
  checks.number(config, "augment.randaugment_magnitude", low=0, high=10)
  splits, classes = _offers(config.data.source)
  checks.choice(config, "data.train_split", splits)
  checks.choice(config, "data.eval_split", splits)
  if classes is not None:
    _check_classes(config, classes)


def _check_moments(config):
  channels = config.data.channels
  for name in ("mean", "std"):
    values = config.data[name]
    if len(values) != channels:
      raise ValueError(
        f"config.data.{name}={values!r}; must be {channels} numbers, one for "
        "each of config.data.channels"
      )
    low = -math.inf if name == "mean" else 0
    if not all(low < value < math.inf for value in values):
      wanted = "finite" if name == "mean" else "finite and > 0"
      raise ValueError(f"config.data.{name}={values!r}; must be {wanted}")


def _check_classes(config, classes):
  if config.data.num_classes != classes:
    raise ValueError(
      f"config.data.num_classes={config.data.num_classes!r}; must be "
      f"{classes}, as in {config.data.source}"
    )


def _offers(source):
  """The names of the splits, and the number of classes or None if unknown."""
  if source in EMBEDDED:
    return EMBEDDED[source][1:]
  builder = hub.builder(source, EMBEDDED)
  features = builder.info.features
  if features is None:
    return hub.splits(builder), None
  return hub.splits(builder), features[
    _columns(source, features)[1]
  ].num_classes


def _columns(source, features):
  """The names of the columns with the images and with their classes."""
  import datasets

  return (
    hub.column(source, features, datasets.Image, ("image", "img")),
    hub.column(source, features, datasets.ClassLabel, ("label",)),
  )


def open_source(config, split):
  """The Source of a split. ValueError where there is no such split."""
  source = config.data.source
  if source in EMBEDDED:
    hub.check_split(source, split, EMBEDDED[source][1])
    return _Embedded(config, split)
  builder = hub.builder(source, EMBEDDED)
  hub.check_split(source, split, hub.splits(builder))
  return _Decoded(config, split, hub.table(source, builder, split))


class Source:
  """A split of images, cropped, resized and augmented as the config says."""

  in_memory: bool  # else images are read and decoded, one at a time
  buckets = None  # all have one shape

  def __init__(self, config):
    self._size = config.data.image_size
    # A copy, which stays as it is when a notebook changes the config.
    self._augment = config.augment.copy_and_resolve_references()

  def train(self, indices_B, rng):
    """uint8 `image` (B, size, size, C), augmented, and int32 `label` (B,)."""
    images, labels = self._read(indices_B)
    images = augment.train(images, self._size, self._augment, rng)
    return {"image": images, "label": labels}

  def evaluate(self, indices_B):
    """The same without randomness."""
    images, labels = self._read(indices_B)
    images = augment.evaluate(images, self._size, self._augment.crop)
    return {"image": images, "label": labels}


class _Embedded(Source):
  in_memory = True

  def __init__(self, config, split):
    super().__init__(config)
    with np.load(EMBEDDED[config.data.source][0]) as arrays:
      images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    # Grey copied to each channel where three are asked for.
    self._images = np.repeat(images[..., None], config.data.channels, axis=-1)
    self._labels = labels.astype(np.int32)

  def __len__(self):
    return len(self._labels)

  def _read(self, indices_B):
    return self._images[indices_B], self._labels[indices_B]


class _Decoded(Source):
  in_memory = False

  def __init__(self, config, split, table):
    super().__init__(config)
    import datasets

    source, features = config.data.source, table.features
    self._image, self._label = _columns(source, features)
    self._channels = config.data.channels
    self._classes = features[self._label].num_classes
    _check_classes(config, self._classes)
    # Undecoded: Pillow is at work in grain's processes, with our errors.
    self._table = table.select_columns([self._image, self._label]).cast_column(
      self._image, datasets.Image(decode=False)
    )
    self._where = f"config.data.source={source!r}, split {split!r}"

  def __len__(self):
    return len(self._table)

  def _read(self, indices_1):
    """Of one index alone, since sizes differ: (1, H, W, C) and (1,)."""
    [row] = indices_1.tolist()
    example = self._table[row]
    image, label = example[self._image], example[self._label]
    if label not in range(self._classes):
      raise ValueError(f"{self._where}, row {row}: {label=} is no class")
    try:
      array = decode(image, self._channels)
    except Exception as error:  # Pillow's are of a dozen kinds.
      path = image and image["path"]
      raise ValueError(
        f"{self._where}, row {row}, {path=}: {error!r}"
      ) from error
    return array[None], np.array([label], np.int32)


def decode(encoded, channels):
  """uint8 (H, W, channels) of a dict with `bytes` or, where None, `path`."""
  content = encoded["bytes"]
  file = encoded["path"] if content is None else io.BytesIO(content)
  with Image.open(file) as image:
    if image.mode.startswith(("I", "F")):
      raise ValueError(f"mode {image.mode}: not 8 bits a channel")
    image = ImageOps.exif_transpose(image)  # a camera held upright
    return augment.to_array(image.convert(_MODES[channels]))
