"""Pointwise attention in Triton, for NVIDIA GPUs since Ampere.

This is the host side: it says which problems are supported, and chooses the
kernels that compute them; launch.py calls them. The forward pass saves only
query, key and value, and for normalised rows also the output and one number a
row. The backward pass has two kernels, one for dq (and the gradients of
logit_bias and slopes) and one for dk and dv. Neither uses atomics, so every run
gives the same numbers. decode.py has a forward kernel for a few queries against
many keys, as in decoding.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp

from sigattn.kernels import (
  device,
  differentiation,
  numerics,
  vectors,
  xla,
)
from sigattn.kernels.differentiation import Sums
from sigattn.kernels.problem import FLOAT8, Operands, Problem
from sigattn.kernels.triton import decode, launch, tiles
from sigattn.kernels.triton.tiles import Tile

_PACKAGES = {"triton": "triton", "jax_triton": "jax-triton"}


def unsupported(problem: Problem) -> str:
  """Why these kernels cannot compute a problem; "" if they can."""
  card = device.current()
  if card.capability is None or card.capability < 80:
    return f"needs an NVIDIA GPU since Ampere (8.0), device is {card.kind}"
  if problem.key_dtype == FLOAT8 and card.capability < 89:
    return f"{FLOAT8} needs a GPU since Ada (8.9), device is {card.kind}"
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
  """xla.attention in Triton. The tangents of forward mode are xla.attention's.

  Products of float32 are exact in float32, unless jax.default_matmul_precision
  is tensorfloat32 or high (three products of tf32). float16 weights are
  multiplied by a power of two, so that they do not underflow.
  """
  problem, operands = vectors.fold(problem, operands)
  precision = launch.precision()
  return differentiation.attention(
    _passes(precision), xla.PASSES, problem, query, key, value, operands
  )


def decoded(
  problem: Problem,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  *page_table: jax.Array,
) -> tuple[jax.Array, ...]:
  """(out,), and with problem.normalize (out, sums), by the decode kernel.

  problem: its kind may be softmax, with normalize. page_table: with pages, see
  decode.forward.
  """
  tile = decode.tile(problem, paged=bool(page_table))
  arrays = query, key, value, operands, *page_table
  out, sums = decode.forward(problem, launch.precision(), tile, *arrays)
  return (out, sums) if problem.normalize else (out,)


def counters(problem: Problem, paged: bool) -> jax.Array:
  """`arrived` of decode.New, for `extended`. Each call leaves it at zero."""
  return decode.counters(problem, decode.tile(problem, paged=paged))


def extended(
  problem: Problem,
  new: decode.New,
  qkv: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  pages: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Attention for one new token in each row: (out, key, value, arrived).

  problem: one query and the whole cache. The other arguments are those of
  decode.forward.
  """
  tile = decode.tile(problem, paged=pages is not None)
  out, _, *changed = decode.forward(
    problem, launch.precision(), tile, qkv, key, value, operands, pages, new
  )
  return out, *changed


@functools.cache
def _passes(precision):
  return differentiation.of_kernels(
    functools.partial(_forward, precision),
    functools.partial(_backward, precision),
  )


def _forward(precision, problem, query, key, value, operands):
  """(out,), and with problem.normalize (out, sums)."""
  arrays = query, key, value, operands
  if decode.fits(problem):
    tile = decode.tile(problem)
    out, sums = decode.forward(problem, precision, tile, *arrays)
  else:
    tile = _tile(problem, "forward")
    out, sums = forward(problem, precision, tile, *arrays)
  return (out, sums) if problem.normalize else (out,)


def _backward(
  precision, wanted, problem, query, key, value, operands, d_out, *rows
):
  """(dq, dk, dv), and the sums of dz that are wanted."""
  if problem.normalize:
    # The normalizer becomes a part of the rows, see numerics.scales_of_shares.
    rows = [
      x / problem.normalizer for x in numerics.inverse_and_shift(*rows, d_out)
    ]
    problem = dataclasses.replace(problem, normalizer=1.0)
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

  out = p v, or p v / s with problem.normalize. Without it `sums` has no
  meaning. precision: of float32 products, a value of Triton's input_precision.
  """
  arrays = query, key, value, *launch.operands_of(operands, tile.block_q, True)
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

  dslopes are shares of the gradients, one for each block of queries. Sums that
  are not wanted have no meaning. rows: with problem.normalize 1 / s and the
  shift, (B, T, N) float32.
  """
  arrays = query, key, value, d_out, *_rows(rows)
  extra = launch.operands_of(operands, tile.block_q, True)
  blocks = -(-problem.query_len // tile.block_q)
  outs = (
    query,
    _sums(problem, problem.query_len, wanted.rows),
    _sums(problem, blocks, wanted.slopes),
  )
  return _call(
    "backward_q", problem, precision, tile, (*arrays, *extra), outs,
    SUMS=wanted.rows + wanted.paired, SLOPE_SUMS=wanted.slopes,
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
  extra = launch.operands_of(operands, tile.block_kv, False)
  outs = key, value, _sums(problem, problem.key_len, wanted.keys)
  return _call(
    "backward_kv", problem, precision, tile, (*arrays, *extra), outs,
    SUMS=wanted.keys,
  )  # fmt: skip


def _sums(problem, length, wanted):
  """The type of (B, N, length) float32, or of one unused number."""
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

  return launch.start(
    getattr(kernels, direction),
    arrays,
    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
    tile,
    programs(direction, problem, tile),
    launch.constants(direction, problem, precision, tile) | sums,
  )


def _tile(problem, direction):
  return tiles.tile(problem, direction, device.current().capability)
