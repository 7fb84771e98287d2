"""The gradient of the queries: dq = scale dz k, with stationary queries.

The two-kernel backward pass is this kernel and dkv.py. It has seven matrix
products, and gives the same bits in every run. query_tiles.py says which
warpgroups, shared memory and barriers there are. One step of a compute
warpgroup, for one block of keys and values:

  wait k_full, v_full   s = q k^T, dp = do v^T       tensor cores
  v_free                dz = phi'(s) dp              registers
                        dq += dz k                   tensor cores
  k_free
"""

import functools
from collections.abc import Mapping

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from sigattn.kernels.mosaic import query_tiles, registers, weights
from sigattn.kernels.mosaic.pipeline import accumulator, read
from sigattn.kernels.mosaic.schedule import Schedule
from sigattn.kernels.mosaic.tiles import QueryTile
from sigattn.kernels.mosaic.weights import Form, to_16_bits


def run(
  form: Form,
  tile: QueryTile,
  schedule: Schedule,
  inputs: Mapping[str, jax.Array | None],
  scale: float,
  sums: bool = False,
) -> list[jax.Array]:
  """[scale dz k], (B, T, N, H), where dz = Form.dz_scale phi'(z) (do v^T).

  With inputs["rows"], weights.of_normalized is applied to do v^T. With `sums`
  it also returns the sums over keys of weights.row_gradient, (B, N, T and the
  rest of a tile).

  inputs: names of pipeline.Gmem and arrays. Rows from query_lengths on are 0.
  """
  return query_tiles.run(
    "sigattn_dq", _accumulate, form, tile, schedule, inputs, scale,
    1.0 if sums else None,
  )  # fmt: skip


def _accumulate(queries, total, sums):
  """Adds dz k of all blocks; returns the sums of rows."""
  step = functools.partial(_step, queries, total)
  return query_tiles.loops(queries, step, sums)


def _step(queries, total, e, sums, masked):
  tile, keys = queries.context.tile, queries.context.keys
  c = queries.count + e
  keys.wait(c)
  queries.context.values.wait(c)
  shape = accumulator(tile.block_q, tile.block_kv)
  dz, sums = pl.run_scoped(
    functools.partial(_logit_gradient, queries, e, c, sums, masked),
    shape,
    shape,
  )
  plgpu.wgmma(total, dz, keys.block(c))
  plgpu.wgmma_wait(0)
  keys.release(c)
  return sums


def _logit_gradient(queries, e, c, sums, masked, s_ref, dp_ref):
  """(dz of step e in 16 bits, sums). c: the step, counted over all tiles."""
  context = queries.context
  form, values = context.form, context.values
  queries.start_scores(s_ref, c)
  plgpu.wgmma(dp_ref, queries.d_out, values.block(c).transpose((1, 0)))
  p, derivative = queries.weigh(read(s_ref, 1), e, masked)
  dz = derivative()  # The tensor cores compute dp at the same time.
  dp = weights.of_normalized(read(dp_ref, 0), queries.rows, axis=0)
  dz = dz * dp
  values.release(c)
  sums = [
    registers.add_to_rows(
      x, weights.row_gradient(form, p, dz, dp, bool(queries.rows))
    )
    for x in sums
  ]
  return to_16_bits(dz, form.dz_scale, context.dtype), sums
