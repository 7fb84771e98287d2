"""The gradients of keys and values, with stationary keys.

  dk = scale dz^T q    dv = scale p^T do

The two-kernel backward pass is this kernel and dq.py. key_tiles.py says which
warpgroups, shared memory and barriers there are. One step of a compute
warpgroup, for one block of queries:

  wait q_full, do_full   s = k q^T, dp = v do^T    tensor cores
                         p = phi(s)                registers
                         dv += p do                tensor cores
                         dz = phi'(s) dp           registers
                         dk += dz q                tensor cores
  q_free, do_free

Blocks with a mask come first, in a loop of their own.
"""

import functools
from collections.abc import Mapping

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from sigattn.kernels.mosaic import key_tiles, logit_gradient
from sigattn.kernels.mosaic.blocks import Steps, int32
from sigattn.kernels.mosaic.schedule import Schedule
from sigattn.kernels.mosaic.tiles import KeyTile
from sigattn.kernels.mosaic.weights import Form, to_16_bits


def run(
  form: Form,
  tile: KeyTile,
  schedule: Schedule,
  inputs: Mapping[str, jax.Array | None],
  scales: Mapping[str, float],
  sums: bool = False,
) -> list[jax.Array]:
  """Those of dk and dv that are in `scales`, (B, S, K, H) each.

  With `sums` also float32 sums of dz over the queries, (1, B, N, S and the rest
  of a tile). With ALiBi the first axis is 2, and the second entry is the sum of
  -dz distance.

  scales: the factors of "dk" and "dv". inputs: names of pipeline.Gmem and
  arrays. Rows of dv from key_lengths on are 0.
  """
  variant = key_tiles.Variant("sigattn_dkv", Steps, _accumulate)
  kernel, _ = key_tiles.build(
    variant, form, tile, schedule, inputs, scales, sums
  )
  return kernel(inputs)


def _accumulate(head, totals):
  """Adds dk and dv of all blocks; returns the sums of dz."""
  steps, first = head.keys.steps, int32(0)
  if head.context.form.masked:
    masked = functools.partial(_step, head, masked=True)
    totals = lax.fori_loop(first, steps.masked, masked, totals)
    first = steps.masked
  open_ = functools.partial(_step, head, masked=False)
  return lax.fori_loop(first, steps.count, open_, totals)


def _step(head, e, totals, masked):
  context = head.context
  c = head.position(e)
  dz, totals = logit_gradient.compute(head, e, totals, masked)
  if dz is not None:
    dz = to_16_bits(dz, context.form.dz_scale, context.dtype)
    plgpu.wgmma(head.dk, dz, context.queries.block(c))
  plgpu.wgmma_wait(0)
  context.d_outs.release(c)
  context.queries.release(c)
  return totals
