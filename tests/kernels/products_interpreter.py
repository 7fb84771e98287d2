"""Runs the products of a token in Pallas's interpreter.

  python -m tests.kernels.products_interpreter ROWS ACTIVATION NORMS NEXT

The arguments are those of product_cases.draw, with 1 or 0 as the last one. One
program computes everything, so that no program waits for another one. The
program exits with 1 if a result is wrong. A missing arrival at a barrier hangs,
so set a time limit.
"""

import sys

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from sigattn.kernels import device, products
from sigattn.kernels.mosaic import grid, row_registers
from tests.kernels import product_cases


def _pretend():
  """Simulates a card with one multiprocessor, in plain JAX."""
  device.current = lambda: device.Device("NVIDIA H100", 90, 1)
  grid.arrive = grid.wait = grid.fence = lambda *_: None
  row_registers.sum_of_all = lambda x, _: x.sum()
  row_registers.add_products = lambda total, x, row: (
    total + x.astype(jnp.float32) * row.reshape(1, *x.shape[1:])
  )
  row_registers.sums_of_rows = _sums_of_rows
  row_registers.write_first = lambda x, out: _set(out, x[: out.shape[0]])
  row_registers.write_columns = _write_columns
  row_registers.of_one_i = lambda x, i: jnp.repeat(
    x.reshape(4, 2, 8, -1)[:, i : i + 1], 2, axis=1
  ).reshape(x.shape)
  row_registers.hand_over = lambda x, smem: _set(smem, x.reshape(-1))
  row_registers.take = lambda like, smem: smem[...].reshape(like.shape)


def _set(ref, x):
  ref[...] = x


def _sums_of_rows(x, _, parts):
  sums = x.reshape(parts, -1, x.size // x.shape[0]).sum(2)
  return [jnp.tile(of_part, 128 // sums.shape[1]) for of_part in sums]


def _write_columns(x, out, first, count, every_second=False):
  slabs_S = x.reshape(4, 2, 8, -1)
  slabs_S = slabs_S[:, 0] if every_second else slabs_S.reshape(4, 16, -1)
  size = slabs_S.shape[1]
  for i, slab in enumerate(slabs_S):

    @pl.when(i < count)
    def _(i=i, slab=slab):
      place = out.at[:, pl.ds((first + i) * size, size)]
      place[...] = slab.T[: out.shape[0]]


def main(rows, activation, norms, has_next):
  _pretend()
  inputs = product_cases.draw(rows, activation, norms, has_next)
  if reason := products.unsupported(inputs[0], inputs[-1]):
    raise NotImplementedError(reason)
  counts = jnp.zeros((1,), jnp.int32)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    *actual, _ = products.run(*inputs, counts, 0)
    jax.block_until_ready(actual)
  wrong = False
  expected = product_cases.exact(*inputs)
  for name, x, y in zip(("x", "heads"), actual, expected, strict=True):
    if y is not None:
      off = product_cases.error(x, y)
      print(f"{name}: {off:.1e}")
      wrong |= not off < 0.01
  sys.exit(wrong)


if __name__ == "__main__":
  _, rows, activation, norms, has_next = sys.argv
  main(int(rows), activation, norms, bool(int(has_next)))
