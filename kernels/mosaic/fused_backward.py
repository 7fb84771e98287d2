"""The fused backward pass: dk, dv and dq in one kernel with stationary keys.

This takes five matrix products, where dq.py and dkv.py take seven. Keys are
stationary, so each block of queries gets a share of its dq from each tile of
keys. Programs add the shares to float32 sums in global memory (reduce.py) as
they compute them. So the last bits differ from run to run.

key_tiles.py says which warpgroups, shared memory and barriers there are. The
share of dq of a step is dz k, summed over the keys of all compute warpgroups.
Each warpgroup computes 64 x 64 numbers of it, and needs dz of all warpgroups
for that. So dz goes through shared memory, in two slots by turns. The share of
step e - 1 is computed in step e, so that no warpgroup waits for another one's
dz of the same step.

  compute warpgroup, step e                           memory warpgroup
    wait q_full, do_full
    s, dp, p, dz as in dkv.py
    wait dz_ready (of step e - 1)
    start share = dz k          (of step e - 1)
    write dz to its slot
    start dk += dz q
    do_free
    arrive dz_written  ------------------------->     wait dz_written
    add the share to global memory                    fence: commit_smem
    q_free             <-------------------------     arrive dz_ready

The warpgroups keep half a step apart: the products of one run while the other
computes its weights. The memory warpgroup fences. A compute warpgroup would
have to wait at the fence until its additions to dq have arrived in memory.
"""

import functools
from collections.abc import Mapping

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from sigattn.kernels.mosaic import key_tiles, logit_gradient, reduce
from sigattn.kernels.mosaic.blocks import StepsInOrder, int32
from sigattn.kernels.mosaic.pipeline import accumulator, at_step, read
from sigattn.kernels.mosaic.schedule import Schedule, rem
from sigattn.kernels.mosaic.tiles import KeyTile
from sigattn.kernels.mosaic.weights import Form, to_16_bits

_SHARE = reduce.SIDE  # queries and columns of dq that a warpgroup adds


def run(
  form: Form,
  tile: KeyTile,
  schedule: Schedule,
  inputs: Mapping[str, jax.Array | None],
  scales: Mapping[str, float],
  sums: bool = False,
) -> list[jax.Array]:
  """[dq, row sums, dk, dv], and with `sums` the sums of dz, as in dkv.run.

  dq is dz k in the order of reduce.py, without a factor, and its queries are
  padded to a multiple of block_q. The row sums are those of
  weights.row_gradient, or None. inputs: names of pipeline.Gmem and arrays;
  dq_sums and row_sums hold the values to which the kernel adds.
  """
  variant = key_tiles.Variant(
    "sigattn_fused_backward", StepsInOrder, _accumulate, _publish_dz
  )
  kernel, outputs = key_tiles.build(
    variant, form, tile, schedule, inputs, scales, sums
  )

  # XLA sees one call that returns everything, and the sums of dq replace their
  # initial value. A mutable array (jax.new_ref) would do the same. But
  # custom_partitioning refuses its effects, so that no mesh of several devices
  # could run the kernel.
  def body(refs):
    sum_refs, result_refs = refs
    results = kernel({**inputs, **sum_refs})
    for ref, x in zip(result_refs, results, strict=True):
      ref[...] = x

  names = "dq_sums", "row_sums"
  totals = {name: inputs[name] for name in names if inputs[name] is not None}
  empty = [lax.empty(x.shape, x.dtype) for x in outputs.values()]
  totals, results = pl.run_state(body)((totals, empty))
  return [*(totals.get(name) for name in names), *results]


def rows_of_dq(length: int, tile: KeyTile) -> int:
  """The rows of the sums of dq. Blocks may reach beyond `length` queries."""
  return pl.cdiv(length, tile.block_q) * tile.block_q


def _accumulate(head, totals):
  """Adds dk, dv and dq of all blocks; returns the sums of dz.

  There is one loop for blocks with and without masks. Between two loops the
  compiler would move dk and dv to other registers, and run out of registers.
  Positions are compared in every block, mostly while products run. Ids are
  loaded only for blocks that need them.
  """
  totals = _first_step(head, totals)
  step = functools.partial(_step, head)
  totals = lax.fori_loop(1, head.keys.steps.count, step, totals)
  _add_last_share(head)
  return totals


def _logit_gradient(head, e, totals):
  form, steps = head.context.form, head.keys.steps
  masked = steps.masked(e) if form.segments else form.masked
  c = head.position(e)
  return c, *logit_gradient.compute(head, e, totals, masked)


def _first_step(head, totals):
  """The first step. It adds no share of dq, because no step precedes it."""
  context = head.context
  c, dz, totals = _logit_gradient(head, int32(0), totals)
  dz = to_16_bits(dz, context.form.dz_scale, context.dtype)
  _hand_over(head, c, dz)
  plgpu.wgmma_wait(1)
  context.d_outs.release(c)
  plgpu.barrier_arrive(context.smem.dz_written)
  plgpu.wgmma_wait(0)
  context.queries.release(c)
  return totals


def _step(head, e, totals):
  """A step that also adds the share of dq of the step before."""
  context = head.context
  c, dz, totals = _logit_gradient(head, e, totals)
  plgpu.barrier_wait(context.smem.dz_ready)
  dq = pl.run_scoped(
    functools.partial(_end_step, head, c, dz), accumulator(_SHARE, _SHARE)
  )
  _add_share(head, dq, e - 1)
  plgpu.wgmma_wait(0)
  context.queries.release(c)
  return totals


def _end_step(head, c, dz, share_ref):
  """Hands dz to the other warpgroups; returns the previous step's share of dq.

  The product for dk of this step is still running at the end.
  """
  context = head.context
  dz = to_16_bits(dz, context.form.dz_scale, context.dtype)
  _start_share(context, share_ref, c - 1)
  _hand_over(head, c, dz)
  dq = read(share_ref, 1)
  context.d_outs.release(c)
  plgpu.barrier_arrive(context.smem.dz_written)
  return dq


def _hand_over(head, c, dz):
  """Writes dz to its slot and starts the product for dk.

  There are two slots. The other one, of the step before, is being read.
  """
  context = head.context
  slot = rem(c, 2) * context.tile.warpgroups + context.warpgroup
  context.smem.dz.at[slot][...] = dz
  plgpu.wgmma(head.dk, dz, context.queries.block(c))


def _place_of_share(context):
  """(row, column) of this warpgroup's share in a block of dq."""
  row, column = int32(0), context.warpgroup
  if context.tile.block_q > _SHARE:
    row, column = column, row
  return row, column


def _start_share(context, ref, c):
  """Starts the products of this warpgroup's share of dq."""
  tile, smem = context.tile, context.smem
  row, column = _place_of_share(context)
  slot = rem(c, 2) * tile.warpgroups
  of_block = pl.ds(row * _SHARE, _SHARE)
  of_width = pl.ds(column * _SHARE, _SHARE)
  for other in range(tile.warpgroups):
    plgpu.wgmma(
      ref,
      smem.dz.at[slot + other, :, of_block].transpose((1, 0)),
      smem.keys.at[at_step(other, c), :, of_width],
    )


def _add_share(head, dq, e):
  context, keys = head.context, head.keys
  row, column = _place_of_share(context)
  row = keys.steps.block(e) * (context.tile.block_q // _SHARE) + row
  reduce.add(dq, context.gmem.dq_sums.at[keys.batch, head.head, row, column])


def _add_last_share(head):
  keys = head.keys

  def run(ref):
    last = keys.count + (head.g + 1) * keys.steps.count - 1
    _start_share(head.context, ref, last)
    return read(ref, 0)

  plgpu.barrier_wait(head.context.smem.dz_ready)
  dq = pl.run_scoped(run, accumulator(_SHARE, _SHARE))
  _add_share(head, dq, keys.steps.count - 1)


def _publish_dz(context):
  """Memory warpgroup: makes dz of a step visible to the tensor cores."""
  plgpu.barrier_wait(context.smem.dz_written)
  plgpu.commit_smem()
  plgpu.barrier_arrive(context.smem.dz_ready)
