"""Random views of images for self-supervised training, drawn on the devices.

The source reads each image once, as a square canvas. `draw` makes a view of it
inside of the training step. The random numbers follow from the seed and the
number of the step, so that a resumed run draws the same views, and a mesh draws
the same views as one device. dm_pix changes the colours.

This module is the SOURCE of such tasks; sigattn.data.image is that of others.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sigattn import extras
from sigattn.data import augment, image
from sigattn.validate import Field, flag, items, real, sequence, whole

extras.require("selfsup")

import dm_pix

EMBEDDED = image.EMBEDDED
_SHARE = real(low=0, high=1)
_FACTOR = real(low=0, below=1)  # a factor of 1 could turn an image black
_TWO_SHARES = sequence(items(_SHARE, _SHARE), "")._replace(
  is_right=items(_SHARE, _SHARE).is_right,
  wanted="must be 2 numbers from 0 to 1, one for each view",
)

# The fields that every recipe reads: crops and flips.
FIELDS: dict[str, Field] = {
  "data.canvas_size": whole(low=1, high=2**14),
  "augment.min_area": real(above=0, high=1),
  "augment.flip": flag(),
} | {
  path: field
  for path, field in image.FIELDS.items()
  if not path.startswith("augment.")
}
# The fields that recipes with two views read in addition.
COLOUR_FIELDS: dict[str, Field] = {
  "augment.jitter_share": _SHARE,
  "augment.brightness": _FACTOR,
  "augment.contrast": _FACTOR,
  "augment.saturation": _FACTOR,
  "augment.hue": real(low=0, high=0.5),
  "augment.grey_share": _SHARE,
  "augment.blur_shares": _TWO_SHARES,
  "augment.blur_size": real(low=0, high=1),
  "augment.solarize_shares": _TWO_SHARES,
}


def _canvas_holds_the_image(config):
  canvas, size = config.data.canvas_size, config.data.image_size
  if canvas < size:
    raise ValueError(
      f"config.data.canvas_size={canvas!r}; must be at least "
      f"config.data.image_size={size!r}: views are cut out of the canvas"
    )


RULES = (
  image.one_mean_and_std_per_channel,
  image.source_has_the_splits_and_classes,
  _canvas_holds_the_image,
)


class _Canvas:
  """Whole images: squares of canvas_size to train, of image_size to evaluate.

  If an image is not square, its centre is cut out.
  """

  def __init__(self, config):
    self._canvas = config.data.canvas_size
    self._size = config.data.image_size

  def train(self, images_BHWC, rng):
    del rng  # the devices draw the views
    return augment.centre(images_BHWC, self._canvas, self._canvas)

  def evaluate(self, images_BHWC):
    return augment.centre(images_BHWC, self._canvas, self._size)


def open_source(config: ConfigDict, split: str) -> image.Source:
  """Opens a split of config.data.source, as image.open_source does."""
  return image.open_source(config, split, _Canvas(config))


# On the devices.


def draw(
  config: ConfigDict, rng: jax.Array, images_BHWC: jax.Array, view: int = 0
) -> jax.Array:
  """Returns a random view of each image, float32 (B, size, size, C) in [0, 1].

  A view is a part of the image (`crop_box`), resized to config.data.image_size
  and mirrored in half of the cases. Recipes with two views then change its
  colours (`_colours`).

  images_BHWC: uint8. view: the number of the view, 0 or 1; blur and
  solarisation have a share for each.
  """
  size, options = config.data.image_size, config.augment
  change = [
    functools.partial(_crop, size=size, min_area=options.min_area),
  ]
  if options.flip:
    change.append(_sometimes(0.5, lambda rng, x: dm_pix.flip_left_right(x)))
  if "jitter_share" in options:
    change += _colours(options, view, size, images_BHWC.shape[-1])

  def one(rng, image_HWC):
    x = image_HWC.astype(jnp.float32) / 255
    keys = jax.random.split(rng, len(change))
    for key, step in zip(keys, change, strict=True):
      x = step(key, x)
    return x

  return jax.vmap(one)(jax.random.split(rng, len(images_BHWC)), images_BHWC)


def crop_box(rng: jax.Array, min_area: float) -> jax.Array:
  """A random part of an image: (top, left, height, width) as shares of it.

  The area is uniform in [min_area, 1] and the aspect ratio log-uniform in
  [3/4, 4/3] (1409.4842, Section 6). The result is the first of ten draws that
  fits, or the whole image if none fits.
  """
  area_rng, aspect_rng, place_rng = jax.random.split(rng, 3)
  area_10 = jax.random.uniform(area_rng, (10,), minval=min_area, maxval=1)
  edge = float(np.log(4 / 3))
  log_10 = jax.random.uniform(aspect_rng, (10,), minval=-edge, maxval=edge)
  sides_10_2 = jnp.sqrt(
    jnp.stack([area_10 * jnp.exp(-log_10), area_10 * jnp.exp(log_10)], -1)
  )
  fits_10 = (sides_10_2 <= 1).all(-1)
  sides_2 = jnp.where(fits_10.any(), sides_10_2[fits_10.argmax()], 1.0)
  corner_2 = jax.random.uniform(place_rng, (2,)) * (1 - sides_2)
  return jnp.concatenate([corner_2, sides_2])


def _crop(rng, image_HWC, *, size, min_area):
  canvas, channels = image_HWC.shape[0], image_HWC.shape[-1]
  box_4 = crop_box(rng, min_area)
  scale_2 = size / (canvas * box_4[2:])
  cut = jax.image.scale_and_translate(
    image_HWC, (size, size, channels), (0, 1), scale_2,
    -box_4[:2] * canvas * scale_2, "cubic",
  )  # fmt: skip
  return cut.clip(0, 1)  # cubic interpolation overshoots


def _colours(options, view, size, channels):
  """The colour changes of SimCLR (2002.05709) and BYOL (2006.07733), App. B.

  Brightness, contrast, saturation and hue change together, in this order, in
  jitter_share of the images; then grey, blur with a standard deviation from 0.1
  to 2 pixels, and solarisation at 0.5. Grey images have no saturation and hue,
  and stay grey.
  """
  colour = channels == 3
  changes = [
    _sometimes(
      options.jitter_share, functools.partial(_jitter, options, colour)
    )
  ]
  if colour:
    changes.append(_sometimes(options.grey_share, _grey))
  blur, solarize = options.blur_shares[view], options.solarize_shares[view]
  radius = round(options.blur_size * size / 2)
  if blur and radius:
    changes.append(_sometimes(blur, functools.partial(_blur, 2 * radius + 1)))
  if solarize:
    changes.append(_sometimes(solarize, _solarize))
  return changes


def _sometimes(share: float, change: Callable) -> Callable:
  """Makes the change in `share` of the cases."""

  def maybe(rng, x):
    coin_rng, rng = jax.random.split(rng)
    return jnp.where(jax.random.bernoulli(coin_rng, share), change(rng, x), x)

  return maybe


def _jitter(options, colour, rng, x):
  brightness, contrast, saturation, hue = jax.random.uniform(
    rng, (4,), minval=-1, maxval=1
  )
  x = dm_pix.adjust_brightness(x, options.brightness * brightness)
  x = dm_pix.adjust_contrast(x, 1 + options.contrast * contrast)
  if colour:
    # These two convert to HSV, which needs colours from 0 to 1.
    x = x.clip(0, 1)
    x = dm_pix.adjust_saturation(x, 1 + options.saturation * saturation)
    x = dm_pix.adjust_hue(x.clip(0, 1), options.hue * hue)
  return x.clip(0, 1)


def _grey(rng, x):
  del rng
  return dm_pix.rgb_to_grayscale(x, keep_dims=True)


def _blur(kernel_size, rng, x):
  sigma = jax.random.uniform(rng, minval=0.1, maxval=2.0)
  return dm_pix.gaussian_blur(x, sigma, kernel_size)


def _solarize(rng, x):
  del rng
  return dm_pix.solarize(x, 0.5)
