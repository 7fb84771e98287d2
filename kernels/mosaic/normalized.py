"""What the backward pass needs of normalised rows, in one pass over memory.

A program reads 64 rows of do and of the output, and writes

  do / s            in 16 bits
  -do . out / s     one float32 a row
  zeros             to which the fused backward pass adds dq, if it follows

where s is the sum of a row's weights. XLA computed these in four kernels, which
read do twice: 86 us for 16,384 rows of 16 heads of width 128 on an H200. This
kernel takes 49 us without the zeros (benchmarks/NOTES.md, "Around the fused
backward pass"), for which XLA took 40.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels import numerics
from sigattn.kernels.mosaic import reduce, registers, weights
from sigattn.kernels.mosaic.pipeline import (
  one_warpgroup,
  smem_for_copies,
  store,
)
from sigattn.kernels.mosaic.schedule import div, rem

_ROWS = 64  # of a program


def divide(
  out: jax.Array,
  d_out: jax.Array,
  sums: jax.Array,
  normalizer: float,
  rows_of_dq: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """(d_out / (normalizer s), -d_out . out / (normalizer s), zeros).

  The first two are 0 where s is 0.

  Args:
    out, d_out: (B, T, N, H), in 16 bits.
    sums: s, (B, T, N) float32.
    normalizer: a number.
    rows_of_dq: the rows of the zeros.

  Returns:
    An array like d_out; (B, N, T and the rest of a block) float32, in which the
    rest is 0; and reduce.zeros with rows_of_dq rows, or None if that is 0.
  """
  batch, length, heads, width = out.shape
  blocks = pl.cdiv(max(length, rows_of_dq), _ROWS)
  rest = blocks * _ROWS - length
  sums = jnp.pad(sums, ((0, 0), (0, rest), (0, 0)))

  dq = []
  if rows_of_dq:
    shape = batch, heads, blocks, _ROWS * width
    dq.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  block = smem_for_copies(_ROWS, width, dtype=out.dtype)
  run = one_warpgroup(
    "sigattn_rows",
    functools.partial(_kernel, blocks, normalizer),
    batch * blocks * heads,
    [
      jax.ShapeDtypeStruct(out.shape, out.dtype),
      jax.ShapeDtypeStruct((batch, heads, blocks * _ROWS), jnp.float32),
      *dq,
    ],
    [
      block, block, plgpu.SMEM((_ROWS,), jnp.float32),
      plgpu.Barrier(num_arrivals=2),
    ],
  )  # fmt: skip
  divided, products, *dq = run(out, d_out, sums)
  return divided, products, reduce.in_tiles(dq[0]) if dq else None


def _kernel(blocks, normalizer, out, d_out, sums, divided, products, *others):
  """A program: 64 rows of a head."""
  *dq, out_smem, d_out_smem, products_smem, full = others
  # Programs that run at the same time have the heads of the same tokens, which
  # are neighbours in memory.
  program, heads = lax.axis_index("program"), out.shape[2]
  place, head = div(program, heads), rem(program, heads)
  example, block = div(place, blocks), rem(place, blocks)
  rows = pl.ds(block * _ROWS, _ROWS)
  at = example, rows, head
  plgpu.copy_gmem_to_smem(out.at[at], out_smem, full)
  plgpu.copy_gmem_to_smem(d_out.at[at], d_out_smem, full)
  for ref in dq:
    _set_to_zero(ref.at[example, head, block])
  s = plgpu.load(sums.at[at], layout=weights.ROW, optimized=False)
  inverse = numerics.inverse(s) * (1 / normalizer)
  plgpu.barrier_wait(full)
  do = d_out_smem[...].astype(jnp.float32)
  product = registers.add_to_rows(
    weights.zeros(_ROWS), do * out_smem[...].astype(jnp.float32)
  )
  product = registers.sum_of_threads(product) * -inverse
  do = do * lax.broadcast_in_dim(inverse, do.shape, [0])
  store(do.astype(d_out.dtype), d_out_smem, divided.at[at])
  store(product, products_smem, products.at[example, head, rows])
  plgpu.wait_smem_to_gmem(0)


def _set_to_zero(ref):
  """ref: (n,) float32 in global memory."""
  layout = plgpu.Layout.WG_STRIDED(ref.shape, vec_size=4)
  ref[...] = plgpu.layout_cast(jnp.zeros(ref.shape, jnp.float32), layout)
