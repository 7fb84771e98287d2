"""Pointwise attention in Triton, for NVIDIA GPUs since Ampere.

This is the host side: which problems are supported, and with which constants
and operands the kernels of kernels.py are called. The forward pass saves query,
key and value alone, and of normalised rows the output and one number. The
backward pass has two kernels, one for dq (and the
gradients of logit_bias and slopes) and one for dk and dv. Neither uses atomics,
so every run gives the same numbers.
"""

import contextlib
import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp

from sigattn.kernels import (
  device,
  differentiation,
  numerics,
  segments,
  vectors,
  xla,
)
from sigattn.kernels.differentiation import Sums
from sigattn.kernels.problem import Operands, Problem
from sigattn.kernels.triton import tiles
from sigattn.kernels.triton.tiles import Tile

_PACKAGES = {"triton": "triton", "jax_triton": "jax-triton"}
# The kernels' pointers whose dtype is not that of query, key and value.
FLOATS = (
  "logit_bias", "slopes", "q_bias", "k_bias", "d_rows", "d_keys", "d_slope",
  "sums", "inverse", "shift",
)  # fmt: skip
INTEGERS = ("q_lengths", "k_lengths", "offsets", "q_ids", "k_ids", "spans")
_PRECISIONS = {
  # jax.default_matmul_precision: Triton's. Exact by default.
  None: "ieee", "default": "ieee", "highest": "ieee", "float32": "ieee",
  "high": "tf32x3", "tensorfloat32": "tf32", "TF32_TF32_F32": "tf32",
  "TF32_TF32_F32_X3": "tf32x3",
}  # fmt: skip


def unsupported(problem: Problem) -> str:
  """The reason why these kernels cannot compute a problem, or ""."""
  if problem.dtype == "float64":
    return "float64 is not implemented"
  for name in vectors.dense(problem):
    return f"a dense {name} is not implemented"
  if problem.head_dim > 256:
    return f"head_dim={problem.head_dim}; at most 256"
  if problem.is_symbolic:
    return "symbolic sizes are not implemented"
  if 0 in (problem.batch, problem.query_len, problem.key_len):
    return "nothing to compute"
  card = device.current()
  if card.capability is None or card.capability < 80:
    return f"needs an NVIDIA GPU since Ampere (8.0), device is {card.kind}"
  for module, package in _PACKAGES.items():
    if importlib.util.find_spec(module) is None:
      return f"needs the package {package} (requirements-gpu.txt)"
  return ""


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  problem: Problem,
) -> jax.Array:
  """As xla.attention, of which the tangents of forward mode are computed.

  Products of float32 are exact in float32, unless jax.default_matmul_precision
  is tensorfloat32 or high (three products of tf32). float16 weights are
  multiplied by a power of two, so that they do not underflow.
  """
  problem, operands = vectors.fold(problem, operands)
  precision = _PRECISIONS.get(jax.config.jax_default_matmul_precision, "ieee")
  return differentiation.attention(
    _passes(precision), xla.PASSES, problem, query, key, value, operands
  )


@functools.cache
def _passes(precision):
  return differentiation.of_kernels(
    functools.partial(_forward, precision),
    functools.partial(_backward, precision),
  )


def _forward(precision, problem, query, key, value, operands):
  """(out,), and with problem.normalize (out, sums)."""
  tile = _tile(problem, "forward")
  out, sums = forward(problem, precision, tile, query, key, value, operands)
  return (out, sums) if problem.normalize else (out,)


def _backward(
  precision, wanted, problem, query, key, value, operands, d_out, *rows
):
  """(dq, dk, dv), and the sums of dz that are wanted."""
  arrays = query, key, value, operands, d_out.astype(query.dtype), *rows
  d_q, d_rows, d_slopes = backward_q(
    problem, precision, _tile(problem, "backward_q"), wanted, *arrays
  )
  d_k, d_v, d_keys = backward_kv(
    problem, precision, _tile(problem, "backward_kv"), wanted, *arrays
  )
  found = {"BNT": d_rows, "BNS": d_keys, "BN": d_slopes.sum(-1)}
  return d_q, d_k, d_v, *(found[axes] for axes in wanted.axes)


# The passes. Each has its own tile.


def forward(
  problem: Problem,
  precision: str,
  tile: Tile,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
) -> list[jax.Array]:
  """[out, sums]: (B, T, N, H), and with problem.normalize (B, T, N) float32.

  out = p v, or p v / s with problem.normalize; without it sums holds nothing.
  precision: of float32 products, a value of Triton's input_precision.
  """
  arrays = query, key, value, *_operands(problem, operands, tile.block_q, True)
  shape = query.shape[:3] if problem.normalize else (1,)
  sums = jax.ShapeDtypeStruct(shape, jnp.float32)
  return _call("forward", problem, precision, tile, arrays, (query, sums))


def backward_q(
  problem: Problem,
  precision: str,
  tile: Tile,
  wanted: Sums,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  d_out: jax.Array,
  *rows: jax.Array,
) -> list[jax.Array]:
  """[dq (B, T, N, H), sums of dz (B, N, T), dslopes (B, N, blocks)].

  The last are shares of the gradients, one for each block of queries. Sums that
  are not wanted hold nothing. rows: with problem.normalize 1 / s and the shift,
  (B, T, N) float32.
  """
  arrays = query, key, value, d_out, *_rows(rows)
  extra = _operands(problem, operands, tile.block_q, True)
  blocks = -(-problem.query_len // tile.block_q)
  outs = (
    query,
    _sums(problem, problem.query_len, wanted.rows),
    _sums(problem, blocks, wanted.slopes),
  )
  return _call(
    "backward_q", problem, precision, tile, (*arrays, *extra), outs,
    SUMS=wanted.rows, SLOPE_SUMS=wanted.slopes,
  )  # fmt: skip


def backward_kv(
  problem: Problem,
  precision: str,
  tile: Tile,
  wanted: Sums,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  d_out: jax.Array,
  *rows: jax.Array,
) -> list[jax.Array]:
  """[dk (B, S, K, H), dv, sums of dz (B, N, S)], the last one if wanted."""
  arrays = query, key, value, d_out, *_rows(rows)
  extra = _operands(problem, operands, tile.block_kv, False)
  outs = key, value, _sums(problem, problem.key_len, wanted.keys)
  return _call(
    "backward_kv", problem, precision, tile, (*arrays, *extra), outs,
    SUMS=wanted.keys,
  )  # fmt: skip


def _sums(problem, length, wanted):
  """What (B, N, length) float32 looks like, or what nothing does."""
  shape = (problem.batch, problem.num_heads, length) if wanted else (1,)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _rows(rows):
  """1 / s and the shift; absent ones are never read."""
  return rows or (jnp.zeros(1, jnp.float32),) * 2


def programs(direction: str, problem: Problem, tile: Tile) -> int:
  """The number of programs of a kernel. direction: one of tiles.PASSES."""
  length, block, heads = (
    (problem.key_len, tile.block_kv, problem.num_kv_heads)
    if direction == "backward_kv"
    else (problem.query_len, tile.block_q, problem.num_heads)
  )
  return -(-length // block) * heads * problem.batch


def _call(direction, problem, precision, tile, arrays, outs, **sums):
  """The outputs of a kernel, of the shapes and dtypes of outs.

  sums: which sums of dz it computes.
  """
  from sigattn.kernels.triton import kernels

  return _start(
    getattr(kernels, direction),
    arrays,
    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
    tile,
    programs(direction, problem, tile),
    constants(direction, problem, precision, tile) | sums,
  )


def _start(kernel, arrays, outs, tile, count, constants):
  with _triton_cache_dir():
    import jax_triton

  return jax_triton.triton_call(
    *arrays,
    kernel=kernel,
    out_shape=outs,
    grid=(count,),
    name=kernel.__name__,
    num_warps=tile.num_warps,
    num_stages=tile.num_stages,
    compute_capability=device.current().capability,
    **constants,
  )


@contextlib.contextmanager
def _triton_cache_dir():
  """Puts TRITON_CACHE_DIR back, which jax_triton empties where it is imported.

  Without a folder, Triton's kernels of others in this process do not compile.
  """
  before = os.environ.get("TRITON_CACHE_DIR")
  yield
  if before is None:
    os.environ.pop("TRITON_CACHE_DIR", None)
  else:
    os.environ["TRITON_CACHE_DIR"] = before


# The constants and operands of the kernels.


def _tile(problem, direction):
  return tiles.tile(problem, direction, device.current().capability)


def _activation(problem):
  if problem.kind == "silu":
    return "exact_silu" if problem.dtype == "float32" else "silu"
  if problem.kind != "sigmoid":
    return problem.kind
  exact = problem.dtype == "float32" or numerics.exact_sigmoid(problem)
  return "exp" if exact else "tanh"


_SCALES = {  # the scales that each kernel takes
  "forward": ("P_SCALE", "OUT_SCALE"),
  "backward_q": ("D_Z_SCALE", "D_Q_SCALE", "SUM_SCALE"),
  "backward_kv": (
    "P_SCALE",
    "OUT_SCALE",
    "D_Z_SCALE",
    "D_Q_SCALE",
    "SUM_SCALE",
  ),
}


def constants(
  direction: str, problem: Problem, precision: str, tile: Tile
) -> dict[str, Any]:
  """The compile-time arguments of a kernel, except warps and stages."""
  from sigattn.kernels.triton import kernels

  scales = _scales(problem)
  activation, shapes = _activation(problem), problem.shapes
  left, right = problem.bounds

  def stride(shape):
    # None: there is no array; 0: all examples share it.
    return shape and (0 if shape[0] == 1 else problem.num_heads)

  return dict(
    T=problem.query_len,
    S=problem.key_len,
    N=problem.num_heads,
    K=problem.num_kv_heads,
    H=problem.head_dim,
    BLOCK_H=tiles.padded(problem.head_dim),
    BLOCK_Q=tile.block_q,
    BLOCK_KV=tile.block_kv,
    ACTIVATION=activation,
    SCALE=problem.scale * kernels.UNITS[activation],
    BIAS=problem.logit_bias,
    PRECISION=precision,
    LEFT=left,
    RIGHT=right,
    OFFSET=problem.distance_offset,
    BIAS_STRIDE=stride(shapes.logit_bias),
    SLOPE_STRIDE=stride(shapes.alibi_slopes),
    Q_BIAS=strides(problem, shapes.query_logit_bias),
    K_BIAS=strides(problem, shapes.key_logit_bias),
    OFFSETS=shapes.query_offset is not None,
    Q_LENGTHS=shapes.query_seq_lengths is not None,
    K_LENGTHS=shapes.key_value_seq_lengths is not None,
    SEGMENTS=shapes.query_segment_ids is not None,
    NORMALIZE=problem.normalize,
    **{name: scales[name] for name in _SCALES[direction]},
  )


def strides(problem: Problem, shape: tuple[int, ...] | None) -> int | None:
  """How a kernel finds a head's row in (B or 1, N or 1, length).

  Twice the distance of examples in rows, plus that of heads, which is 0 or 1.
  None if there is no array.
  """
  if shape is None:
    return None
  batch, heads, _ = shape
  return 2 * (heads if batch > 1 else 0) + (1 if heads > 1 else 0)


def _scales(problem):
  """The constant factors that the kernels apply to their sums."""
  activation = _activation(problem)
  # dz of tanh is four times that of sigmoid: hence two bits more than Mosaic
  # has. Values of do v^T up to 64 may meet a saturated weight.
  p_scale, d_z_scale = numerics.float16_scales(problem, headroom=11)
  twice = {"tanh": 2.0}.get(activation, 1.0)
  derivatives = {"tanh": 4.0, "silu": 2.0, "relu2": 0.5}.get(activation, 1.0)
  sum_scale = 1 / (derivatives * d_z_scale * problem.normalizer)
  return dict(
    P_SCALE=p_scale,
    OUT_SCALE=1 / (twice * p_scale * problem.normalizer),
    D_Z_SCALE=d_z_scale,
    D_Q_SCALE=sum_scale * problem.scale,
    SUM_SCALE=sum_scale,
  )


def _operands(problem, operands, block, of_queries):
  """The kernels' operands in order. Absent ones are never read."""
  unread = jnp.zeros(1, jnp.int32)

  def given(x, dtype):
    return unread if x is None else x.astype(dtype)

  spans = unread
  if operands.query_segment_ids is not None:
    rows, others = operands.query_segment_ids, operands.key_value_segment_ids
    if not of_queries:
      rows, others = others, rows
    spans = segments.spans(rows, others, block)
  return (
    given(operands.logit_bias, jnp.float32),
    given(operands.alibi_slopes, jnp.float32),
    given(operands.query_logit_bias, jnp.float32),
    given(operands.key_logit_bias, jnp.float32),
    given(operands.query_seq_lengths, jnp.int32),
    given(operands.key_value_seq_lengths, jnp.int32),
    given(operands.query_offset, jnp.int32),
    given(operands.query_segment_ids, jnp.int32),
    given(operands.key_value_segment_ids, jnp.int32),
    spans,
  )
