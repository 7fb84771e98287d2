"""Data sets in the four files of MNIST: what is read and what is refused."""

import gzip

import numpy as np
import pytest

from sigattn import tasks
from tests.data import idx
from tests.data.pictures import make


@pytest.fixture
def folder(tmp_path):
  return idx.write(tmp_path / "mine", train=20, test=12)


def read(folder, split="test", **values):
  config = make(**{"data.source": str(folder)}, **values)
  return list(tasks.eval_batches(config, split))


def test_images_and_classes_are_read_plain_and_compressed(folder):
  for split, count in (("train", 20), ("test", 12)):
    batches = read(folder, split)
    target, weight = (
      np.concatenate([batch[name] for batch in batches])
      for name in ("target", "weight")
    )
    np.testing.assert_array_equal(target[:count], np.arange(count) % 10)
    assert weight.sum() == count
  raw = (folder / "t10k-images-idx3-ubyte").read_bytes()[16:]
  pixels = np.concatenate([batch["image"] for batch in read(folder)])
  assert pixels[:12].tobytes() == raw


def test_damaged_files_are_refused_by_name(folder):
  path = folder / "t10k-images-idx3-ubyte"
  whole = path.read_bytes()
  header, huge = bytearray(whole[:16]), np.array([2**31], ">u4").tobytes()
  damaged = {
    "is no idx file of 3 axes": b"\x00\x00\x0d\x03" + whole[4:],  # floats
    "is no idx file": whole[:7],
    "does not hold its 9408 bytes": whole[:-1],
    "9408 bytes": whole + b"\x00",
    "and 4294967296 bytes": bytes(header[:4]) + huge + bytes(header[8:]),
    "max_pixels": bytes(header[:8]) + huge + huge,
  }
  for message, content in damaged.items():
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
      read(folder)
    assert str(path) in str(error.value)
  path.unlink()
  with pytest.raises(ValueError, match=r"data\.source=.*lacks t10k-images"):
    read(folder)


def test_a_cut_archive_is_refused(folder):
  path = folder / "train-labels-idx1-ubyte.gz"
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(ValueError, match="labels-idx1-ubyte.gz: cannot be read"):
    read(folder, "train")


def test_an_archive_is_not_unpacked_beyond_what_its_header_says(folder):
  path = folder / "train-labels-idx1-ubyte.gz"
  bomb = idx.content(np.arange(20) % 10) + bytes(10**6)
  path.write_bytes(gzip.compress(bomb))
  with pytest.raises(ValueError, match="does not hold its 20 bytes"):
    read(folder, "train")


def test_numbers_that_do_not_fit_are_refused(folder):
  path = folder / "t10k-labels-idx1-ubyte"
  path.write_bytes(idx.content(np.zeros(11)))
  with pytest.raises(ValueError, match="12 images and 11 classes"):
    read(folder)
  path.write_bytes(idx.content(np.full(12, 10)))
  with pytest.raises(ValueError, match=r"num_classes=10; must be at least 11"):
    read(folder)
