"""The Triton kernel of a product of a matrix and a few rows.

With so few rows all time goes into reading the matrix, and everything small
that stands before and after the product costs as much time as a kernel of its
own takes to start. So this kernel does it too:

  s = x + norm(y)          the residual stream, to which the last product is
                           added; y and its norm can be absent
  out = phi(W norm(s))     the norm can be absent; phi is the MLP's activation

norm is RMSNorm (1910.07467), norm(s) = r(s) s * scale with one number r(s) of
a row. It changes places with the product, W norm(s) = r(s) W (s * scale), so
that the squares of s are added up beside the product. Those of y were added up
by the kernel that computed it: each of its programs left its share in
`squares`, and no program waits for another one.

Every program computes all of s, which is small, and BLOCK_OUT numbers of each
row of out. The first program writes s down.

Arrays: x, y, stream (ROWS, INPUTS); weight (OUTPUTS, INPUTS), with swiglu the
gate's rows and then those of up, (2 OUTPUTS, INPUTS); out (ROWS, OUTPUTS);
y_squares (PARTS, ROWS) and squares (programs, ROWS) float32; x_scale, y_scale
(INPUTS,).
"""

import triton
import triton.language as tl


@triton.jit
def product(
  x, y, y_squares, y_scale, x_scale, weight,
  out, squares, stream,
  ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
  BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
  STAGES: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
  ADDS: tl.constexpr, X_EPSILON: tl.constexpr, Y_EPSILON: tl.constexpr,
  ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """out = phi(W norm(x + norm(y))) of BLOCK_OUT outputs.

  An epsilon of None means that there is no such norm.
  """
  o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
  if ROWS == 1:
    row, o_axes, is_out = 0, o, o < OUTPUTS
    acc, acc_up, total = _of_one_row(
      x, y, y_squares, y_scale, x_scale, weight, stream, o, INPUTS, OUTPUTS,
      BLOCK_OUT, BLOCK_IN, STAGES, PARTS, BLOCK_PARTS, ADDS, X_EPSILON,
      Y_EPSILON, ACTIVATION,
    )  # fmt: skip
  else:
    row = tl.arange(0, BLOCK_ROWS)[None, :]
    o_axes, is_out = o[:, None], (o[:, None] < OUTPUTS) & (row < ROWS)
    acc, acc_up, total = _of_rows(
      x, y, y_squares, y_scale, x_scale, weight, stream, o, row, ROWS, INPUTS,
      OUTPUTS, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, STAGES, PARTS, BLOCK_PARTS,
      ADDS, X_EPSILON, Y_EPSILON, ACTIVATION, PRECISION,
    )  # fmt: skip
  if X_EPSILON is not None:
    factor = tl.rsqrt(total / INPUTS + X_EPSILON)
    acc *= factor
    acc_up *= factor
  result = _activated(acc, acc_up, ACTIVATION).to(out.dtype.element_ty)
  tl.store(out + row * OUTPUTS + o_axes, result, mask=is_out)
  rounded = tl.where(is_out, result.to(tl.float32), 0.0)
  share = tl.sum(rounded * rounded, 0)
  place = squares + tl.program_id(0) * ROWS
  if ROWS == 1:
    tl.store(place, share)
  else:
    rows = tl.arange(0, BLOCK_ROWS)
    tl.store(place + rows, share, mask=rows < ROWS)


@triton.jit
def _of_one_row(
  x, y, y_squares, y_scale, x_scale, weight, stream, o,
  INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_OUT: tl.constexpr,
  BLOCK_IN: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
  BLOCK_PARTS: tl.constexpr, ADDS: tl.constexpr, X_EPSILON: tl.constexpr,
  Y_EPSILON: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
  """(W s, W_up s, sum of s^2): (BLOCK_OUT,) each, and a number.

  Products of single numbers, which are added up at the end: a row would leave
  most of a tensor core's tile empty.
  """
  acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
  acc_up = acc
  total = tl.zeros((BLOCK_IN,), tl.float32)
  factor = 1.0
  if Y_EPSILON is not None:
    part = tl.arange(0, BLOCK_PARTS)
    shares = tl.load(y_squares + part, mask=part < PARTS, other=0.0)
    factor = tl.rsqrt(tl.sum(shares, 0) / INPUTS + Y_EPSILON)
  for first in tl.range(0, INPUTS, BLOCK_IN, num_stages=STAGES):
    i = first + tl.arange(0, BLOCK_IN)
    places = o[:, None] * INPUTS + i[None, :]
    mask = (o[:, None] < OUTPUTS) & (i[None, :] < INPUTS)
    w = tl.load(weight + places, mask=mask, other=0.0)
    s = _stream(
      x, y, y_scale, stream, factor, i, i, i < INPUTS, INPUTS, ADDS, Y_EPSILON
    )
    s = s.to(tl.float32)
    total += s * s
    if X_EPSILON is not None:
      s *= tl.load(x_scale + i, mask=i < INPUTS, other=0.0)
    acc += w.to(tl.float32) * s[None, :]
    if ACTIVATION == "swiglu":
      up = tl.load(weight + OUTPUTS * INPUTS + places, mask=mask, other=0.0)
      acc_up += up.to(tl.float32) * s[None, :]
  return tl.sum(acc, 1), tl.sum(acc_up, 1), tl.sum(total, 0)


@triton.jit
def _of_rows(
  x, y, y_squares, y_scale, x_scale, weight, stream, o, row,
  ROWS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
  BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
  STAGES: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
  ADDS: tl.constexpr, X_EPSILON: tl.constexpr, Y_EPSILON: tl.constexpr,
  ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """As _of_one_row: (BLOCK_OUT, BLOCK_ROWS) each, and (1, BLOCK_ROWS)."""
  acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
  acc_up = acc
  total = tl.zeros((BLOCK_IN, BLOCK_ROWS), tl.float32)
  factor = 1.0
  if Y_EPSILON is not None:
    part = tl.arange(0, BLOCK_PARTS)[:, None]
    shares = tl.load(
      y_squares + part * ROWS + row, mask=(part < PARTS) & (row < ROWS),
      other=0.0,
    )  # fmt: skip
    factor = tl.rsqrt(tl.sum(shares, 0) / INPUTS + Y_EPSILON)[None, :]
  for first in tl.range(0, INPUTS, BLOCK_IN, num_stages=STAGES):
    i = first + tl.arange(0, BLOCK_IN)
    places = o[:, None] * INPUTS + i[None, :]
    mask = (o[:, None] < OUTPUTS) & (i[None, :] < INPUTS)
    w = tl.load(weight + places, mask=mask, other=0.0)
    is_in = (i[:, None] < INPUTS) & (row < ROWS)
    s = _stream(
      x, y, y_scale, stream, factor, row * INPUTS + i[:, None], i[:, None],
      is_in, INPUTS, ADDS, Y_EPSILON,
    )  # fmt: skip
    if X_EPSILON is not None:
      wide = s.to(tl.float32)
      total += wide * wide
      scale = tl.load(x_scale + i, mask=i < INPUTS, other=0.0)
      s = (wide * scale[:, None]).to(w.dtype)
    acc = tl.dot(w, s, acc, input_precision=PRECISION)
    if ACTIVATION == "swiglu":
      up = tl.load(weight + OUTPUTS * INPUTS + places, mask=mask, other=0.0)
      acc_up = tl.dot(up, s, acc_up, input_precision=PRECISION)
  return acc, acc_up, tl.sum(total, 0)[None, :]


@triton.jit
def _stream(
  x, y, y_scale, stream, factor, places, i, mask, INPUTS: tl.constexpr,
  ADDS: tl.constexpr, Y_EPSILON: tl.constexpr,
):  # fmt: skip
  """s = x + norm(y), rounded as the residual stream is.

  i: the inputs. places: those in the arrays of rows.
  """
  s = tl.load(x + places, mask=mask, other=0.0)
  if ADDS:
    added = tl.load(y + places, mask=mask, other=0.0)
    if Y_EPSILON is not None:
      scale = tl.load(y_scale + i, mask=i < INPUTS, other=0.0)
      added = (added.to(tl.float32) * factor * scale).to(s.dtype)
    s += added
    tl.store(stream + places, s, mask=mask & (tl.program_id(0) == 0))
  return s


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
