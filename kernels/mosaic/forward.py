"""The forward pass: out = scale p v, with stationary queries.

If rows are normalised, each thread also adds up its own weights of each row,
and the output is divided by the row sums at the end of a tile.

query_tiles.py says which warpgroups, shared memory and barriers there are. One
step of a compute warpgroup, for one block of keys and values:

  wait k_full   s = q k^T           tensor cores
  k_free        p = phi(s)          registers
  wait v_full   out += p v          tensor cores, p from registers
  v_free

Two warpgroups take turns by themselves: while the tensor cores compute the
products of one, the other computes its activation. Within one warpgroup:

  default   The values of the first 64 keys are multiplied while the weights of
            the next 64 are computed.
  overlap   The scores of step e and the values of step e - 1 are started
            together (head widths 96 and 128, which have registers for it).
"""

import functools
from collections.abc import Mapping

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels.mosaic import query_tiles, registers
from sigattn.kernels.mosaic.blocks import int32
from sigattn.kernels.mosaic.pipeline import accumulator, read
from sigattn.kernels.mosaic.schedule import Schedule
from sigattn.kernels.mosaic.tiles import QueryTile
from sigattn.kernels.mosaic.weights import Form, to_16_bits

_PART = 64  # keys whose values are started at once


def run(
  form: Form,
  tile: QueryTile,
  schedule: Schedule,
  inputs: Mapping[str, jax.Array | None],
  scale: float,
  sum_scale: float | None = None,
) -> list[jax.Array]:
  """[scale p v], (B, T, N, H), where p = Form.weight_scale phi(z).

  With `sum_scale` it returns [scale p v / s, sum_scale s], where s is the sum
  of a row's weights, (B, N, T and the rest of a tile) float32. Here p and s are
  in Form.output_unit.

  inputs: names of pipeline.Gmem and arrays. Rows from query_lengths on are 0.
  """
  accumulate = _accumulate_overlapping if tile.overlap else _accumulate
  return query_tiles.run(
    "sigattn_forward", accumulate, form, tile, schedule, inputs, scale,
    sum_scale, divides=sum_scale is not None,
  )  # fmt: skip


def _accumulate(queries, total, sums):
  """Adds p v of all blocks; returns the sums of rows."""
  step = functools.partial(_step, queries, total)
  return query_tiles.loops(queries, step, sums)


def _step(queries, total, e, sums, masked):
  """The products of the first keys run during the activation of the next."""
  tile, values = queries.context.tile, queries.context.values
  part = _PART if tile.block_kv % _PART == 0 else tile.block_kv
  s = _scores_alone(queries, e)
  values.wait(queries.count + e)
  for start in range(0, tile.block_kv, part):
    s_part = s[:, start : start + part]
    p, sums = _weights(queries, e, s_part, sums, masked, start)
    block = values.block(queries.count + e).at[pl.ds(start, part)]
    plgpu.wgmma(total, p, block)
  _finish(queries, e)
  return sums


def _accumulate_overlapping(queries, total, sums):
  """Adds p v of all blocks; scores and values are started together.

  This code waits only for the scores before it computes the weights of step e.
  In the machine code the wait for the values also comes ahead of the weights
  (benchmarks/NOTES.md). What remains is that each step has one round of
  products.
  """
  steps, values = queries.steps, queries.context.values
  first = int32(0)
  if queries.context.form.masked:  # The chain begins with the last masked step.
    first = jnp.maximum(steps.masked - 1, 0)
    masked_step = functools.partial(_step, queries, total)
    sums = lax.fori_loop(0, first, lambda e, x: masked_step(e, x, True), sums)
  s = _scores_alone(queries, first)
  p_and_sums = _weights(queries, first, s, sums, True)
  step = functools.partial(_overlapping_step, queries, total)
  p, sums = lax.fori_loop(first + 1, steps.count, step, p_and_sums)
  last = steps.count - 1
  values.wait(queries.count + last)
  _add_values(queries, total, last, p)
  _finish(queries, last)
  return sums


def _overlapping_step(queries, total, e, p_and_sums):
  """Starts the scores of step e and the values of e - 1; weights of step e.

  p_and_sums: the weights of step e - 1, and the sums of rows up to that step.
  """
  p, sums = p_and_sums

  def run(ref):
    _start_scores(queries, e, ref)
    _add_values(queries, total, e - 1, p)
    s = _read_scores(queries, e, ref, 1)
    p_and_sums = _weights(queries, e, s, sums, False)
    _finish(queries, e - 1)
    return p_and_sums

  queries.context.keys.wait(queries.count + e)
  queries.context.values.wait(queries.count + e - 1)
  return pl.run_scoped(run, _scores_accumulator(queries))


def _scores_accumulator(queries):
  tile = queries.context.tile
  return accumulator(tile.block_q, tile.block_kv)


def _scores_alone(queries, e):
  """The scores of a step, with nothing else running."""

  def run(ref):
    _start_scores(queries, e, ref)
    return _read_scores(queries, e, ref, 0)

  queries.context.keys.wait(queries.count + e)
  return pl.run_scoped(run, _scores_accumulator(queries))


def _start_scores(queries, e, ref):
  queries.start_scores(ref, queries.count + e)


def _read_scores(queries, e, ref, in_flight):
  s = read(ref, in_flight)
  queries.context.keys.release(queries.count + e)
  return s


def _weights(queries, e, s, sums, masked, column=0):
  """(weights in 16 bits, sums with theirs added)."""
  context = queries.context
  p, _ = queries.weigh(s, e, masked, column)
  sums = [registers.add_to_rows(x, p) for x in sums]
  return to_16_bits(p, context.form.weight_scale, context.dtype), sums


def _add_values(queries, total, e, p):
  plgpu.wgmma(total, p, queries.context.values.block(queries.count + e))


def _finish(queries, e):
  plgpu.wgmma_wait(0)
  queries.context.values.release(queries.count + e)
