"""Kernels with stationary keys: what dkv.py and fused_backward.py share.

A program computes tiles of keys, one after another. Each of its compute
warpgroups has block_kv of the tile's keys, and keeps float32 accumulators
(block_kv, H) of their dk and dv in registers. Blocks of block_q queries, with
their cotangents d_out, are streamed past all warpgroups, for each query head
that shares the key head. Scores are transposed: rows are keys, columns are
queries.

  shared memory, W warpgroups, in 16-bit numbers
    keys, values    2 x W x block_kv x H
    queries, d_out  2 x stages x block_q x H   two rings
    dz              2 W x block_kv x block_q   fused_backward.py only
    dk, dv          W x block_kv x H           fused_backward.py only; in dkv.py
                                               they leave through the slots of
                                               keys and values
    rows            stages x (1 or 2) x block_q x float32, if normalised
    columns         stages x block_q x 16      of the queries' logit vectors, if
                                               given
    sums of dz      W x (1 or 2) x block_kv x float32, if trained
  For example, the fused kernel at H = 128 has 3 x 2 x 64 x 128 stationary
  numbers, 2 x 3 x 64 x 128 streamed numbers and 4 x 64 x 64 of dz. These are
  96 + 96 + 32 KiB of 227 KiB.

  barriers                      who arrives                     who waits
    kv_full[W]                  copy engine: keys and values    the warpgroup
    kv_free                     each compute warpgroup          memory
    q_full, do_full[stages]     copy engine (q: and columns,    all compute
                                do: and rows)
    q_free, do_free[stages]     each compute warpgroup (in a    memory
                                cluster those of both programs)
    dz_written                  each compute warpgroup          memory
    dz_ready                    memory                          all compute
  Only fused_backward.py has the last two.
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

from sigattn.kernels.mosaic import vectors, weights
from sigattn.kernels.mosaic.blocks import (
  Steps,
  StepsInOrder,
  blocks_of_tile,
  int32,
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
from sigattn.kernels.mosaic.tiles import KeyTile


@dataclasses.dataclass(frozen=True)
class Variant:
  """The differences between the two kernels."""

  name: str  # for profilers
  steps: type[Steps] | type[StepsInOrder]
  # (head, sums of dz) -> sums of dz: adds dk and dv of all blocks of a head.
  accumulate: Callable[["Head", list], list]
  # Makes dz visible to products. The memory warpgroup calls it in each step.
  publish_dz: Callable[["Context"], None] | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a problem; letters as in problem.py."""

  batch: int
  query_len: int
  heads: int
  key_len: int
  kv_heads: int
  width: int

  @classmethod
  def of(cls, query: jax.Array, key: jax.Array) -> "Sizes":
    """The sizes of query (B, T, N, H) and key (B, S, K, H)."""
    batch, query_len, heads, width = query.shape
    _, key_len, kv_heads, _ = key.shape
    return cls(
      batch=batch, query_len=query_len, heads=heads, key_len=key_len,
      kv_heads=kv_heads, width=width,
    )  # fmt: skip

  @property
  def group(self) -> int:
    """Query heads that share a key head."""
    return self.heads // self.kv_heads


@dataclasses.dataclass(frozen=True)
class Smem:
  """The contents of shared memory; the top of the file explains them."""

  keys: Any
  values: Any
  queries: Any
  d_outs: Any
  rows: Any
  columns: Any
  dz: Any
  out: Any
  sums: Any
  kv_full: Any
  kv_free: Any
  q_full: Any
  do_full: Any
  q_free: Any
  do_free: Any
  dz_written: Any
  dz_ready: Any


@dataclasses.dataclass(frozen=True)
class Context:
  """What a program knows before it begins."""

  variant: Variant
  form: weights.Form
  tile: KeyTile
  schedule: Schedule
  sizes: Sizes
  scales: Mapping[str, float]
  gmem: Gmem
  smem: Smem
  queries: Ring
  d_outs: Ring
  warpgroup: jax.Array
  tiles: jax.Array  # number of this program's tiles

  @property
  def dtype(self) -> jnp.dtype:
    """The dtype of query, key, value and the results."""
    return self.gmem.query.dtype

  @property
  def num_sums(self) -> int:
    """How many sums of dz each key has: 0, 1 or, with ALiBi, 2."""
    return 0 if self.smem.sums is None else 1 + self.form.alibi

  def locate(self, i: jax.Array) -> tuple:
    """(batch, key head, first key, blocks) of this program's i-th tile."""
    tile, gmem, form = self.tile, self.gmem, self.form
    head, index = self.schedule.tile(gmem.table, i)
    batch, head = div(head, self.sizes.kv_heads), rem(head, self.sizes.kv_heads)
    blocks = blocks_of_tile(
      gmem.plan, batch, index, tile.stationary, form.right, form.left,
      tile.block_q, self.sizes.query_len,
    )  # fmt: skip
    steps = self.variant.steps.make(*blocks)
    first = index * tile.stationary + place_in_cluster(tile)
    return batch, head, first, steps


@dataclasses.dataclass(frozen=True)
class Keys:
  """The keys of one warpgroup in one tile."""

  context: Context
  batch: jax.Array
  kv_head: jax.Array
  first: jax.Array
  ids: jax.Array | None
  steps: Steps | StepsInOrder
  count: jax.Array  # blocks that were streamed before this tile


@dataclasses.dataclass(frozen=True)
class Head:
  """The keys of one warpgroup, and one of the query heads that use them."""

  keys: Keys
  g: jax.Array  # its number within the group
  head: jax.Array
  bias: float | jax.Array
  slope: jax.Array | None
  vector: jax.Array | None  # as vectors.stationary
  dk: Any  # an accumulator; None if dk is not computed
  dv: Any

  @property
  def context(self) -> Context:
    """The context of the program."""
    return self.keys.context

  def position(self, e: jax.Array) -> jax.Array:
    """How many blocks were streamed before step e."""
    return self.keys.count + self.g * self.keys.steps.count + e


def build(
  variant: Variant,
  form: weights.Form,
  tile: KeyTile,
  schedule: Schedule,
  inputs: Mapping[str, jax.Array | None],
  scales: Mapping[str, float],
  sums: bool,
) -> tuple[
  Callable[[Mapping[str, Any]], list[jax.Array]],
  dict[str, jax.ShapeDtypeStruct],
]:
  """(a function of the inputs that runs the kernel, the types of its results).

  Args:
    variant: which of the two kernels.
    form, tile, schedule: the mathematics, and how it is divided into tiles.
    inputs: names of Gmem and arrays. Rows from key_lengths on become 0.
    scales: the factors of those of "dk" and "dv" that are computed.
    sums: whether dz, and with ALiBi -dz distance, is summed over the queries.
  """
  query, key = inputs["query"], inputs["key"]
  sizes = Sizes.of(query, key)

  fused = variant.publish_dz is not None

  def kernel(gmem, *smem):
    smem = Smem(*smem)
    context = Context(
      variant=variant, form=form, tile=tile, schedule=schedule, sizes=sizes,
      scales=scales, gmem=gmem, smem=smem,
      queries=_ring(tile, fused, smem.queries, smem.q_full, smem.q_free),
      d_outs=_ring(tile, fused, smem.d_outs, smem.do_full, smem.do_free),
      warpgroup=lax.axis_index("warpgroup"),
      tiles=schedule.count(gmem.table),
    )  # fmt: skip
    by_role(
      tile, context.warpgroup, functools.partial(_compute, context),
      functools.partial(_feed, context),
    )  # fmt: skip

  num_sums = (1 + form.alibi) if sums else 0
  outputs = {
    name: jax.ShapeDtypeStruct(key.shape, key.dtype) for name in scales
  }
  if sums:
    padded = pl.cdiv(sizes.key_len, tile.stationary) * tile.stationary
    shape = num_sums, sizes.batch, sizes.heads, padded
    outputs["dz_sums"] = jax.ShapeDtypeStruct(shape, jnp.float32)
  scratch = _scratch(tile, key, inputs, num_sums, fused)
  kernel = launch(
    variant.name, kernel, schedule, tile, inputs, outputs, scratch,
    automatic_barriers=not fused,  # dz has barriers of its own.
  )  # fmt: skip
  return kernel, outputs


def _ring(tile, fused, smem, full, free):
  # The fused kernel has no registers for the addresses of two slots: with them
  # it spilled 264 bytes at head width 128, and with hides_slots it spills 40.
  hides_slots = fused and tile.stages == 2
  return Ring(smem, full, free, tile.stages, tile.cluster, hides_slots)


def _scratch(tile, key, inputs, num_sums, fused):
  """The contents of shared memory, in the order of Smem."""

  def blocks(count, rows, width):
    return smem_blocks(tile, count, rows, width, key.dtype)

  width = key.shape[-1]
  stationary = blocks(tile.warpgroups, tile.block_kv, width)
  streamed = blocks(tile.stages, tile.block_q, width)
  kinds = 0 if inputs["rows"] is None else inputs["rows"].shape[2]
  has_vectors = inputs["columns"] is not None
  dz = blocks(2 * tile.warpgroups, tile.block_kv, tile.block_q)
  sums = plgpu.SMEM((tile.warpgroups, num_sums, tile.block_kv), jnp.float32)
  rows = plgpu.SMEM((tile.stages, kinds, tile.block_q), jnp.float32)
  q_full = plgpu.Barrier(
    num_barriers=tile.stages, num_arrivals=2 if has_vectors else 1
  )
  do_full = plgpu.Barrier(
    num_barriers=tile.stages, num_arrivals=2 if kinds else 1
  )
  free = free_barrier(tile)
  by_all = plgpu.Barrier(num_arrivals=tile.warpgroups)
  return [
    stationary, stationary, streamed, streamed,
    rows if kinds else None,
    vectors.scratch(tile) if has_vectors else None,
    dz if fused else None,
    stationary if fused else None,
    sums if num_sums else None,
    plgpu.Barrier(num_barriers=tile.warpgroups, num_arrivals=2),
    by_all, q_full, do_full, free, free, by_all, plgpu.Barrier(),
  ]  # fmt: skip


# Compute warpgroups.


def _compute(context):
  one = functools.partial(_compute_tile, context)
  lax.fori_loop(0, context.tiles, one, int32(0))
  plgpu.wait_smem_to_gmem(0)


def _compute_tile(context, i, count):
  """The i-th tile; returns the number of blocks that were streamed by then."""
  tile, scales = context.tile, context.scales
  batch, kv_head, first, steps = context.locate(i)
  first += context.warpgroup * tile.block_kv
  ids = weights.load_ids(
    context.form, context.gmem.key_ids, batch, first, tile.block_kv, weights.ROW
  )
  keys = Keys(
    context=context, batch=batch, kv_head=kv_head, first=first, ids=ids,
    steps=steps, count=count,
  )  # fmt: skip
  total = accumulator(tile.block_kv, context.sizes.width)
  dk, dv = pl.run_scoped(
    functools.partial(_sum_heads, keys),
    *(total if name in scales else None for name in ("dk", "dv")),
  )
  lengths = context.gmem.key_lengths
  if dv is not None:
    dv = zero_padding(dv, first, lengths, batch)
  # If rows are not normalised, dk is 0 there already, because the values are 0.
  if dk is not None and context.gmem.rows is not None:
    dk = zero_padding(dk, first, lengths, batch)
  _store(keys, {"dk": dk, "dv": dv})
  return count + context.sizes.group * steps.count


def _sum_heads(keys, dk, dv):
  """dk and dv of all query heads of the key head."""
  context = keys.context
  plgpu.barrier_wait(context.smem.kv_full.at[context.warpgroup])
  if context.sizes.group == 1:
    _sum_blocks(keys, dk, dv, int32(0))
  else:
    pl.loop(0, context.sizes.group)(
      functools.partial(_sum_blocks, keys, dk, dv)
    )
  return [None if x is None else x[...] for x in (dk, dv)]


def _sum_blocks(keys, dk, dv, g):
  """Adds dk and dv of one query head, and stores its sums of dz."""
  context = keys.context
  sums = context.smem.sums
  head = keys.kv_head * context.sizes.group + g
  bias, slope = weights.scalars(
    context.form, context.gmem.scalars, keys.batch, head
  )
  zeros = weights.zeros(context.tile.block_kv)
  vector = vectors.stationary(
    context.gmem.parts, keys.batch, head, keys.first, context.tile.block_kv
  )
  of_head = Head(
    keys=keys, g=g, head=head, bias=bias, slope=slope, vector=vector, dk=dk,
    dv=dv,
  )  # fmt: skip
  totals = context.variant.accumulate(of_head, [zeros] * context.num_sums)
  rows = pl.ds(keys.first, context.tile.block_kv)
  for index, total in enumerate(totals):
    store(
      total,
      sums.at[context.warpgroup, index],
      context.gmem.dz_sums.at[index, keys.batch, head, rows],
    )


def _store(keys, gradients):
  """Stores dk and dv, and signals that the slots of the keys are free."""
  context = keys.context
  smem, scales = context.smem, context.scales
  slots = {"dk": smem.keys, "dv": smem.values}
  if smem.out is not None:  # dk and dv have a slot of their own.
    plgpu.barrier_arrive(smem.kv_free)
    slots = dict.fromkeys(slots, smem.out)
  rows = pl.ds(keys.first, context.tile.block_kv)
  for name, scale in scales.items():
    destination = getattr(context.gmem, name).at[keys.batch, rows, keys.kv_head]
    gradient = (gradients[name] * scale).astype(context.dtype)
    store(gradient, slots[name].at[context.warpgroup], destination)
  if smem.out is None:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(smem.kv_free)


# The memory warpgroup.


def _feed(context):
  one = functools.partial(_feed_tile, context)
  count = lax.fori_loop(0, context.tiles, one, int32(0))
  plgpu.barrier_wait(context.smem.kv_free)
  context.queries.drain(count)
  context.d_outs.drain(count)


def _feed_tile(context, i, count):
  """Brings the keys and values of the i-th tile, and streams its blocks."""
  batch, kv_head, first, steps = context.locate(i)
  publish_dz = context.variant.publish_dz
  # dz is published for the step that is this many steps before the filled one.
  behind = context.tile.stages - 1
  fill = functools.partial(_fill, context, batch, kv_head, steps, count)

  def step(x, _):
    fill(x)
    if publish_dz is not None:
      pl.when(x >= behind)(functools.partial(publish_dz, context))

  fill(int32(0))  # The first block is loaded while the previous tile ends.

  @pl.when(i > 0)
  def _():
    plgpu.barrier_wait(context.smem.kv_free)

  _load_keys(context, batch, kv_head, first)
  lax.fori_loop(1, context.sizes.group * steps.count, step, None)
  if publish_dz is not None:
    rest = jnp.minimum(behind, context.sizes.group * steps.count)
    lax.fori_loop(0, rest, lambda *_: publish_dz(context), None)
  return count + context.sizes.group * steps.count


def _fill(context, batch, kv_head, steps, count, x):
  """Streams the x-th block of a tile, counted over the heads of a group."""
  gmem, block_q = context.gmem, context.tile.block_q
  g, e = lax.div(x, steps.count), lax.rem(x, steps.count)
  at = batch, pl.ds(steps.block(e) * block_q, block_q)
  at = *at, kv_head * context.sizes.group + g
  context.queries.fill(count + x, gmem.query.at[at])
  if gmem.columns is not None:
    columns = gmem.columns.at[at]
    context.queries.fill_too(count + x, columns, context.smem.columns)
  context.d_outs.fill(count + x, gmem.d_out.at[at])
  if gmem.rows is not None:
    _, queries, head = at
    rows = gmem.rows.at[batch, head, :, queries]
    context.d_outs.fill_too(count + x, rows, context.smem.rows)


def _load_keys(context, batch, kv_head, first):
  gmem, smem, block_kv = context.gmem, context.smem, context.tile.block_kv
  for n in range(context.tile.warpgroups):
    at = batch, pl.ds(first + n * block_kv, block_kv), kv_head
    for source, slots in ((gmem.key, smem.keys), (gmem.value, smem.values)):
      plgpu.copy_gmem_to_smem(source.at[at], slots.at[n], smem.kv_full.at[n])
