"""Random changes of training images: crops, shifts, flips and RandAugment.

Images are uint8 NumPy arrays, (B, H, W, C) or (H, W, C); C is 1 or 3.
"""

import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

GREY = 128  # fills what a moved image leaves empty
CROPS = ("none", "pad", "inception")


def train(
  images_BHWC: np.ndarray,
  size: int,
  augment: ConfigDict,
  rng: np.random.Generator,
) -> np.ndarray:
  """Crops to (B, size, size, C), flips and randomly augments.

  augment: the config's block of that name. rng: a NumPy Generator, from which
  each call draws anew.
  """
  if augment.crop == "inception":
    images = np.stack(
      [inception(x, size, augment.min_area, rng) for x in images_BHWC]
    )
  else:
    images = resize(images_BHWC, size, size)
  if augment.crop == "pad":
    images = shift(images, augment.pad, rng)
  if augment.flip:
    images = flip(images, rng)
  layers = augment.randaugment_layers
  if layers:
    magnitude = augment.randaugment_magnitude
    images = np.stack([randaugment(x, layers, magnitude, rng) for x in images])
  return images


def evaluate(images_BHWC: np.ndarray, size: int, crop: str) -> np.ndarray:
  """The middle, (B, size, size, C), where training crops; else a resize.

  The short side becomes 8/7 of `size` first: 256 for 224.
  """
  if crop != "inception":
    return resize(images_BHWC, size, size)
  height, width = images_BHWC.shape[1:3]
  factor = round(size * 8 / 7) / min(height, width)
  images = resize(images_BHWC, round(height * factor), round(width * factor))
  top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
  return images[:, top : top + size, left : left + size]


def resize(images_BHWC: np.ndarray, height: int, width: int) -> np.ndarray:
  """Bicubic; the images themselves where they have the size already."""
  if images_BHWC.shape[1:3] == (height, width):
    return images_BHWC
  images = [to_pillow(x).resize((width, height), _CUBIC) for x in images_BHWC]
  return np.stack([to_array(x) for x in images])


def inception(
  image_HWC: np.ndarray, size: int, min_area: float, rng: np.random.Generator
) -> np.ndarray:
  """A random part, (size, size, C): Szegedy et al. (1409.4842), section 6."""
  box = inception_box(*image_HWC.shape[:2], min_area, rng)
  image = to_pillow(image_HWC).resize((size, size), _CUBIC, box=box)
  return to_array(image)


def inception_box(
  height: int, width: int, min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) in pixels.

  A share of [min_area, 1] of the image's area with an aspect of 3/4 to 4/3;
  where ten draws do not fit, the largest middle part of such an aspect.
  """
  for _ in range(10):
    area = height * width * rng.uniform(min_area, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_width = round(math.sqrt(area * aspect))
    crop_height = round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      left = int(rng.integers(width - crop_width + 1))
      top = int(rng.integers(height - crop_height + 1))
      return left, top, left + crop_width, top + crop_height
  crop_width = min(width, round(height * 4 / 3))
  crop_height = min(height, round(width * 4 / 3))
  left, top = (width - crop_width) // 2, (height - crop_height) // 2
  return left, top, left + crop_width, top + crop_height


def shift(
  images_BHWC: np.ndarray, pad: int, rng: np.random.Generator
) -> np.ndarray:
  """Each image moved by up to `pad` pixels up or down and to a side; zeros."""
  batch, height, width, _ = images_BHWC.shape
  pad_widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = np.pad(images_BHWC, pad_widths)
  corners = rng.integers(2 * pad + 1, size=(batch, 2)).tolist()
  shifted = np.empty_like(images_BHWC)
  for i, (top, left) in enumerate(corners):
    shifted[i] = padded[i, top : top + height, left : left + width]
  return shifted


def flip(images_BHWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Every image left to right with probability 1/2."""
  is_flipped = rng.random(len(images_BHWC)) < 0.5
  return np.where(
    is_flipped[:, None, None, None], images_BHWC[:, :, ::-1], images_BHWC
  )


def randaugment(
  image_HWC: np.ndarray, layers: int, magnitude: float, rng: np.random.Generator
) -> np.ndarray:
  """`layers` random operations, each at magnitude / 10 of its range.

  Cubuk et al. (1909.13719); the ranges are those of AutoAugment
  (1805.09501), Table 6.
  """
  image = to_pillow(image_HWC)
  for name in rng.choice(list(OPERATIONS), size=layers):
    sign = rng.choice((-1, 1))
    image = OPERATIONS[name](image, sign * magnitude / 10)
  return to_array(image)


def _enhance(kind):
  return lambda image, m: kind(image).enhance(1 + 0.9 * m)


def _affine(image, *matrix):
  """matrix: (a, b, c, d, e, f); pixel (ax+by+c, dx+ey+f) moves to (x, y)."""
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, _NEAREST, fillcolor=_grey(image)
  )


def _rotate(image, m):
  return image.rotate(30 * m, _NEAREST, fillcolor=_grey(image))


def _grey(image):
  return (GREY,) * len(image.getbands())


_CUBIC, _NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
# name: f(image, m), with m from -1 to 1 where there are two directions; the
# others take its size alone.
OPERATIONS = {
  "identity": lambda image, _: image,
  "autocontrast": lambda image, _: ImageOps.autocontrast(image),
  "equalize": lambda image, _: ImageOps.equalize(image),
  "rotate": _rotate,
  "solarize": lambda image, m: ImageOps.solarize(image, 256 - 256 * abs(m)),
  "posterize": lambda image, m: ImageOps.posterize(
    image, 8 - round(4 * abs(m))
  ),
  "color": _enhance(ImageEnhance.Color),
  "contrast": _enhance(ImageEnhance.Contrast),
  "brightness": _enhance(ImageEnhance.Brightness),
  "sharpness": _enhance(ImageEnhance.Sharpness),
  "shear_x": lambda image, m: _affine(image, 1, 0.3 * m, 0, 0, 1, 0),
  "shear_y": lambda image, m: _affine(image, 1, 0, 0, 0.3 * m, 1, 0),
  # 150 of the 331 pixels of AutoAugment's images.
  "translate_x": lambda image, m: _affine(
    image, 1, 0, 150 / 331 * m * image.width, 0, 1, 0
  ),
  "translate_y": lambda image, m: _affine(
    image, 1, 0, 0, 0, 1, 150 / 331 * m * image.height
  ),
}


def to_pillow(image_HWC: np.ndarray) -> Image.Image:
  """An image of mode L or RGB, by the number of channels."""
  grey = image_HWC.shape[-1] == 1
  return Image.fromarray(image_HWC[..., 0] if grey else image_HWC)


def to_array(image: Image.Image) -> np.ndarray:
  """uint8 (H, W, C) of an image of mode L or RGB."""
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array
