"""Numerical choices of 16-bit kernels: the form of the sigmoid, and scales."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sigattn.kernels.problem import Problem, has_8_bits

# The smallest logit bias at which the tanh form is exact enough.
_TANH_BIAS = {
  "bfloat16": {"plain": -11.0, "decaying": -9.0},
  "float16": {"plain": -9.0, "decaying": math.inf},
}


def exact_sigmoid(problem: Problem) -> bool:
  """Whether a 16-bit kernel must keep the relative precision of small weights.

  With the hardware's tanh, sigmoid(z) = 0.5 + 0.5 tanh(z / 2) costs one slow
  operation; 1 / (1 + exp(-z)) costs two, or one and a half with the polynomial
  of mosaic/registers.py. But near -1 a float32 tanh has steps of 6e-8. If the
  weights are about e^b, their sum over a row loses this share on average
  (V = 1, measured on an H200):

    b     -9.7  -11.1  -13.9  -16     rounding a bfloat16 output
    loss  4e-4  6e-4   5e-3   1.2e-1  1.4e-3

  So tanh is used for b >= -11. By default, these are key lengths up to 60,000.
  With ALiBi the weights of a row decay to nothing, and each has the same
  absolute loss: 7e-4 of the sum at b = -9. So ALiBi's bound is -9, and it holds
  only if a query sees a key at distance 0. The gradient of a slope magnifies
  the loss by the distance. With logit vectors, weights decay in the same way
  and have the same bound. This assumes that a row keeps some weights above
  1e-5, beside which the lost ones do not matter. float16 rounds eight times
  finer than bfloat16. If the bias is an array, its values are not known, and
  the exact form is used.
  """
  if problem.logit_bias is None:
    return True
  alibi = problem.shapes.alibi_slopes is not None
  vectors = problem.shapes.query_logit_bias, problem.shapes.key_logit_bias
  has_vectors = any(x is not None for x in vectors)
  # A normalised row is divided by its own sum, which may be small: for example,
  # if segments hide all near keys. An offset that is an array may put all keys
  # far away.
  moves = problem.shapes.query_offset is not None
  if alibi and (moves or _nearest(problem) > 0):
    return True
  decays = alibi or has_vectors
  if decays and problem.normalize:
    return True
  bounds = _TANH_BIAS[problem.dtype]
  return problem.logit_bias < bounds["decaying" if decays else "plain"]


def float16_scales(problem: Problem, headroom: int) -> tuple[float, float]:
  """(weight_scale, dz_scale), powers of two against underflow in float16.

  A kernel multiplies weights and gradients of logits by them before it rounds
  to 16 bits, and divides the sums by them. Both are 1 in other dtypes.

  Normal numbers begin at 2^-14 = e^-9.7, and sigmoid's weights are at most 1.
  So weight_scale is 2^14. The size of dz = phi'(z) (do v^T) depends on do v^T.
  Typical weights are about e^b. For them dz_scale makes dz about 2^-headroom
  times do v^T; it is at most 2^12. Squares of relu leave the range from 256 on,
  so they are divided by the normalizer at once.

  The forward pass takes these scales with normalised rows, too, because it
  divides by their sums after the products. The backward pass divides before
  them, and takes scales_of_shares.
  """
  if problem.dtype == "float16" and problem.kind == "sigmoid":
    bias = problem.logit_bias
    if bias is None:
      bias = -math.log(problem.key_len)
    return 2.0**14, _dz_scale(-bias / math.log(2), headroom)
  if problem.dtype == "float16" and problem.kind == "relu2":
    return 2.0 ** -max(round(math.log2(problem.normalizer)), 0), 1.0
  return 1.0, 1.0


def scales_of_shares(problem: Problem, headroom: int) -> tuple[float, float]:
  """float16_scales of the backward pass of normalised rows.

  That pass rounds the shares phi / sum phi and the gradients dz = phi'
  (do v^T - do . out) / sum phi. Whatever the kind, a share is at most 1, and
  typically about 1 / S. The sum s of a row is that of phi / n, where n is the
  normalizer. So the implementations divide 1 / s and the shift by n. Otherwise
  shares and dz would be n times as large, and the share of the only key in a
  row, n, may exceed 65,504.
  """
  if problem.dtype != "float16":
    return 1.0, 1.0
  return 2.0**14, _dz_scale(math.log2(problem.key_len), headroom)


def _dz_scale(bits, headroom):
  """The dz_scale if typical weights are 2^-bits."""
  return 2.0 ** min(max(round(bits) - headroom, 0), 12)


def wide(dtype: DTypeLike) -> jnp.dtype:
  """The dtype of logits and sums: float64 for float64 inputs, else float32.

  Unlike jnp.promote_types it also works if the user forbids promotions.
  """
  dtype = jnp.dtype(dtype)
  return dtype if dtype == "float64" else jnp.dtype("float32")


def widened(
  query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(key, value), in the query's dtype if they are a cache in 8 bits."""
  if has_8_bits(query, key, value):
    return key.astype(query.dtype), value.astype(query.dtype)
  return key, value


def _nearest(problem):
  """The smallest distance that ALiBi sees between a query and a visible key."""
  offset = problem.distance_offset
  left, right = (math.inf if x is None else x for x in problem.bounds)
  return max(offset - right, -offset - left, 0)


def inverse(sums: jax.Array) -> jax.Array:
  """1 / sums, and 0 for a row whose weights are all 0."""
  return jnp.where(sums > 0, 1 / jnp.where(sums > 0, sums, 1), 0)


def inverse_and_shift(
  out: jax.Array, sums: jax.Array, d_sums: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(1 / s, do . out / s - ds) of each row, (B, T, N) float32 each.

  The gradient of the logits of a normalised row, out = p v / s, is
  phi'(z) (do v^T / s - shift), where ds is the cotangent of the sum s.

  out, d_out: (B, T, N, H). sums, d_sums: s and ds, (B, T, N).
  """
  dtype = wide(out.dtype)
  product = (d_out.astype(dtype) * out.astype(dtype)).sum(-1)
  inverse_of_sums = inverse(sums)
  return inverse_of_sums, product * inverse_of_sums - d_sums


def row_share(
  problem: Problem, sums: jax.Array, d_sums: jax.Array
) -> jax.Array:
  """The part of a normalised row's sum of dz that is no sum over its pairs.

  For sigmoid the implementations sum -p^2 (do v^T / s - shift) instead of dz,
  see xla.py. The part that is missing is ds s. Returns (B, N, T) float32, which
  is 0 for other kinds.

  sums, d_sums: (B, T, N), s and its cotangent.
  """
  share = jnp.moveaxis(sums * d_sums, 1, 2)
  return share if problem.kind == "sigmoid" else jnp.zeros_like(share)
