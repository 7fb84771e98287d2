"""Random views: ranges, repetition, grey images, and unchanged images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mae, simclr
from sigattn.data import views
from tests.data.pictures import picture

KEY = jax.random.key(0)
COLOUR = {"data.channels": 3, "data.mean": (0.5,) * 3, "data.std": (0.5,) * 3}


def images(channels, side=28):
  return np.stack([picture(side, side, channels, seed) for seed in range(6)])


def draw(config, x, key=KEY, view=0):
  return jax.jit(lambda key, x: views.draw(config, key, x, view))(key, x)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_colours_that_differ_and_repeat(channels):
  config = simclr.get_config("runlocal")
  config.data.update(canvas_size=28, image_size=20)
  config.augment.update(
    jitter_share=1.0, grey_share=1.0, blur_shares=(1.0, 1.0),
    solarize_shares=(0.5, 0.5),
  )  # fmt: skip
  if channels == 3:
    config.update_from_flattened_dict(COLOUR)
  function = jax.jit(lambda key, x: views.draw(config, key, x))
  first, again, other = (
    function(key, images(channels)) for key in (KEY, KEY, jax.random.key(1))
  )
  assert first.shape == (6, 20, 20, channels)
  assert first.dtype == jnp.float32
  assert 0 <= first.min() < first.max() <= 1
  np.testing.assert_array_equal(first, again)
  assert all(abs(first - other).max(axis=(1, 2, 3)) > 0.01)
  # grey_share is 1, so colour images become grey.
  np.testing.assert_allclose(first, first[..., :1].repeat(channels, -1))


def test_nothing_is_changed_where_nothing_is_set():
  """A box with the area 1 fits the image only if its aspect ratio is 1."""
  config = mae.get_config("runlocal")
  config.augment.update(min_area=1.0, flip=False)
  x = images(1)
  np.testing.assert_allclose(draw(config, x), x / 255, atol=1e-6)


def test_boxes_have_the_areas_and_ratios_of_the_paper_and_lie_inside():
  keys = jax.random.split(KEY, 2000)
  boxes = jax.jit(jax.vmap(lambda key: views.crop_box(key, 0.2), out_axes=1))(
    keys
  )
  top, left, height, width = np.asarray(boxes)
  area, ratio = height * width, width / height
  assert 0.2 <= area.min() < 0.22
  assert area.max() <= 1
  assert 0.75 - 1e-5 <= ratio.min() < 0.77
  assert 1.31 < ratio.max() <= 4 / 3 + 1e-5
  assert min(top.min(), left.min()) >= 0
  assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6


def test_a_view_shows_the_part_that_its_box_names():
  """A view of a ramp has the values at the edges of the box."""
  ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
  x = np.broadcast_to(ramp[None, :, None], (64, 64, 1))[None]
  config = mae.get_config("runlocal")
  config.data.update(canvas_size=64, image_size=28)
  config.augment.flip = False
  view = np.asarray(draw(config, x))[0, :, :, 0]
  # `draw` gives this key to the first change of the first image.
  [key] = jax.random.split(jax.random.split(KEY, 1)[0], 1)
  box = jax.jit(views.crop_box, static_argnums=1)(key, config.augment.min_area)
  _, left, _, width = np.asarray(box)
  centres = left + width * (np.arange(28) + 0.5) / 28
  expected = (centres * 64 - 0.5) / 63
  np.testing.assert_allclose(view[:, 2:-2].mean(0), expected[2:-2], atol=0.01)
