"""The gradient of the logits for a block of queries, with stationary keys.

dkv.py and fused_backward.py share it. Scores are transposed: rows are keys,
columns are queries.

  s = k q^T, dp = v do^T    tensor cores
  p = phi(s)                registers, while dp is computed
  dv += p do                tensor cores
  dz = phi'(s) dp           registers, while dv is computed

If rows are normalised, one or two numbers for each query change p and dp (see
weights.of_normalized). They are in shared memory beside do.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from sigattn.kernels.mosaic import registers, vectors, weights
from sigattn.kernels.mosaic.key_tiles import Head
from sigattn.kernels.mosaic.pipeline import (
  accumulator,
  at_step,
  preset,
  read,
  zero_padding,
)


@dataclasses.dataclass(frozen=True)
class _Step:
  """One step: a block of queries and the stationary keys."""

  head: Head
  e: jax.Array
  masked: bool | jax.Array
  q: Any  # in shared memory, like the next three
  d_out: Any
  keys: Any
  values: Any
  columns: Any  # of the queries' logit vectors; None without them


def compute(
  head: Head, e: jax.Array, totals: list, masked: bool | jax.Array
) -> tuple[jax.Array | None, list]:
  """(dz of step e, sums of dz), with the product for dv still running.

  dz = phi'(z) (do v^T), (keys, queries) float32, in registers; None if dk is
  not computed. totals: the sums of dz up to this step.
  """
  context = head.context
  smem, c = context.smem, head.position(e)
  q, d_out = context.queries.block(c), context.d_outs.block(c)
  here = at_step(context.warpgroup, c)
  columns = smem.columns
  if columns is not None:
    columns = context.queries.of_step(columns, c)
  step = _Step(
    head=head, e=e, masked=masked, q=q, d_out=d_out, keys=smem.keys.at[here],
    values=smem.values.at[here], columns=columns,
  )  # fmt: skip
  context.queries.wait(c)
  context.d_outs.wait(c)
  total = accumulator(context.tile.block_kv, context.tile.block_q)
  return pl.run_scoped(
    functools.partial(_start, step, totals),
    total, None if head.dk is None else total,
  )  # fmt: skip


def _start(step, totals, s_ref, dp_ref):
  """Starts the scores, and returns what `compute` returns."""
  context = step.head.context
  rows = context.smem.rows
  is_preset = (
    context.tile.preset and dp_ref is not None
    and rows is not None and rows.shape[1] == 1
  )  # fmt: skip
  if is_preset:  # The tensor cores add dp to -shift.
    [minus_shift] = _load_rows(step)
    preset(dp_ref, lax.broadcast_in_dim(minus_shift, dp_ref.shape, [1]))
  plgpu.wgmma(s_ref, step.keys, step.q.transpose((1, 0)))
  if step.columns is not None:
    vectors.add(s_ref, step.head.vector, step.columns)
  # Otherwise the numbers are loaded where they are needed, because there are no
  # registers to keep them.
  load_rows = list if is_preset else functools.partial(_load_rows, step)
  return _finish(step, totals, s_ref, dp_ref, load_rows)


def _finish(step, totals, s_ref, dp_ref, load_rows):
  """Weights, the product for dv, and dz."""
  head, context = step.head, step.head.context
  form = context.form
  if dp_ref is not None:
    plgpu.wgmma(dp_ref, step.values, step.d_out.transpose((1, 0)))
  s = read(s_ref, int(head.dk is not None))
  p, derivative, place = _weigh(step, s)
  if head.dv is not None:
    scaled = p
    for inverse in load_rows()[1:]:
      scaled = scaled * lax.broadcast_in_dim(inverse, p.shape, [1])
    scaled = weights.to_16_bits(scaled, form.weight_scale, context.dtype)
    plgpu.wgmma(head.dv, scaled, step.d_out)
  if dp_ref is None:
    return None, totals
  dz = derivative()  # The tensor cores compute dp at the same time.
  dp = read(dp_ref, int(head.dv is not None))
  dp = weights.of_normalized(dp, load_rows(), axis=1)
  dz = dz * dp
  if context.gmem.row_sums is not None:
    _add_to_rows(step, p, dz, dp)
  if not context.num_sums:
    return dz, totals
  parts = [dz.sum(1)]
  if form.alibi:
    parts.append(-(dz * place.distance(dz, form.offset)).sum(1))
  return dz, [t + x for t, x in zip(totals, parts, strict=True)]


def _add_to_rows(step, p, dz, dp):
  """Adds the sums over the keys to those of the step's queries."""
  head, context = step.head, step.head.context
  keys, gmem = head.keys, context.gmem
  is_normalized = gmem.rows is not None
  x = weights.row_gradient(context.form, p, dz, dp, is_normalized)
  # Without normalisation padding adds nothing, because its values are 0.
  if is_normalized:
    x = zero_padding(x, keys.first, gmem.key_lengths, keys.batch)
  start = keys.steps.block(step.e) * context.tile.block_q
  of_warpgroup = gmem.row_sums.at[context.warpgroup]
  rows = of_warpgroup.at[keys.batch, head.head, pl.ds(start, x.shape[1])]
  registers.add_columns(x, rows)


def _load_rows(step):
  """The numbers of the step's queries, as in weights.of_normalized."""
  context = step.head.context
  smem = context.smem.rows
  if smem is None:
    return []
  of_step = context.d_outs.of_step(smem, step.head.position(step.e))
  return [
    plgpu.load(of_step.at[kind], layout=weights.COLUMN)
    for kind in range(smem.shape[1])
  ]


def _weigh(step, s):
  """(weights, their derivative, the Place of the block)."""
  head, context = step.head, step.head.context
  keys, block_q = head.keys, context.tile.block_q
  start = keys.steps.block(step.e) * block_q
  offset = weights.offset(context.gmem.offsets, keys.batch)
  place = weights.Place(keys.first, start + offset, of_queries=False)

  def ids():
    return keys.ids, weights.load_ids(
      context.form, context.gmem.query_ids, keys.batch, start, block_q,
      weights.COLUMN,
    )  # fmt: skip

  p, derivative = weights.weights(
    context.form, s, head.bias, head.slope, place, ids, step.masked,
    polynomial=context.tile.polynomial,
  )  # fmt: skip
  return p, derivative, place
