"""Reads labelled images and turns them into batches of arrays.

config.data.source is the name of an embedded data set, a local folder of
images, of parquet files or of the four files of MNIST (sigattn/data/mnist.py),
or the name of a data set on the Hugging Face Hub. The class of an image is its
folder, or a column called label, which holds ClassLabels, integers from 0 on,
or names.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image, ImageOps, UnidentifiedImageError

from sigattn.data import augment, hub, loader, mnist
from sigattn.validate import choice, flag, real, sequence, text, whole

# {name: (file, number of images of each split, number of classes)}. The
# validation split is the end of the train split.
EMBEDDED = {
  # The licence is beside the file.
  "fashion_mnist": (
    "fashion_mnist.npz",
    {
      "train": 10_000,
      "train_without_validation": 9_000,
      "validation": 1_000,
      "test": 2_000,
    },
    10,
  ),
}
_MODES = {1: "L", 3: "RGB"}  # {number of channels: Pillow's mode}
_NOT_HELD_OUT = (
  ". No images are held out by themselves: divide them into the folders "
  "train/<class> and test/<class>"
)
_LOOKED_AT = 8  # images of a source, to see whether they have colour


FIELDS = {
  "data.source": text(),
  "data.train_split": text(),
  "data.eval_split": text(),
  "data.image_size": whole(low=1, high=2**14),
  "data.channels": choice(_MODES),
  "data.num_classes": whole(low=1, high=2**20),
  "data.max_pixels": whole(low=1, high=2**31),
  "data.max_corrupt_share": real(low=0, high=1),
  "data.mean": sequence(real(-1e6, 1e6), "numbers from -1e6 to 1e6"),
  "data.std": sequence(real(1e-6, 1e6), "numbers from 1e-6 to 1e6"),
  "augment.crop": choice(augment.CROPS),
  "augment.pad": whole(low=0, high=2**14),
  "augment.min_area": real(above=0, high=1),
  "augment.flip": flag(),
  "augment.randaugment_layers": whole(low=0, high=100),
  "augment.randaugment_magnitude": real(low=0, high=10),
}


def one_mean_and_std_per_channel(config: ConfigDict) -> None:
  """A rule: config.data.mean and std must fit config.data.channels."""
  channels = config.data.channels
  for name in ("mean", "std"):
    values = config.data[name]
    if len(values) != channels:
      raise ValueError(
        f"config.data.{name}={values!r}; must be {channels} numbers, one for "
        f"each channel (config.data.channels={channels})"
      )


def _shift_leaves_a_part(config):
  pad, size = config.augment.pad, config.data.image_size
  if config.augment.crop == "pad" and pad > size:
    raise ValueError(
      f"config.augment.pad={pad!r}; must be at most config.data.image_size="
      f"{size!r}: a larger shift leaves nothing of the image"
    )


def source_has_the_splits_and_classes(config: ConfigDict) -> None:
  """A rule: the config must fit what is known of the source before reading.

  The columns and classes of a folder are known only after it has been opened.
  _Decoded validates them then.
  """
  source = config.data.source
  splits, num_classes = _splits_and_classes(source)
  for key in ("train_split", "eval_split"):
    if config.data[key] not in splits:
      raise ValueError(
        f"config.data.{key}={config.data[key]!r}; choose from {sorted(splits)}"
        + _NOT_HELD_OUT * (key == "eval_split" and hub.local(source).is_dir())
      )
  if num_classes is not None:
    _validate_num_classes(config, num_classes)
  if source in EMBEDDED:
    hub.validate_no_validation_in_training(config.data)
    split = config.data.train_split
    count = EMBEDDED[source][1][split]
    loader.validate_batch_size(config, count, f"{split!r} of {source}")


RULES = (
  one_mean_and_std_per_channel,
  _shift_leaves_a_part,
  source_has_the_splits_and_classes,
)


def _validate_num_classes(config, num_classes, also=""):
  """also: what else is wrong with the config, for the error."""
  if config.data.num_classes != num_classes:
    raise ValueError(
      f"config.data.num_classes={config.data.num_classes!r}; must be "
      f"{num_classes}, the number of classes in {config.data.source}{also}"
    )


def _why_batch_size_is_wrong(config, split, count):
  """What is wrong with the size of the batches of a split of this length."""
  if split == config.data.train_split:
    try:
      loader.validate_batch_size(config, count, f"{split!r}")
    except ValueError as error:
      return f"; {error}"
  return ""


def _splits_and_classes(source):
  """(names of the splits, number of classes, or None if it is not known)."""
  if source in EMBEDDED:
    file, *splits_and_classes = EMBEDDED[source]
    hub.embedded(source, file)
    return splits_and_classes
  if mnist.is_source(source):
    return mnist.SPLITS, None
  builder = hub.builder(source, EMBEDDED)
  features = builder.info.features
  if features is None:
    return hub.splits(builder), None
  label = features[_image_and_label_columns(source, features)[1]]
  return hub.splits(builder), getattr(label, "num_classes", None)


def _image_and_label_columns(source, features):
  """The names of the columns that hold the images and their classes."""
  import datasets

  image = hub.column(
    source,
    features,
    "Image",
    lambda x: hub.is_encoded(x, datasets.Image),
    ("image", "img"),
  )
  label = features.get("label")
  if not any(isinstance(x, datasets.ClassLabel) for x in features.values()):
    if _is_integer(label) or _is_string(label):
      return image, "label"
    _validate_depth(source)
  return image, hub.column(
    source,
    features,
    "ClassLabel",
    lambda x: isinstance(x, datasets.ClassLabel),
    ("label",),
  )


def _is_integer(feature):
  return getattr(feature, "dtype", "").startswith(("int", "uint"))


def _is_string(feature):
  return getattr(feature, "dtype", "") in ("string", "large_string")


def _validate_depth(source):
  """Raises ValueError for a folder of images that does not show their classes.

  `datasets` uses the folder of an image as its class only if all images are
  equally deep in the tree of folders.
  """
  folder = hub.local(source)
  depths = {}
  for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
    is_image = path.suffix.lower() in Image.registered_extensions()
    path = path.relative_to(folder)
    if is_image and not any(x.startswith((".", "__")) for x in path.parts):
      depths.setdefault(len(path.parts), []).append(str(path))
  if len(depths) > 1:
    [fewest, *_, usual] = sorted(depths.values(), key=len)
    raise ValueError(
      f"config.data.source={source!r}; all images must lie equally deep, as in "
      f"train/<class>/x.png: {fewest[0]!r} does not lie as deep as {usual[0]!r}"
    )


def open_source(
  config: ConfigDict, split: str, transform: Any = None
) -> "Source":
  """Opens a split of config.data.source.

  transform: makes batches of the images that were read. It has the methods
  train(images_BHWC, rng) and evaluate(images_BHWC). By default it crops and
  augments as config.augment says. Raises ValueError if the source has no such
  split or cannot be read.
  """
  source = config.data.source
  transform = transform or _Augmented(config)
  if source in EMBEDDED:
    hub.validate_split(source, split, EMBEDDED[source][1])
    return _Embedded(config, split, transform)
  if mnist.is_source(source):
    hub.validate_split(source, split, mnist.SPLITS)
    return _Mnist(config, split, transform)
  builder = hub.builder(source, EMBEDDED)
  hub.validate_split(source, split, hub.splits(builder))
  return _Decoded(config, split, transform, hub.table(source, builder, split))


class _Augmented:
  """Crops and augments as config.augment says."""

  def __init__(self, config):
    self._size = config.data.image_size
    # A copy, so that later changes of the config have no effect on this split.
    self._augment = config.augment.copy_and_resolve_references()

  def train(self, images_BHWC, rng):
    return augment.train(images_BHWC, self._size, self._augment, rng)

  def evaluate(self, images_BHWC):
    return augment.evaluate(images_BHWC, self._size, self._augment.crop)


class Source(loader.ExampleSource):
  """A split of images, and the transform that crops and augments them."""

  def __init__(self, transform: Any):
    self._transform = transform

  def train(
    self, indices_B: np.ndarray, rng: np.random.Generator
  ) -> loader.Batch:
    """Returns a batch of augmented images and their classes.

    {"image": uint8 (B, size, size, C), "target": int32 (B,)}
    """
    images, targets, read_B = self._read(indices_B)
    batch = {"image": self._transform.train(images, rng), "target": targets}
    return batch | self.marks(indices_B, read_B)

  def evaluate(self, indices_B: np.ndarray) -> loader.Batch:
    """Returns a batch like that of `train`, but without random augmentation."""
    images, targets, read_B = self._read(indices_B)
    batch = {"image": self._transform.evaluate(images), "target": targets}
    return batch | self.marks(indices_B, read_B)


class _InMemory(Source):
  """Grey images (M, H, W) uint8 and their classes (M,) in two arrays."""

  in_memory = True

  def __init__(self, config, transform, images, targets):
    super().__init__(transform)
    # With three channels, each of them is a copy of the grey image.
    self._images = np.repeat(images[..., None], config.data.channels, axis=-1)
    self._targets = targets.astype(np.int32)

  def __len__(self):
    return len(self._targets)

  def _read(self, indices_B):
    return self._images[indices_B], self._targets[indices_B], indices_B


class _Embedded(_InMemory):
  def __init__(self, config, split, transform):
    name = config.data.source
    file, counts, _ = EMBEDDED[name]
    part = "test" if split == "test" else "train"
    begin = counts["train_without_validation"] if split == "validation" else 0
    rows = slice(begin, begin + counts[split])
    with np.load(hub.embedded(name, file)) as arrays:
      images, targets = (arrays[f"{x}_{part}"][rows] for x in "xy")
    super().__init__(config, transform, images, targets)


class _Mnist(_InMemory):
  def __init__(self, config, split, transform):
    data = config.data
    images, targets = mnist.read(data.source, split, data.max_pixels)
    if targets.max() >= data.num_classes:
      raise ValueError(
        f"config.data.num_classes={data.num_classes!r}; must be at least "
        f"{targets.max() + 1}: {data.source} has that many classes"
      )
    super().__init__(config, transform, images, targets)


class _Decoded(Source):
  in_memory = False

  def __init__(self, config, split, transform, table):
    super().__init__(transform)
    import datasets

    source, features = config.data.source, table.features
    self._origin = f"config.data.source={source!r}, split {split!r}"
    self._image_column, label = _image_and_label_columns(source, features)
    self._source, self._channels = source, config.data.channels
    self._max_pixels = config.data.max_pixels
    self._num_classes = config.data.num_classes
    names = _class_names(config, features[label], label)
    # To open a source may take seconds, so both errors are named at once.
    also = _why_batch_size_is_wrong(config, split, len(table))
    _validate_num_classes(config, len(names), also)
    self._labels = _labels(table[label][:], names)
    self._warn_of_missing(names)
    # The images stay encoded here. Pillow decodes them in grain's workers, so
    # that our errors name the row.
    self._table = table.select_columns([self._image_column])
    if isinstance(features[self._image_column], datasets.Image):
      self._table = self._table.cast_column(
        self._image_column, datasets.Image(decode=False)
      )
    self.max_corrupt = int(config.data.max_corrupt_share * len(table))
    if self._channels == 1 and split == config.data.train_split:
      self._warn_of_lost_colour()

  def _warn_of_lost_colour(self):
    """Warns if any of a few images from the whole split has colour."""
    for row in range(0, len(self), max(len(self) // _LOOKED_AT, 1)):
      try:
        rgb_HWC = self._decoded(row, channels=3)
      except Exception:  # Reading the examples says what is wrong with it.
        continue
      if (rgb_HWC != rgb_HWC[..., :1]).any():
        logging.warning(
          "config.data.channels=1; the images of config.data.source=%r have "
          "colour, which the model does not see. To keep it, add "
          "--config.data.channels=3 '--config.data.mean=(0.5, 0.5, 0.5)' "
          "'--config.data.std=(0.5, 0.5, 0.5)'", self._source
        )  # fmt: skip
        return

  def _warn_of_missing(self, names):
    present = set(self._labels)
    missing = [str(x) for i, x in enumerate(names) if i not in present]
    if missing:
      logging.warning(
        "%s: has no image of %d of the %d classes: %s",
        self._origin, len(missing), len(names), ", ".join(missing[:20])
      )  # fmt: skip

  def __len__(self):
    return len(self._table)

  def _read(self, indices_1):
    """Image (1, H, W, C) and target (1,) of one index, and the index read.

    Images of different sizes do not fit into one array, so this reads one at a
    time. If an image is corrupt, the next readable one replaces it.
    """
    [row], count = indices_1.tolist(), len(self)
    others = ((row + i) % count for i in range(count))
    row, (image, label) = self.first_readable(others, self._example)
    return image[None], np.array([label], np.int32), np.array([row])

  def why_corrupt(self, index: int) -> str:
    try:
      self._example(index)
    except loader.CorruptExampleError as error:
      return str(error)
    return f"{self._origin}, row {index}: was readable at the second attempt"

  def _example(self, row):
    label = self._labels[row]
    if label not in range(self._num_classes):
      raise ValueError(
        f"{self._origin}, row {row}: {label=} is no class; the "
        f"classes are 0 to {self._num_classes - 1}"
      )
    try:
      array = self._decoded(row, self._channels)
    except Exception as error:  # Pillow raises a dozen kinds of errors.
      image = hub.encoded(self._table[row][self._image_column])
      why = loader.why_unreadable(self._origin, row, image, error)
      raise loader.CorruptExampleError(why) from error
    return array, label

  def _decoded(self, row, channels):
    image = hub.encoded(self._table[row][self._image_column])
    if image["bytes"] is None:
      image = image | {"path": hub.file_of(self._source, image["path"])}
    return decode(image, channels, self._max_pixels)


def _class_names(config, feature, column):
  """The name of each class.

  feature: the type of the column of labels. If it holds strings, the classes
  are the strings in the splits of the config, in alphabetical order.
  """
  import datasets

  if isinstance(feature, datasets.ClassLabel):
    return feature.names
  if _is_integer(feature):
    return range(config.data.num_classes)
  data, names = config.data, set()
  for split in (data.train_split, data.eval_split):
    table = hub.table(data.source, hub.builder(data.source, EMBEDDED), split)
    names.update(table.unique(column))
  return sorted(x for x in names if x is not None)


def class_names(config: ConfigDict) -> list[str] | None:
  """The names of the classes by their number; None if they are only numbers.

  Raises ValueError if config.data.source cannot be read.
  """
  source = config.data.source
  if source in EMBEDDED or mnist.is_source(source):
    return None
  builder = hub.builder(source, EMBEDDED)
  features = hub.table(source, builder, config.data.train_split).features
  label = _image_and_label_columns(source, features)[1]
  names = _class_names(config, features[label], label)
  return None if isinstance(names, range) else list(names)


def _labels(values, names):
  """The classes as numbers (rows,); -1 for a name that is no class."""
  number = {name: i for i, name in enumerate(names)}
  return np.array(
    [number.get(x, -1) if isinstance(x, str) else x for x in values], object
  )


def decode(
  encoded: Mapping[str, Any], channels: int, max_pixels: int
) -> np.ndarray:
  """Decodes an image to uint8 (H, W, channels).

  encoded: {"bytes": content of a file, "path": str}; the file at the path is
  read if the bytes are None. channels: 1 or 3. max_pixels: the largest image. A
  file of a few kilobytes may claim to have more pixels, and would need
  gigabytes. Raises ValueError for a file that is no image, and for an image
  with more pixels, with more than 8 bits per channel, or with several frames.
  """
  content = encoded["bytes"]
  file = encoded["path"] if content is None else io.BytesIO(content)
  if max_pixels > (Image.MAX_IMAGE_PIXELS or max_pixels):
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit
  try:
    image = Image.open(file)  # reads only the header
  except UnidentifiedImageError:
    raise ValueError("is no image of a format that Pillow reads") from None
  with image:
    width, height = image.size
    if width * height > max_pixels:
      raise ValueError(
        f"{width} x {height} pixels; may have config.data.max_pixels="
        f"{max_pixels}"
      )
    frames = getattr(image, "n_frames", 1)
    # A camera's MPO is a JPEG with a preview.
    if frames > 1 and image.format != "MPO":
      raise ValueError(f"{frames} frames: must be one image")
    if image.mode.startswith(("I", "F")):
      raise ValueError(f"mode {image.mode}: must have 8 bits per channel")
    # A photograph may be stored rotated, with its orientation as metadata.
    image = ImageOps.exif_transpose(image)
    return augment.to_array(image.convert(_MODES[channels]))
