"""Logit vectors: one number for each query and each key, in the scores.

The tensor cores add them, by 16 more columns in the product:

  s_ij + u_i + w_j = [q_i, u_i, 1] . [k_j, 1, w_j]

A row has its number in three columns, whose bfloat16 parts add up to it in
float32, and 1 in three other columns. On the other side it is the other way
round. The scores of a block take one more product, which costs 1 / 8 of their
own product at head width 128. If the numbers of the columns were added in
registers, that would cost an addition for each pair, and registers that the
products need.

The stationary side of a block is in registers (`stationary`), the streamed side
in shared memory (`streamed`, through a ring). The numbers are divided by the
scale of the scores.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels.mosaic import weights
from sigattn.kernels.mosaic.pipeline import smem_blocks
from sigattn.kernels.mosaic.tiles import KeyTile, QueryTile

WIDTH = 16  # columns of the product
_PARTS = 3  # bfloat16 numbers that add up to a float32
# Hides a pair, as -inf does, but its bfloat16 parts are finite.
_LEAST = -1e30


# On the host.


def parts(
  vector: jax.Array | None, shape: tuple[int, int, int], scale: float
) -> jax.Array:
  """(B, N, 3, length) float32: the bfloat16 parts of vector / scale.

  vector: (B or 1, N or 1, length), or None for zeros. shape: (B, N, length).
  """
  if vector is None:
    return jnp.zeros((*shape[:2], _PARTS, shape[2]), jnp.float32)
  rest = vector.astype(jnp.float32) / scale
  rest = jnp.clip(rest, _LEAST, -_LEAST)
  found = []
  for _ in range(_PARTS):
    # XLA would drop a cast to bfloat16 and back as excess precision.
    found.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
    rest = rest - found[-1]
  found = jnp.stack(found, 2)
  return jnp.broadcast_to(found, (*shape[:2], _PARTS, shape[2]))


def streamed(parts: jax.Array) -> jax.Array:
  """(B, length, N, WIDTH) bfloat16: [1, 1, 1, the parts, 0, ...]."""
  columns = jnp.moveaxis(parts, 3, 1)
  columns = jnp.concatenate([jnp.ones_like(columns), columns], -1)
  rest = WIDTH - 2 * _PARTS
  columns = jnp.pad(columns, ((0, 0), (0, 0), (0, 0), (0, rest)))
  return columns.astype(jnp.bfloat16)


# In a kernel.


def scratch(tile: QueryTile | KeyTile) -> Any:
  """Shared memory for the streamed columns of each stage."""
  return smem_blocks(tile, tile.stages, tile.streamed, WIDTH, jnp.bfloat16)


def stationary(
  ref: Any, batch: jax.Array, head: jax.Array, start: jax.Array, rows: int
) -> jax.Array | None:
  """(rows, WIDTH) bfloat16 in registers: [the parts, 1, 1, 1, 0, ...].

  ref: a Ref of `parts`. If it is None, so is the result.
  """
  if ref is None:
    return None
  shape = rows, WIDTH
  column = plgpu.broadcasted_iota(
    jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
  )
  found = jnp.where(column < 2 * _PARTS, 1.0, 0.0)
  for index, part in enumerate(
    weights.load_rows(ref, batch, head, start, rows)
  ):
    part = lax.broadcast_in_dim(part, shape, [0])
    found = jnp.where(column == index, part, found)
  return found.astype(jnp.bfloat16)


def add(scores: Any, rows: jax.Array | None, columns: Any) -> None:
  """Starts the product that adds the vectors to the scores, if there are any.

  scores: an accumulator. rows: of `stationary`. columns: a Ref (streamed,
  WIDTH).
  """
  if rows is not None:
    plgpu.wgmma(scores, rows, columns.transpose((1, 0)))
