"""Positions of tokens: sine tables, rotary embedding, CAPE, ALiBi slopes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def sincos_1d(length: int, width: int) -> np.ndarray:
  """The table of sines and cosines of 1706.03762, section 3.5.

  table[t] = [sin(t w_0), ..., sin(t w_{m-1}), cos(t w_0), ..., cos(t w_{m-1})]
  with m = width / 2 and w_i = 10000^(-i / m).

  Returns (length, width) float32. Raises ValueError for an odd width.
  """
  return _sincos(np.arange(length), width)


def sincos_2d(rows: int, columns: int, width: int) -> np.ndarray:
  """The table of sines and cosines for a grid of patches, as in MoCo v3.

  The first half of the width is sincos_1d of a patch's row, the second half of
  its column (2104.02057). The patches are in raster order.

  rows, columns: size of the grid, in patches. width: of the table, a multiple
  of 4. Returns (rows * columns, width) float32. Raises ValueError for another
  width.
  """
  if width % 4:
    raise ValueError(f"{width=}; must be a multiple of 4")
  place_P2 = grid(rows, columns)
  return np.concatenate(
    [_sincos(place_P2[:, i], width // 2) for i in range(2)], axis=1
  )


def grid(rows: int, columns: int) -> np.ndarray:
  """(row, column) of each patch in raster order, (rows * columns, 2) int."""
  return np.stack(np.indices((rows, columns)), axis=-1).reshape(-1, 2)


def _sincos(positions, width):
  angles = np.outer(positions, _frequencies(width))
  table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  return table.astype(np.float32)


def _frequencies(width):
  if width % 2:
    raise ValueError(f"{width=}; must be even")
  half = width // 2
  return 10000.0 ** (-np.arange(half) / half)


def sincos(positions: jax.Array, width: int) -> jax.Array:
  """The row of sincos_1d's table for each position, which may be fractional.

  Returns (*positions.shape, width) float32. Raises ValueError for odd widths.
  """
  angles = positions[..., None] * jnp.asarray(
    _frequencies(width), jnp.float32
  ).reshape((1,) * positions.ndim + (-1,))
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def cape(
  rng: jax.Array | None,
  lengths_B: jax.Array,
  length: int,
  max_shift: float,
  max_local_shift: float,
  max_scale: float,
) -> jax.Array:
  """Continuous augmented positions (CAPE, 2106.03143), an input of `sincos`.

  (t - mean + global shift + local shift_t) * scale, where t = 0..length - 1
  and the mean is over the lengths_B tokens that are not padding. The global
  shift of an example is uniform in +-max_shift, the local shift of a token in
  +-max_local_shift, and the logarithm of the scale in +-log(max_scale). If rng
  is None, there are no shifts and the scale is 1.

  Returns (B, length) float32.
  """
  t_BT = jnp.arange(length, dtype=jnp.float32)[None]
  t_BT = t_BT - (lengths_B[:, None].astype(jnp.float32) - 1) / 2
  if rng is None:
    return t_BT
  keys = jax.random.split(rng, 3)

  def uniform(key, shape, limit):
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

  one_B1 = (len(lengths_B), 1)
  t_BT = t_BT + uniform(keys[0], one_B1, max_shift)
  t_BT = t_BT + uniform(keys[1], t_BT.shape, max_local_shift)
  return t_BT * jnp.exp(uniform(keys[2], one_B1, math.log(max_scale)))


def rope(
  x_BTNH: jax.Array,
  positions: ArrayLike,
  base: float = 10000.0,
  share: float = 1.0,
) -> jax.Array:
  """Rotary embedding (2104.09864): q_s . k_t then depends on s - t alone.

  Feature i is paired with feature i + H / 2, as in GPT-NeoX (not with its
  neighbour, as in the paper), and the pair is rotated by the angle
  positions[t] base^(-2 i / H). Position 0 is not rotated.

  positions: (T,) or (B, T), whole numbers or not. share: the share of the
  features that are rotated, which are the first ones; H in the formula is then
  their number (2204.06745 rotates 1/4). Returns x's shape and dtype; computes
  in float32. Raises ValueError if the number of features to rotate is odd.
  """
  width = round(share * x_BTNH.shape[-1])
  if width % 2:
    raise ValueError(
      f"x_BTNH.shape={x_BTNH.shape}, {share=}; must turn an "
      "even number of features"
    )
  if width < x_BTNH.shape[-1]:
    turned = rope(x_BTNH[..., :width], positions, base)
    return jnp.concatenate([turned, x_BTNH[..., width:]], axis=-1)
  angles = rope_angles(positions, width, base)[:, :, None, :]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BTNH.dtype)


def rope_angles(positions: ArrayLike, width: int, base: float) -> jax.Array:
  """The angles by which rope rotates `width` features.

  Returns (B or 1, T, width / 2).
  """
  half = width // 2
  frequencies = jnp.asarray(base ** (-np.arange(half) / half), jnp.float32)
  positions = jnp.atleast_2d(jnp.asarray(positions, jnp.float32))
  return jnp.einsum("BT,H->BTH", positions, frequencies)


def rope_2d(
  x_BTNH: jax.Array, positions: ArrayLike, base: float = 10000.0
) -> jax.Array:
  """Rotary embedding in two dimensions, for patches.

  The first half of the head width is rotated by the row, the second half by the
  column. q . k then depends only on the offset in rows and in columns.

  positions: (T, 2), row and column. (0, 0) is not rotated. It is the position
  of a token without a place, such as a class token; the patches then begin at
  (1, 1). Returns x's shape and dtype. Raises ValueError unless H is a multiple
  of 4.
  """
  if x_BTNH.shape[-1] % 4:
    raise ValueError(f"x_BTNH.shape={x_BTNH.shape}; H must be a multiple of 4")
  halves = jnp.split(x_BTNH, 2, axis=-1)
  return jnp.concatenate(
    [rope(half, positions[:, i], base) for i, half in enumerate(halves)],
    axis=-1,
  )


def alibi_slopes(num_heads: int) -> np.ndarray:
  """The slope of each head's linear distance penalty (2108.12409).

  If N is a power of two, they are 2^(-8 h / N), h = 1..N. Otherwise they are
  the slopes of the power of two below N, followed by every other slope of the
  power of two above it.

  Returns (N,) float32.
  """
  below = 2 ** (num_heads.bit_length() - 1)
  slopes = _geometric(below)
  if below < num_heads:
    between = _geometric(2 * below)[::2]
    slopes = np.concatenate([slopes, between[: num_heads - below]])
  return slopes.astype(np.float32)


def _geometric(count):
  return 2.0 ** (-8 * np.arange(1, count + 1) / count)
