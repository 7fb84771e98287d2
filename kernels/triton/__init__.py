"""Pointwise attention in Triton, for NVIDIA GPUs since Ampere.

The host side: what can be done, with which constants, and the derivative. The
kernels are in kernels.py. Forward saves query, key and value alone. The
backward pass is two kernels, dq (with the gradients of logit_bias and slopes)
and dk with dv, without atomics: the same numbers at every run.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from sigattn.kernels import device, differentiation, numerics, segments
from sigattn.kernels.triton import tiles

_PACKAGES = {"triton": "triton", "jax_triton": "jax-triton"}
# The kernels' pointers that are not of the dtype of query, key and value.
FLOATS = ("logit_bias", "slopes", "d_bias", "d_slope")
INTEGERS = ("q_lengths", "k_lengths", "q_ids", "k_ids", "spans")
_PRECISIONS = {
  # jax.default_matmul_precision: Triton's. Exact unless asked.
  None: "ieee", "default": "ieee", "highest": "ieee", "float32": "ieee",
  "high": "tf32x3", "tensorfloat32": "tf32", "TF32_TF32_F32": "tf32",
  "TF32_TF32_F32_X3": "tf32x3",
}  # fmt: skip


def unsupported(problem):
  """Why not; empty where it can."""
  if problem.dtype == "float64":
    return "float64 is not implemented"
  for name in ("bias", "mask"):
    if getattr(problem.shapes, name) is not None:
      return f"a dense {name} is not implemented"
  if problem.head_dim > 256:
    return f"head_dim={problem.head_dim}; at most 256"
  if 0 in (problem.batch, problem.query_len, problem.key_len):
    return "nothing to compute"
  card = device.current()
  if card.capability is None or card.capability < 80:
    return f"needs an NVIDIA GPU since Ampere (8.0), device is {card.kind}"
  for module, package in _PACKAGES.items():
    if importlib.util.find_spec(module) is None:
      return f"needs the package {package} (requirements-gpu.txt)"
  return ""


def attention(query, key, value, operands, problem):
  """As xla.attention; float32 products are exact in float32.

  Unless jax.default_matmul_precision asks for tensorfloat32 or high (three
  products of tf32). Reverse mode only. float16 weights are multiplied by a
  power of two, so that they do not underflow.
  """
  asked = jax.config.jax_default_matmul_precision
  precision = _PRECISIONS.get(asked, "ieee")
  return differentiation.attention(
    functools.partial(_forward, precision),
    functools.partial(_backward, precision),
    problem, query, key, value, operands,
  )  # fmt: skip


def _forward(precision, problem, query, key, value, operands):
  """(out,)"""
  tile = _tile(problem, "forward")
  return forward(problem, precision, tile, query, key, value, operands)


def _backward(precision, trained, problem, query, key, value, operands, d_out):
  """(dq, dk, dv, dlogit_bias (B, N), dslopes (B, N)), the last two float32."""
  del trained  # The last two cost next to nothing.
  arrays = query, key, value, operands, d_out.astype(query.dtype)
  d_q, d_bias, d_slopes = backward_q(
    problem, precision, _tile(problem, "backward_q"), *arrays
  )
  d_k, d_v = backward_kv(
    problem, precision, _tile(problem, "backward_kv"), *arrays
  )
  return d_q, d_k, d_v, d_bias.sum(-1), d_slopes.sum(-1)


# The passes, each with a tile of its own.


def forward(problem, precision, tile, query, key, value, operands):
  """(out,)"""
  arrays = query, key, value, *_operands(problem, operands, tile.block_q, True)
  return _call("forward", problem, precision, tile, arrays, (query,))


def backward_q(problem, precision, tile, query, key, value, operands, d_out):
  """dq, and the shares (B, N, blocks) of dlogit_bias and dslopes."""
  extra = _operands(problem, operands, tile.block_q, True)
  blocks = -(-problem.query_len // tile.block_q)
  shares = jax.ShapeDtypeStruct(
    (problem.batch, problem.num_heads, blocks), jnp.float32
  )
  return _call(
    "backward_q", problem, precision, tile, (query, key, value, d_out, *extra),
    (query, shares, shares),
  )  # fmt: skip


def backward_kv(problem, precision, tile, query, key, value, operands, d_out):
  """dk, dv"""
  extra = _operands(problem, operands, tile.block_kv, False)
  return _call(
    "backward_kv", problem, precision, tile, (query, key, value, d_out, *extra),
    (key, value),
  )  # fmt: skip


def programs(direction, problem, tile):
  """How many programs a kernel is started with."""
  length, block, heads = (
    (problem.key_len, tile.block_kv, problem.num_kv_heads)
    if direction == "backward_kv"
    else (problem.query_len, tile.block_q, problem.num_heads)
  )
  return -(-length // block) * heads * problem.batch


def _call(direction, problem, precision, tile, arrays, outs):
  """The outputs of a kernel, of the shapes and dtypes of outs."""
  from sigattn.kernels.triton import kernels

  return _start(
    getattr(kernels, direction),
    arrays,
    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
    tile,
    programs(direction, problem, tile),
    constants(direction, problem, precision, tile),
  )


def _start(kernel, arrays, outs, tile, count, constants):
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


# The constants and operands of the kernels.


def _tile(problem, direction):
  return tiles.tile(problem, direction, device.current().capability)


def _activation(problem):
  if problem.kind != "sigmoid":
    return problem.kind
  exact = problem.dtype == "float32" or numerics.exact_sigmoid(problem)
  return "exp" if exact else "tanh"


_SCALES = {  # those that a kernel takes
  "forward": ("P_SCALE", "OUT_SCALE"),
  "backward_q": ("D_Z_SCALE", "D_Q_SCALE", "SUM_SCALE"),
  "backward_kv": ("P_SCALE", "OUT_SCALE", "D_Z_SCALE", "D_Q_SCALE"),
}


def constants(direction, problem, precision, tile):
  """All that a kernel knows when it is compiled, besides warps and stages."""
  from sigattn.kernels.triton import kernels

  scales = _scales(problem)
  activation, shapes = _activation(problem), problem.shapes
  left, right = problem.bounds

  def stride(shape):
    # None: there are none; 0: all examples share them.
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
    BIAS_STRIDE=stride(shapes.logit_bias),
    SLOPE_STRIDE=stride(shapes.alibi_slopes),
    Q_LENGTHS=shapes.query_seq_lengths is not None,
    K_LENGTHS=shapes.key_value_seq_lengths is not None,
    SEGMENTS=shapes.query_segment_ids is not None,
    **{name: scales[name] for name in _SCALES[direction]},
  )


def _scales(problem):
  """The constant factors that the kernels leave out of their sums."""
  activation = _activation(problem)
  # dz of tanh is four times that of sigmoid: hence two bits more than Mosaic
  # has. Values of do v^T up to 64 may meet a saturated weight.
  p_scale, d_z_scale = numerics.float16_scales(problem, headroom=11)
  twice = {"tanh": 2.0}.get(activation, 1.0)
  derivatives = {"tanh": 4.0, "relu2": 0.5}.get(activation, 1.0)
  sum_scale = 1 / (derivatives * d_z_scale * problem.normalizer)
  return dict(
    P_SCALE=p_scale,
    OUT_SCALE=1 / (twice * p_scale * problem.normalizer),
    D_Z_SCALE=d_z_scale,
    D_Q_SCALE=sum_scale * problem.scale,
    SUM_SCALE=sum_scale,
  )


def _operands(problem, operands, block, of_queries):
  """The kernels' operands in order; those that are absent are not read."""
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
    given(operands.query_seq_lengths, jnp.int32),
    given(operands.key_value_seq_lengths, jnp.int32),
    given(operands.query_segment_ids, jnp.int32),
    given(operands.key_value_segment_ids, jnp.int32),
    spans,
  )
