"""Crops, shifts, flips and the operations of RandAugment."""

import numpy as np
import pytest

from sigattn.data import augment
from tests.data.pictures import picture, rng


def test_evaluation_crops_the_middle_where_training_crops():
  images = np.zeros((1, 320, 640, 3), np.uint8)
  images[:, 20:300, 180:460] = 255  # 224 / 256 of the height, in the middle
  cropped = augment.evaluate(images, 224, "inception")
  assert cropped.shape == (1, 224, 224, 3)
  assert cropped[:, 2:-2, 2:-2].min() == 255
  assert augment.evaluate(images, 224, "pad")[0, :, 0].max() == 0


def test_shift_moves_by_up_to_pad_and_fills_with_zeros():
  images = rng().integers(1, 256, size=(500, 6, 7, 2), dtype=np.uint8)
  shifted = augment.shift(images, 2, rng())
  padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
  offsets = []
  for i in range(500):
    offsets += [
      (y, x)
      for y in range(5)
      for x in range(5)
      if (shifted[i] == padded[i, y : y + 6, x : x + 7]).all()
    ]
  assert len(offsets) == 500
  assert len(set(offsets)) == 25
  assert np.abs(np.mean(offsets, axis=0) - 2).max() < 0.25


def test_flip_mirrors_half_of_the_images():
  images = rng().integers(256, size=(1000, 3, 4, 1), dtype=np.uint8)
  flipped = augment.flip(images, rng())
  same = (flipped == images).all((1, 2, 3))
  mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
  assert (same ^ mirrored).all()
  assert 450 < mirrored.sum() < 550


@pytest.mark.parametrize("shape", [(100, 100), (80, 120)])
def test_inception_box_keeps_to_its_area_and_aspect(shape):
  height, width = shape
  boxes = [augment.inception_box(*shape, 0.3, g) for g in [rng()] * 2000]
  left, top, right, bottom = np.array(boxes).T
  assert left.min() >= 0
  assert top.min() >= 0
  assert right.max() <= width
  assert bottom.max() <= height
  w, h = right - left, bottom - top
  area = w * h / (height * width)
  assert 0.29 < area.min() < 0.33
  assert area.max() > 0.8
  assert 0.72 < (w / h).min() < 0.78
  assert 1.3 < (w / h).max() < 1.36
  assert np.ptp(left) > 0.3 * width


def test_inception_box_of_an_image_too_long_is_its_middle():
  assert augment.inception_box(30, 900, 0.9, rng()) == (430, 0, 470, 30)
  assert augment.inception_box(1, 1, 0.08, rng()) == (0, 0, 1, 1)


def test_inception_resizes_the_box():
  image_HWC = picture(40, 50, 3)
  cropped = augment.inception(image_HWC, 16, 0.2, rng())
  left, top, right, bottom = augment.inception_box(40, 50, 0.2, rng())
  part = image_HWC[None, top:bottom, left:right]
  np.testing.assert_allclose(
    cropped, augment.resize(part, 16, 16)[0].astype(float), atol=40
  )
  assert (
    np.abs(cropped - augment.resize(part, 16, 16)[0].astype(int)).mean() < 3
  )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operation_keeps_the_kind_of_image_and_changes_it(name, channels):
  array = picture(32, 24, channels) // 2 + 30
  for m in (-1, 0, 0.5, 1):
    changed = augment.OPERATIONS[name](augment.to_pillow(array), m)
    changed = augment.to_array(changed)
    assert changed.shape == array.shape
    assert changed.dtype == np.uint8
  unchanged = name == "identity" or (name == "color" and channels == 1)
  assert (changed == array).all() == unchanged


# The operations that have a direction.
SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
SIGNED += ("color", "contrast", "brightness", "sharpness")


@pytest.mark.parametrize("name", SIGNED + ("solarize", "posterize"))
def test_operation_grows_with_its_magnitude(name):
  # The ramps make shifts visible, and the noise makes sharpening visible.
  y, x = np.mgrid[:64, :64]
  noise = rng().integers(16, size=(64, 64, 3))
  array = (np.stack([y, x, y + x], -1) + noise + 60).astype(np.uint8)
  change = []
  for m in (0, 0.3, 0.6, 1):
    changed = augment.OPERATIONS[name](augment.to_pillow(array), m)
    change.append(np.abs(augment.to_array(changed) - array.astype(int)).mean())
  assert change[0] == 0
  assert change == sorted(change)
  assert len(set(change)) >= 3
  other = augment.OPERATIONS[name](augment.to_pillow(array), -1)
  assert (augment.to_array(other) != augment.to_array(changed)).any() == (
    name in SIGNED
  )


def test_moved_image_leaves_grey_and_moves_as_far_as_it_should():
  array = np.zeros((331, 331, 1), np.uint8)
  moved = augment.OPERATIONS["translate_x"](augment.to_pillow(array), 1)
  assert (np.asarray(moved) == augment.GREY).sum() == 331 * 150


def test_randaugment_draws_every_operation_and_so_many_layers(monkeypatch):
  calls = []

  def spy(name):
    return lambda picture, m: calls.append((name, m)) or picture

  spies = {name: spy(name) for name in augment.OPERATIONS}
  monkeypatch.setattr(augment, "OPERATIONS", spies)
  generator = rng()
  for _ in range(200):
    augment.randaugment(np.zeros((4, 4, 3), np.uint8), 3, 9, generator)
  assert len(calls) == 600
  assert {name for name, _ in calls} == set(spies)
  assert len(spies) == 14
  assert {m for _, m in calls} == {-0.9, 0.9}
