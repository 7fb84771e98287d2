"""Random augmentation of training images: crops, shifts, flips, RandAugment.

Images are uint8 NumPy arrays, (B, H, W, C) or (H, W, C), with C = 1 or 3.
"""

import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

GREY = 128  # fills the area that a moved image leaves empty
CROPS = ("none", "pad", "inception")


def train(
  images_BHWC: np.ndarray,
  size: int,
  augment: ConfigDict,
  rng: np.random.Generator,
) -> np.ndarray:
  """Crops to (B, size, size, C), flips and augments each image at random.

  augment: config.augment. rng: the generator of all random numbers; each call
  advances it.
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
  """Crops or resizes to (B, size, size, C) without randomness.

  crop: config.augment.crop. With "inception", the short side is resized to
  8/7 of `size` (256 for 224) and the centre is cut out. Otherwise the whole
  image is resized.
  """
  if crop != "inception":
    return resize(images_BHWC, size, size)
  return centre(images_BHWC, round(size * 8 / 7), size)


def centre(images_BHWC: np.ndarray, short_side: int, size: int) -> np.ndarray:
  """Resizes the short side and cuts out the centre, (B, size, size, C).

  short_side: its length afterwards in pixels, at least `size`.
  """
  height, width = images_BHWC.shape[1:3]
  factor = short_side / min(height, width)
  images = resize(images_BHWC, round(height * factor), round(width * factor))
  top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
  return images[:, top : top + size, left : left + size]


def resize(images_BHWC: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes by bicubic interpolation, (B, height, width, C).

  Images that already have this size are returned as they are.
  """
  if images_BHWC.shape[1:3] == (height, width):
    return images_BHWC
  images = [to_pillow(x).resize((width, height), _CUBIC) for x in images_BHWC]
  return np.stack([to_array(x) for x in images])


def inception(
  image_HWC: np.ndarray, size: int, min_area: float, rng: np.random.Generator
) -> np.ndarray:
  """Resizes a random part of the image to (size, size, C).

  Szegedy et al. (1409.4842), section 6. min_area: see inception_box.
  """
  box = inception_box(*image_HWC.shape[:2], min_area, rng)
  image = to_pillow(image_HWC).resize((size, size), _CUBIC, box=box)
  return to_array(image)


def inception_box(
  height: int, width: int, min_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """Returns a random crop as (left, top, right, bottom) in pixels.

  The crop's area is uniform in [min_area, 1] times the image's area, and its
  aspect ratio is log-uniform in [3/4, 4/3]. If ten draws do not fit into the
  image, the crop is the largest centred one with such an aspect ratio.
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
  """Moves each image by up to `pad` pixels along both axes; fills with 0."""
  batch, height, width, _ = images_BHWC.shape
  pad_widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = np.pad(images_BHWC, pad_widths)
  corners = rng.integers(2 * pad + 1, size=(batch, 2)).tolist()
  shifted = np.empty_like(images_BHWC)
  for i, (top, left) in enumerate(corners):
    shifted[i] = padded[i, top : top + height, left : left + width]
  return shifted


def flip(images_BHWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors each image horizontally with probability 1/2."""
  is_flipped = rng.random(len(images_BHWC)) < 0.5
  return np.where(
    is_flipped[:, None, None, None], images_BHWC[:, :, ::-1], images_BHWC
  )


def randaugment(
  image_HWC: np.ndarray, layers: int, magnitude: float, rng: np.random.Generator
) -> np.ndarray:
  """Applies RandAugment: `layers` random operations, one after the other.

  Cubuk et al. (1909.13719). Each operation acts with magnitude / 10 of its
  range; the ranges are those of AutoAugment (1805.09501), Table 6.
  """
  image = to_pillow(image_HWC)
  for name in rng.choice(list(OPERATIONS), size=layers):
    sign = rng.choice((-1, 1))
    image = OPERATIONS[name](image, sign * magnitude / 10)
  return to_array(image)


def _enhance(kind):
  return lambda image, m: kind(image).enhance(1 + 0.9 * m)


def _affine(image, *matrix):
  """Moves pixel (ax+by+c, dx+ey+f) to (x, y); matrix: (a, b, c, d, e, f)."""
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, _NEAREST, fillcolor=_grey(image)
  )


def _rotate(image, m):
  return image.rotate(30 * m, _NEAREST, fillcolor=_grey(image))


def _grey(image):
  return (GREY,) * len(image.getbands())


_CUBIC, _NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
# {name: f(image, m)}. m lies in [-1, 1]; its sign is the direction. Operations
# without a direction use only |m|, or nothing.
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
  # AutoAugment moves its images of 331 pixels by up to 150 pixels.
  "translate_x": lambda image, m: _affine(
    image, 1, 0, 150 / 331 * m * image.width, 0, 1, 0
  ),
  "translate_y": lambda image, m: _affine(
    image, 1, 0, 0, 0, 1, 150 / 331 * m * image.height
  ),
}


def to_pillow(image_HWC: np.ndarray) -> Image.Image:
  """Converts to a Pillow image: mode L for one channel, RGB for three."""
  grey = image_HWC.shape[-1] == 1
  return Image.fromarray(image_HWC[..., 0] if grey else image_HWC)


def to_array(image: Image.Image) -> np.ndarray:
  """Converts a Pillow image of mode L or RGB to uint8 (H, W, C)."""
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array
