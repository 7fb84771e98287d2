"""Says which blocks a tile sees, and in which order they are streamed past it.

A tile of rows (queries in forward.py and dq.py, keys in dkv.py and
fused_backward.py) sees a range of blocks of the other side:

  blocks   0 ..  low .. full_low .. full_high .. high .. count
                 masked   all visible   masked

Blocks outside low..high are neither loaded nor computed. Sigmoid needs no
order, because the contributions of blocks are added. So masked blocks come
first, in a loop of their own, and all others follow in a loop without a mask.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from sigattn.kernels import segments
from sigattn.kernels.mosaic.schedule import div
from sigattn.kernels.mosaic.tiles import KeyTile, QueryTile
from sigattn.kernels.mosaic.weights import Form
from sigattn.kernels.problem import Operands, Problem


def int32(x: int) -> jax.Array:
  """A number with the type of indices."""
  return jnp.asarray(x, jnp.int32)


def visible_blocks(
  first: jax.Array,
  last: jax.Array,
  before: int | None,
  after: int | None,
  block: int,
  length: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """(low, full_low, full_high, high): the blocks that rows first..last see.

  Row i sees the rows of the other side from i - before to i + after (None: no
  bound) that are below `length`. Only blocks in low..high contain something
  visible, and blocks in full_low..full_high are visible in full to all rows.
  There is always at least one block, so that a loop has something to do.
  """
  count = pl.cdiv(length, block)
  low, full_low = int32(0), int32(0)
  high, full_high = int32(count), int32(count)
  if before is not None:
    low = jnp.minimum(div(jnp.maximum(first - before, 0), block), count - 1)
    full_low = div(jnp.maximum(last - before, 0) + block - 1, block)
  if after is not None:
    high = jnp.minimum(div(jnp.maximum(last + after, 0), block) + 1, count)
    full_high = jnp.where(
      first + after >= length - 1,
      count,
      div(jnp.maximum(first + after + 1, 0), block),
    )
  high = jnp.maximum(high, low + 1)
  full_low = jnp.clip(full_low, low, high)
  return low, full_low, jnp.clip(full_high, full_low, high), high


def blocks_of_tile(
  plan_ref: Any,
  batch: jax.Array,
  tile: jax.Array,
  rows: int,
  before: int | None,
  after: int | None,
  block: int,
  length: int,
) -> list[jax.Array] | tuple[jax.Array, ...]:
  """visible_blocks of a tile of `rows` rows.

  If there is a plan, a Ref (B, tiles, 4), they are read from it.
  """
  if plan_ref is not None:
    return [plan_ref[batch, tile, i] for i in range(4)]
  first = tile * rows
  return visible_blocks(first, first + rows - 1, before, after, block, length)


@dataclasses.dataclass(frozen=True)
class Steps:
  """The order of a tile's blocks: those with a mask come before all others.

  The masked blocks at the upper edge come first, from the last one backwards.
  Then come those at the lower edge.
  """

  low: jax.Array
  full_low: jax.Array
  high: jax.Array
  upper: jax.Array  # number of blocks at the upper edge
  edges: jax.Array  # number of blocks at both edges
  skipped: jax.Array  # number of first steps that only other warpgroups need
  masked: jax.Array  # the steps before this one have a mask
  count: jax.Array  # number of steps

  @classmethod
  def make(
    cls,
    low: jax.Array,
    full_low: jax.Array,
    full_high: jax.Array,
    high: jax.Array,
  ) -> "Steps":
    """The steps of a tile that sees these blocks."""
    upper = high - full_high
    edges = upper + full_low - low
    return cls(
      low, full_low, high, upper, edges, int32(0), edges, count=high - low
    )

  def skip_from(self, high: jax.Array) -> "Steps":
    """These steps, skipping the blocks from `high` on, which come first."""
    skipped = jnp.clip(self.high - high, 0, self.upper)
    return dataclasses.replace(self, skipped=skipped)

  def mask_from(self, full_high: jax.Array) -> "Steps":
    """These steps without masks below `full_high`, unless at a lower edge."""
    upper = jnp.clip(self.high - full_high, 0, self.upper)
    one_edge = self.edges == self.upper
    masked = jnp.where(one_edge, upper, self.edges)
    return dataclasses.replace(self, masked=masked)

  def block(self, step: jax.Array) -> jax.Array:
    """The block of a step."""
    edge = jnp.where(
      step < self.upper, self.high - 1 - step, self.low + step - self.upper
    )
    return jnp.where(step < self.edges, edge, self.full_low + step - self.edges)


@dataclasses.dataclass(frozen=True)
class StepsInOrder:
  """The order of a tile's blocks for a single loop: from low to high."""

  low: jax.Array
  full_low: jax.Array
  full_high: jax.Array
  count: jax.Array  # number of steps

  @classmethod
  def make(
    cls,
    low: jax.Array,
    full_low: jax.Array,
    full_high: jax.Array,
    high: jax.Array,
  ) -> "StepsInOrder":
    """The steps of a tile that sees these blocks."""
    return cls(low, full_low, full_high, count=high - low)

  def block(self, step: jax.Array) -> jax.Array:
    """The block of a step."""
    return self.low + step

  def masked(self, step: jax.Array) -> jax.Array:
    """Whether the block of a step has a mask."""
    block = self.block(step)
    return (block < self.full_low) | (block >= self.full_high)


# On the host.


def plan(
  form: Form,
  problem: Problem,
  operands: Operands,
  tile: QueryTile | KeyTile,
) -> jax.Array | None:
  """(B, tiles, 4) int32: visible_blocks of each tile.

  None if positions alone decide. The kernel then computes the blocks itself.
  """
  if not problem.masked_by_data:
    return None
  length, others = problem.query_len, problem.key_len
  before, after = form.left, form.right
  lengths = [operands.query_seq_lengths, operands.key_value_seq_lengths]
  ids = [operands.query_segment_ids, operands.key_value_segment_ids]
  rows, block = tile.stationary, tile.streamed
  if not tile.of_queries:
    length, others, before, after = others, length, after, before
    lengths.reverse()
    ids.reverse()
  first = jnp.arange(pl.cdiv(length, rows), dtype=jnp.int32) * rows
  place = first  # the positions of the rows, counted as on the other side
  if operands.query_offset is not None:
    sign = 1 if tile.of_queries else -1
    shifts = sign * operands.query_offset.astype(jnp.int32)
    place = first[None] + shifts[:, None]
  bounds = visible_blocks(place, place + rows - 1, before, after, block, others)
  shape = problem.batch, len(first)
  low, full_low, full_high, high = (jnp.broadcast_to(x, shape) for x in bounds)
  if lengths[1] is not None:  # Zeros follow, which add nothing to products.
    high = jnp.minimum(high, pl.cdiv(lengths[1], block)[:, None])
    if form.end:  # Zeros would add to the sums of rows, so they need a mask.
      full_high = jnp.minimum(full_high, (lengths[1] // block)[:, None])
  if lengths[0] is not None:
    high = jnp.where(first[None] < lengths[0][:, None], high, 0)
  if ids[0] is not None:
    spans = segments.spans(*ids, rows)
    begin, end, full_end = (spans[..., i] for i in range(3))
    low = jnp.maximum(low, begin // block)
    high = jnp.minimum(high, pl.cdiv(end, block))
    full_low = jnp.maximum(full_low, pl.cdiv(begin, block))
    last = jnp.where(full_end >= others, high, full_end // block)
    full_high = jnp.minimum(full_high, last)
  low = jnp.minimum(low, pl.cdiv(others, block) - 1)
  high = jnp.maximum(high, low + 1)
  full_low = jnp.clip(full_low, low, high)
  full_high = jnp.clip(full_high, full_low, high)
  return jnp.stack([low, full_low, full_high, high], -1).astype(jnp.int32)


def count_visible(
  tiles: int,
  rows: int,
  before: int | None,
  after: int | None,
  block: int,
  length: int,
) -> np.ndarray:
  """The number of blocks that each tile sees, (tiles,), computed in NumPy.

  The arguments are those of visible_blocks, for tiles of `rows` rows.
  """
  first = np.arange(tiles) * rows
  count = pl.cdiv(length, block)
  low, high = np.zeros_like(first), np.full_like(first, count)
  if before is not None:
    low = np.minimum(np.maximum(first - before, 0) // block, count - 1)
  if after is not None:
    high = np.minimum(
      np.maximum(first + rows - 1 + after, 0) // block + 1, count
    )
  return np.maximum(high - low, 1)
