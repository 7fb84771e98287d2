"""Kernels with stationary queries: what forward.py and dq.py share.

A program computes tiles of queries, one after another. Each of its compute
warpgroups has block_q of the tile's queries, and keeps a float32 accumulator
(block_q, H) for them in registers. Blocks of block_kv keys and values are
streamed past all warpgroups.

  shared memory, W warpgroups, in 16-bit numbers
    queries  2 W x block_q x H    those of this tile and of the next; the output
                                  of a tile leaves through its queries' slot
    d_out      W x block_q x H    dq.py only
    keys     stages x block_kv x H    a ring
    values   stages x block_kv x H    a ring
    sums       W x block_q x float32  sums of rows, if they are asked for
    columns  stages x block_kv x 16   of the keys' logit vectors, if given
  For example, the forward pass at H = 128 has 4 x 64 x 128 and
  2 x 2 x 128 x 128 numbers. These are 64 + 128 KiB of 227 KiB.

  barriers                  who arrives                      who waits
    q_full[2 W]             copy engine: queries (and d_out) the warpgroup
    k_full, v_full[stages]  copy engine (k: and columns)     all compute
    k_free, v_free[stages]  each compute warpgroup (in a     memory
                            cluster those of both programs)

A compute warpgroup loads its own queries. It loads those of the next tile while
it computes this one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels import numerics
from sigattn.kernels.mosaic import registers, vectors, weights
from sigattn.kernels.mosaic.blocks import (
  Steps,
  blocks_of_tile,
  int32,
  visible_blocks,
)
from sigattn.kernels.mosaic.pipeline import (
  Gmem,
  Ring,
  accumulator,
  by_role,
  free_barrier,
  launch,
  place_in_cluster,
  smem_blocks,
  store,
  zero_padding,
)
from sigattn.kernels.mosaic.schedule import Schedule, div, rem
from sigattn.kernels.mosaic.tiles import QueryTile


@dataclasses.dataclass(frozen=True)
class Context:
  """What a program knows before it begins."""

  form: weights.Form
  tile: QueryTile
  schedule: Schedule
  heads: int
  group: int  # query heads that share a key head
  key_len: int
  scale: float  # of the result
  sum_scale: float | None  # of the sums of rows; None: there are none
  divides: bool  # whether the result is divided by the sums
  accumulate: Callable[["Queries", Any, list], list]
  gmem: Gmem
  q_smem: Any
  do_smem: Any  # None in the forward pass
  sums_smem: Any  # None if there are no sums
  columns_smem: Any  # None if there are no logit vectors
  q_full: Any
  keys: Ring
  values: Ring
  warpgroup: jax.Array
  tiles: jax.Array  # number of this program's tiles

  @property
  def dtype(self) -> jnp.dtype:
    """The dtype of query, key, value and the result."""
    return self.gmem.query.dtype

  def locate(self, i: jax.Array) -> tuple:
    """(batch, head, first query, blocks) of this program's i-th tile."""
    tile, gmem, form = self.tile, self.gmem, self.form
    head, index = self.schedule.tile(gmem.table, i)
    batch, head = div(head, self.heads), rem(head, self.heads)
    blocks = blocks_of_tile(
      gmem.plan, batch, index, tile.stationary, form.left, form.right,
      tile.block_kv, self.key_len,
    )  # fmt: skip
    first = index * tile.stationary + place_in_cluster(tile)
    return batch, head, first, Steps.make(*blocks)

  def slot(self, i: jax.Array) -> jax.Array:
    """The slot of the queries of the i-th tile, and then of its output."""
    return rem(i, 2) * self.tile.warpgroups + self.warpgroup


@dataclasses.dataclass(frozen=True)
class Queries:
  """The queries of one warpgroup in one tile."""

  context: Context
  batch: jax.Array
  place: jax.Array  # of the first query among the keys
  bias: float | jax.Array
  slope: jax.Array | None
  ids: jax.Array | None
  end: jax.Array | None  # the first key that is hidden by its length
  rows: list[jax.Array]  # as in weights.of_normalized
  vector: jax.Array | None  # as vectors.stationary
  steps: Steps
  count: jax.Array  # blocks that were streamed before this tile
  smem: Any  # (block_q, H)

  @property
  def d_out(self) -> Any:
    """The output's cotangent, a Ref (block_q, H) in shared memory."""
    return self.context.do_smem.at[self.context.warpgroup]

  def start_scores(self, scores: Any, count: jax.Array) -> None:
    """Starts scores = q k^T, with the logit vectors, of the block `count`."""
    context = self.context
    plgpu.wgmma(scores, self.smem, context.keys.block(count).transpose((1, 0)))
    if self.vector is not None:
      columns = context.keys.of_step(context.columns_smem, count)
      vectors.add(scores, self.vector, columns)

  def weigh(
    self, s: jax.Array, step: jax.Array, masked: bool, column: int = 0
  ) -> tuple[jax.Array, Callable[[], jax.Array] | None]:
    """weights.weights of the scores with a step's keys, from `column` on."""
    context = self.context
    start = self.steps.block(step) * context.tile.block_kv + column

    def ids():
      return self.ids, weights.load_ids(
        context.form, context.gmem.key_ids, self.batch, start, s.shape[1],
        weights.COLUMN,
      )  # fmt: skip

    return weights.weights(
      context.form, s, self.bias, self.slope,
      weights.Place(self.place, start, of_queries=True), ids, masked,
      end=None if self.end is None else self.end - start,
      paced=context.tile.paced, polynomial=context.tile.polynomial,
      in_output_unit=context.do_smem is None,
    )  # fmt: skip


def run(
  name: str,
  accumulate: Callable[[Queries, Any, list], list],
  form: weights.Form,
  tile: QueryTile,
  schedule: Schedule,
  inputs: Mapping[str, jax.Array | None],
  scale: float,
  sum_scale: float | None = None,
  divides: bool = False,
) -> list[jax.Array]:
  """[(B, T, N, H)]: scale times the sum that `accumulate` computes.

  With `sum_scale` a second result is sum_scale times the sums of each row that
  `accumulate` returns: (B, N, T and the rest of a tile).

  Args:
    name: of the kernel, for profilers.
    accumulate: adds the contributions of all blocks to an accumulator. Takes
      and returns totals of registers.add_to_rows, one with `sum_scale`.
    form, tile, schedule: the mathematics, and how it is divided into tiles.
    inputs: names of Gmem and arrays. Rows from query_lengths on become 0.
    scale, sum_scale: numbers.
    divides: whether the first result is divided by the sums of its rows.
  """
  query, d_out = inputs["query"], inputs["d_out"]
  heads, width = query.shape[2:]
  key_len, kv_heads = inputs["key"].shape[1:3]

  def kernel(
    gmem, q_smem, do_smem, sums_smem, columns_smem, k_smem, v_smem, q_full,
    k_full, v_full, k_free, v_free,
  ):  # fmt: skip
    context = Context(
      form=form, tile=tile, schedule=schedule, heads=heads,
      group=heads // kv_heads, key_len=key_len, scale=scale,
      sum_scale=sum_scale, divides=divides, accumulate=accumulate, gmem=gmem,
      q_smem=q_smem, do_smem=do_smem, sums_smem=sums_smem,
      columns_smem=columns_smem, q_full=q_full,
      keys=Ring(k_smem, k_full, k_free, tile.stages, tile.cluster),
      values=Ring(v_smem, v_full, v_free, tile.stages, tile.cluster),
      warpgroup=lax.axis_index("warpgroup"),
      tiles=schedule.count(gmem.table),
    )  # fmt: skip
    by_role(
      tile, context.warpgroup, functools.partial(_compute, context),
      functools.partial(_feed, context),
    )  # fmt: skip

  has_sums = sum_scale is not None
  scratch = _scratch(
    tile, width, query.dtype, d_out is not None, has_sums,
    inputs["columns"] is not None,
  )  # fmt: skip
  outputs = _outputs(tile, query, has_sums)
  return launch(name, kernel, schedule, tile, inputs, outputs, scratch)(inputs)


def _outputs(tile, query, has_sums):
  """The types of the results, by their names in Gmem."""
  batch, length, heads, _ = query.shape
  outputs = {"out": jax.ShapeDtypeStruct(query.shape, query.dtype)}
  if has_sums:
    padded = pl.cdiv(length, tile.stationary) * tile.stationary
    shape = batch, heads, padded
    outputs["sums"] = jax.ShapeDtypeStruct(shape, jnp.float32)
  return outputs


def _scratch(tile, width, dtype, has_d_out, has_sums, has_vectors):
  """The contents of shared memory, in the order of the kernel's arguments."""

  def blocks(count, rows):
    return smem_blocks(tile, count, rows, width, dtype)

  queries_full = plgpu.Barrier(
    num_barriers=2 * tile.warpgroups, num_arrivals=2 if has_d_out else 1
  )
  keys_full = plgpu.Barrier(
    num_barriers=tile.stages, num_arrivals=2 if has_vectors else 1
  )
  full = plgpu.Barrier(num_barriers=tile.stages)
  free = free_barrier(tile)
  return [
    blocks(2 * tile.warpgroups, tile.block_q),
    blocks(tile.warpgroups, tile.block_q) if has_d_out else None,
    plgpu.SMEM((tile.warpgroups, tile.block_q), jnp.float32)
    if has_sums
    else None,
    vectors.scratch(tile) if has_vectors else None,
    blocks(tile.stages, tile.block_kv),
    blocks(tile.stages, tile.block_kv),
    queries_full, keys_full, full, free, free,
  ]  # fmt: skip


# Compute warpgroups.


def _compute(context):
  _load_queries(context, int32(0))
  _load_d_out(context, int32(0))
  one = functools.partial(_compute_tile, context)
  lax.fori_loop(0, context.tiles, one, int32(0))
  plgpu.wait_smem_to_gmem(0)


def _load_queries(context, i):
  _load(context, i, context.gmem.query, context.q_smem.at[context.slot(i)])


def _load_d_out(context, i):
  if context.do_smem is not None:
    smem = context.do_smem.at[context.warpgroup]
    _load(context, i, context.gmem.d_out, smem)


def _load(context, i, source, smem):
  """Starts to load this warpgroup's rows of the i-th tile, if there is one."""

  @pl.when(i < context.tiles)
  def _():
    block_q = context.tile.block_q
    batch, head, first, _ = context.locate(i)
    at = batch, pl.ds(first + context.warpgroup * block_q, block_q), head
    plgpu.copy_gmem_to_smem(
      source.at[at], smem, context.q_full.at[context.slot(i)]
    )


def _compute_tile(context, i, count):
  """The i-th tile; returns the number of blocks that were streamed by then."""
  form, tile, gmem = context.form, context.tile, context.gmem
  batch, head, first, steps = context.locate(i)
  first += context.warpgroup * tile.block_q
  place = first + weights.offset(gmem.offsets, batch)
  *_, full_high, high = visible_blocks(
    place, place + tile.block_q - 1, form.left, form.right, tile.block_kv,
    context.key_len,
  )  # fmt: skip
  steps = steps.skip_from(high)
  if gmem.plan is None:  # With a plan, masks depend on more than positions.
    steps = steps.mask_from(full_high)
  bias, slope = weights.scalars(form, gmem.scalars, batch, head)
  ids = weights.load_ids(
    form, gmem.query_ids, batch, first, tile.block_q, weights.ROW
  )
  smem = context.q_smem.at[context.slot(i)]
  queries = Queries(
    context=context, batch=batch, place=place, bias=bias, slope=slope, ids=ids,
    end=gmem.key_lengths[batch] if form.end else None,
    rows=weights.load_rows(gmem.rows, batch, head, first, tile.block_q),
    vector=vectors.stationary(gmem.parts, batch, head, first, tile.block_q),
    steps=steps, count=count, smem=smem,
  )  # fmt: skip
  width = gmem.query.shape[-1]
  out, sums = pl.run_scoped(
    functools.partial(_sum_blocks, queries, i),
    accumulator(tile.block_q, width),
  )
  out = out if context.scale == 1 else out * context.scale
  for x in sums:
    x = registers.sum_of_threads(x)
    if context.divides:
      inverse = numerics.inverse(x)
      out = out * lax.broadcast_in_dim(inverse, out.shape, [0])
    sums_smem = context.sums_smem.at[context.warpgroup]
    rows = pl.ds(first, tile.block_q)
    store(x * context.sum_scale, sums_smem, gmem.sums.at[batch, head, rows])
  out = zero_padding(out, first, gmem.query_lengths, batch)
  destination = gmem.out.at[batch, pl.ds(first, tile.block_q), head]
  store(out.astype(context.dtype), smem, destination)
  return count + steps.count


def _sum_blocks(queries, i, total):
  """The contributions of all blocks; meanwhile it loads the next queries."""
  context = queries.context
  plgpu.barrier_wait(context.q_full.at[context.slot(i)])
  # The slot of the next tile's queries still holds the last tile's output.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  _load_queries(context, i + 1)
  has_sums = context.sum_scale is not None
  sums = [weights.zeros(context.tile.block_q)] if has_sums else []
  sums = context.accumulate(queries, total, sums)
  _load_d_out(context, i + 1)
  return total[...], sums


def loops(
  queries: Queries,
  step: Callable[[jax.Array, list, bool], list],
  sums: list,
) -> list:
  """Calls step(e, sums, masked) for all steps, first for those with a mask.

  A step takes and returns the totals of registers.add_to_rows. If only other
  warpgroups need a block, this one waits for it and releases it.
  """
  context, steps = queries.context, queries.steps

  def skip(e, _):
    for ring in (context.keys, context.values):
      ring.wait(queries.count + e)
      ring.release(queries.count + e)

  def run(first, last, sums, masked):
    return lax.fori_loop(first, last, lambda e, x: step(e, x, masked), sums)

  first = int32(0)
  if context.form.masked:
    lax.fori_loop(first, steps.skipped, skip, None)
    sums = run(steps.skipped, steps.masked, sums, True)
    first = steps.masked
  return run(first, steps.count, sums, False)


# The memory warpgroup.


def _feed(context):
  one = functools.partial(_feed_tile, context)
  count = lax.fori_loop(0, context.tiles, one, int32(0))
  context.keys.drain(count)
  context.values.drain(count)


def _feed_tile(context, i, count):
  """Streams the blocks of the i-th tile."""
  batch, head, _, steps = context.locate(i)
  gmem, block_kv = context.gmem, context.tile.block_kv

  def step(e, _):
    rows = pl.ds(steps.block(e) * block_kv, block_kv)
    at = batch, rows, div(head, context.group)
    context.keys.fill(count + e, gmem.key.at[at])
    if gmem.columns is not None:
      columns = gmem.columns.at[batch, rows, head]
      context.keys.fill_too(count + e, columns, context.columns_smem)
    context.values.fill(count + e, gmem.value.at[at])

  lax.fori_loop(0, steps.count, step, None)
  return count + steps.count
