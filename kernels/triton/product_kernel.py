"""Triton kernels for the residual stream, and for a matrix times one row of it.

If only a few rows are decoded, each small operation between two products takes
as long as it takes to start a kernel. Before a product these operations are the
sum that adds the last product to the residual stream, and the norms. After it
there is the MLP's activation phi:

  s = x + norm(y)
  h = norm(s)
  out = phi(W h)

`residual` computes s and h for any number of rows. `product` computes all three
for one row. Its time is that of reading W, so each program has time to compute
s and h itself. norm is RMSNorm (1910.07467), norm(s) = r(s) s * scale, where
r(s) is a number. Since W norm(s) = r(s) W (s * scale), the squares of s can be
added up while W is read. The squares of y were added up by the `product` that
computed y: each of its programs wrote a part to `squares`. So no program waits
for another one.

y and both norms can be absent. An epsilon of None means that there is no norm.
"""

import triton
import triton.language as tl


@triton.jit
def residual(
  x, y, y_scale, x_scale,
  out, stream,
  INPUTS: tl.constexpr, BLOCK_IN: tl.constexpr, ADDS: tl.constexpr,
  X_EPSILON: tl.constexpr, Y_EPSILON: tl.constexpr,
):  # fmt: skip
  """s and h of a row. Scales are (INPUTS,), all other arrays (B, INPUTS)."""
  i = tl.arange(0, BLOCK_IN)
  mask = i < INPUTS
  row = tl.cast(tl.program_id(0), tl.int64) * INPUTS
  factor = 1.0
  if Y_EPSILON is not None:
    added = tl.load(y + row + i, mask=mask, other=0.0).to(tl.float32)
    factor = _factor(tl.sum(added * added, 0), INPUTS, Y_EPSILON)
  s = _stream(x + row, y + row, y_scale, factor, i, INPUTS, ADDS, Y_EPSILON)
  if ADDS:
    tl.store(stream + row + i, s, mask=mask)
  h = s.to(tl.float32)
  if X_EPSILON is not None:
    scale = tl.load(x_scale + i, mask=mask, other=0.0)
    h *= _factor(tl.sum(h * h, 0), INPUTS, X_EPSILON) * scale
  tl.store(out + row + i, h.to(out.dtype.element_ty), mask=mask)


@triton.jit
def product(
  x, y, y_squares, y_scale, x_scale, weight,
  out, squares, stream,
  INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_OUT: tl.constexpr,
  BLOCK_IN: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
  BLOCK_PARTS: tl.constexpr, ADDS: tl.constexpr, X_EPSILON: tl.constexpr,
  Y_EPSILON: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
  """BLOCK_OUT numbers of out. The first program also writes s.

  Arrays: x, y, stream (INPUTS,); weight (OUTPUTS, INPUTS), with swiglu
  (2 OUTPUTS, INPUTS), the rows of gate and then those of up; out (OUTPUTS,);
  y_squares (PARTS,); squares (programs,).
  """
  o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
  # The tensor cores are not used: one row would leave most of their tile empty.
  acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
  acc_up = acc
  total = tl.zeros((BLOCK_IN,), tl.float32)
  factor = 1.0
  if Y_EPSILON is not None:
    part = tl.arange(0, BLOCK_PARTS)
    shares = tl.load(y_squares + part, mask=part < PARTS, other=0.0)
    factor = _factor(tl.sum(shares, 0), INPUTS, Y_EPSILON)
  for first in tl.range(0, INPUTS, BLOCK_IN, num_stages=STAGES):
    i = first + tl.arange(0, BLOCK_IN)
    # A matrix may have more numbers than an int32 can count.
    places = o.to(tl.int64)[:, None] * INPUTS + i[None, :]
    mask = (o[:, None] < OUTPUTS) & (i[None, :] < INPUTS)
    w = tl.load(weight + places, mask=mask, other=0.0)
    s = _stream(x, y, y_scale, factor, i, INPUTS, ADDS, Y_EPSILON)
    if ADDS:
      is_mine = (i < INPUTS) & (tl.program_id(0) == 0)
      tl.store(stream + i, s, mask=is_mine)
    h = s.to(tl.float32)
    total += h * h
    if X_EPSILON is not None:
      h *= tl.load(x_scale + i, mask=i < INPUTS, other=0.0)
    acc += w.to(tl.float32) * h[None, :]
    if ACTIVATION == "swiglu":
      up_places = tl.cast(OUTPUTS, tl.int64) * INPUTS + places
      up = tl.load(weight + up_places, mask=mask, other=0.0)
      acc_up += up.to(tl.float32) * h[None, :]
  z, up = tl.sum(acc, 1), tl.sum(acc_up, 1)
  if X_EPSILON is not None:
    factor = _factor(tl.sum(total, 0), INPUTS, X_EPSILON)
    z *= factor
    up *= factor
  result = _activated(z, up, ACTIVATION).to(out.dtype.element_ty)
  tl.store(out + o, result, mask=o < OUTPUTS)
  rounded = tl.where(o < OUTPUTS, result.to(tl.float32), 0.0)
  tl.store(squares + tl.program_id(0), tl.sum(rounded * rounded, 0))


@triton.jit
def _stream(
  x, y, y_scale, factor, i, INPUTS: tl.constexpr, ADDS: tl.constexpr,
  Y_EPSILON: tl.constexpr,
):  # fmt: skip
  """s = x + norm(y) of the inputs i, rounded like the residual stream."""
  s = tl.load(x + i, mask=i < INPUTS, other=0.0)
  if ADDS:
    added = tl.load(y + i, mask=i < INPUTS, other=0.0)
    if Y_EPSILON is not None:
      scale = tl.load(y_scale + i, mask=i < INPUTS, other=0.0)
      added = (added.to(tl.float32) * factor * scale).to(s.dtype)
    s += added
  return s


@triton.jit
def _factor(squares, INPUTS: tl.constexpr, EPSILON: tl.constexpr):
  """The factor r of RMSNorm, given the sum of the squares."""
  return tl.rsqrt(squares / INPUTS + EPSILON)


@triton.jit
def _activated(z, up, ACTIVATION: tl.constexpr):
  """phi(z), see layers.Mlp."""
  if ACTIVATION == "swiglu":
    z = z / (1.0 + tl.exp(-z)) * up
  elif ACTIVATION == "gelu_exact":
    z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
  elif ACTIVATION == "gelu":
    inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)
    z = z / (1.0 + tl.exp(-2.0 * inner))
  return z
