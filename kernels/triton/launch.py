"""Calls the Triton kernels: their constants, their operands, and the call."""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jax.typing import DTypeLike

from sigattn.kernels import device, numerics, segments
from sigattn.kernels.problem import Operands, Problem, not_implemented
from sigattn.kernels.triton import tiles
from sigattn.kernels.triton.tiles import Tile

_PRECISIONS = {
  # {jax.default_matmul_precision: Triton's}. The default is exact.
  None: "ieee", "default": "ieee", "highest": "ieee", "float32": "ieee",
  "high": "tf32x3", "tensorfloat32": "tf32", "TF32_TF32_F32": "tf32",
  "TF32_TF32_F32_X3": "tf32x3",
}  # fmt: skip

# The function of jaxlib that starts a kernel. XLA may record its calls in a
# CUDA graph, together with the kernels around them, but not the calls of
# "triton_kernel_call", which jax_triton calls by default. A kernel starts 2 us
# after the one before has ended, and in a graph 1 us.
_TARGET = "triton_kernel_call_ffi"

# The kernels' pointers whose dtype is not that of query, key and value.
FLOATS = (
  "logit_bias", "slopes", "q_bias", "k_bias", "d_rows", "d_keys", "d_slope",
  "sums", "inverse", "shift", "shares", "share_sums", "share_peaks",
  "q_scale", "k_scale", "cos", "sin", "x_scale", "y_scale", "y_squares",
  "squares",
)  # fmt: skip
INTEGERS = (
  "q_lengths", "k_lengths", "offsets", "q_ids", "k_ids", "spans", "pages",
  "arrived", "zeros",
)  # fmt: skip


def start(
  kernel: Any,
  arrays: Sequence[jax.Array],
  outs: Sequence[jax.ShapeDtypeStruct],
  tile: Any,
  count: int,
  constants: dict[str, Any],
  zeroed: Sequence[int] = (),
  aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
  """The outputs of a kernel.

  Args:
    kernel: a function of Triton. Its arguments are the arrays, the outputs and
      the constants.
    arrays: the arrays that it reads.
    outs: the shapes and dtypes of the outputs.
    tile: has num_warps and num_stages.
    count: the number of programs.
    constants: the arguments that are known at compile time.
    zeroed: the indices of those `outs` that must be zero when it begins.
    aliases: {index in `arrays`: index in `outs`} of arrays that the kernel
      changes in place.
  """
  with triton_cache_dir():
    import jax_triton

  _write_calls_of_target()
  return jax_triton.triton_call(
    *arrays,
    kernel=kernel,
    out_shape=outs,
    grid=(count,),
    name=kernel.__name__,
    custom_call_target_name=_TARGET,
    num_warps=tile.num_warps,
    num_stages=tile.num_stages,
    zeroed_outputs=zeroed,
    input_output_aliases=aliases,
    compute_capability=device.current().capability,
    **constants,
  )


@functools.cache
def _write_calls_of_target():
  """Makes jax_triton write calls of _TARGET in the form that _TARGET takes.

  jax_triton can be told to call another function of jaxlib. But it still writes
  the kernel as "triton_kernel_call" takes it: as a string, for version 2 of
  XLA's interface, and not in a dictionary, for version 4. Other calls by
  jax_triton stay as they are. pyproject.toml pins the version of jax_triton
  whose functions are used here.
  """
  from jax_triton import triton_lib

  def lower(ctx, *arrays, **options):
    results = triton_lib.triton_kernel_call_lowering(
      triton_lib.get_cuda_backend, ctx, *arrays, **options
    )
    if options["custom_call_target_name"] == _TARGET:
      call = results[0].owner.attributes
      kernel = {"opaque": call["backend_config"]}
      call["backend_config"] = ir.DictAttr.get(kernel)
      call["api_version"] = ir.IntegerAttr.get(call["api_version"].type, 4)
    return results

  mlir.register_lowering(
    triton_lib.triton_kernel_call_p, lower, platform="cuda"
  )


def precision() -> str:
  """The precision of float32 products, a value of Triton's input_precision."""
  return _PRECISIONS.get(jax.config.jax_default_matmul_precision, "ieee")


@contextlib.contextmanager
def triton_cache_dir() -> Iterator[None]:
  """Restores TRITON_CACHE_DIR, which jax_triton empties when it is imported.

  Without the folder, Triton kernels of other packages in this process do not
  compile.
  """
  before = os.environ.get("TRITON_CACHE_DIR")
  yield
  if before is None:
    os.environ.pop("TRITON_CACHE_DIR", None)
  else:
    os.environ["TRITON_CACHE_DIR"] = before


def _activation(direction, problem):
  # Decoding waits for memory, so the exact forms cost no time.
  exact = problem.dtype == "float32" or direction == "decode"
  if problem.kind == "silu":
    return "exact_silu" if exact else "silu"
  if problem.kind != "sigmoid":
    return problem.kind
  return "exp" if exact or numerics.exact_sigmoid(problem) else "tanh"


_SCALES = {  # the scales that each kernel takes
  "forward": ("P_SCALE", "OUT_SCALE"),
  "decode": ("P_SCALE", "OUT_SCALE"),
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
  return common(direction, problem, precision) | dict(
    BLOCK_Q=tile.block_q,
    BLOCK_KV=tile.block_kv,
    SEGMENTS=problem.shapes.query_segment_ids is not None,
  )


def common(direction: str, problem: Problem, precision: str) -> dict[str, Any]:
  """The compile-time arguments that do not depend on the tile."""
  from sigattn.kernels.triton import kernels

  activation, shapes = _activation(direction, problem), problem.shapes
  if activation not in kernels.UNITS:
    raise not_implemented(activation, "kernels/triton/kernels.py, UNITS")
  scales = _scales(direction, activation, problem)
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
    NORMALIZE=problem.normalize,
    **{name: scales[name] for name in _SCALES[direction]},
  )


def strides(problem: Problem, shape: tuple[int, ...] | None) -> int | None:
  """The strides by which a kernel finds a head's row in an array.

  The array is (B or 1, N or 1, length). The strides are coded as one number:
  twice the number of rows between two examples, plus the number of rows between
  two heads, which is 0 or 1. None if there is no array.
  """
  if shape is None:
    return None
  batch, heads, _ = shape
  return 2 * (heads if batch > 1 else 0) + (1 if heads > 1 else 0)


def _scales(direction, activation, problem):
  """The constant factors that the kernels apply to their sums."""
  of_shares = problem.normalize and direction.startswith("backward")
  scales = numerics.scales_of_shares if of_shares else numerics.float16_scales
  # dz of tanh is four times that of sigmoid, so the headroom has two bits more
  # than Mosaic's. Values of do v^T up to 64 may meet a saturated weight.
  p_scale, d_z_scale = scales(problem, headroom=11)
  # The constant factors that kernels._weights leaves in.
  of_weights = {"tanh": 2.0}.get(activation, 1.0)
  of_derivatives = {"tanh": 4.0, "silu": 2.0, "relu2": 0.5}.get(activation, 1.0)
  sum_scale = 1 / (of_derivatives * d_z_scale * problem.normalizer)
  return dict(
    P_SCALE=p_scale,
    OUT_SCALE=1 / (of_weights * p_scale * problem.normalizer),
    D_Z_SCALE=d_z_scale,
    D_Q_SCALE=sum_scale * problem.scale,
    SUM_SCALE=sum_scale,
  )


def operands_of(
  operands: Operands, block: int, of_queries: bool
) -> tuple[jax.Array, ...]:
  """The kernels' operands in order. Absent ones are never read.

  block: the rows of a stationary block. of_queries: whether they are queries.
  """
  spans = unread()
  if operands.query_segment_ids is not None:
    rows, others = operands.query_segment_ids, operands.key_value_segment_ids
    if not of_queries:
      rows, others = others, rows
    spans = segments.spans(rows, others, block)
  return (
    *logit_operands(operands),
    given(operands.query_segment_ids, jnp.int32),
    given(operands.key_value_segment_ids, jnp.int32),
    spans,
  )


def logit_operands(operands: Operands) -> tuple[jax.Array, ...]:
  """The operands that every kernel takes, in their order."""
  return (
    given(operands.logit_bias, jnp.float32),
    given(operands.alibi_slopes, jnp.float32),
    given(operands.query_logit_bias, jnp.float32),
    given(operands.key_logit_bias, jnp.float32),
    given(operands.query_seq_lengths, jnp.int32),
    given(operands.key_value_seq_lengths, jnp.int32),
    given(operands.query_offset, jnp.int32),
  )


def given(x: jax.Array | None, dtype: DTypeLike) -> jax.Array:
  """x in the dtype that the kernels read; a placeholder if x is None."""
  return unread() if x is None else x.astype(dtype)


def unread() -> jax.Array:
  """A placeholder for an absent array. It is never read."""
  return jnp.zeros(1, jnp.int32)
