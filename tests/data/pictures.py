"""Small image configs, pictures and batches for the tests of images."""

import contextlib

import numpy as np
import pyarrow.parquet
from PIL import Image

from configs import vit
from sigattn import tasks
from sigattn.data import augment

AUGMENTED = {
  "augment.crop": "pad",
  "augment.flip": True,
  "augment.randaugment_layers": 1,
}


def make(**values):
  """A config of the embedded data set with batches of 8, not augmented."""
  config = vit.get_config()
  config.batch_size = 8
  config.augment.update(crop="none", flip=False)
  config.update_from_flattened_dict(values)
  return config


def local(path, **values):
  """A config of a local folder with two classes, with batches of 4."""
  config = make(batch_size=4)
  config.data.update(source=str(path), num_classes=2, channels=3, image_size=16)
  config.data.update(mean=(0.5,) * 3, std=(0.5,) * 3)
  config.update_from_flattened_dict(values)
  return config


def take(config, count):
  """The first training batches of a config."""
  with contextlib.closing(tasks.train_batches(config)) as data:
    return [next(data) for _ in range(count)]


def equal(batches, others):
  """Asserts that two sequences of batches are equal."""
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name])


def rng(seed=0):
  return np.random.default_rng(seed)


def picture(height, width, channels, seed=0):
  """A picture of 4 x 4 smoothed blocks of random colours, uint8 (H, W, C).

  It is smooth enough to survive resizing, and has no symmetry.
  """
  small = rng(seed).integers(256, size=(4, 4, channels), dtype=np.uint8)
  return augment.resize(small[None], height, width)[0]


def save(path, array, mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).convert(mode).save(path)


def name_file(parquet, column, file):
  """Lets each row of a parquet file name a file instead of holding bytes."""
  table = pyarrow.parquet.read_table(parquet)
  place = table.schema.get_field_index(column)
  rows = [{"bytes": None, "path": file}] * len(table)
  field = table.schema.field(place)
  changed = pyarrow.array(rows, field.type)
  table = table.set_column(place, field, changed)
  pyarrow.parquet.write_table(table, parquet)
