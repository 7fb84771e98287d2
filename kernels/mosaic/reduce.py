"""float32 sums in global memory, to which warpgroups add from registers.

In memory, the sums of a 64 x 64 tile have the order in which the tensor cores
leave such a tile in registers (registers.py): j first, then the threads, then i
and k. So one instruction adds the four numbers that a thread has for a j, and
those of a warp are contiguous (512 bytes). In row order they would fall into
eight sectors, one in each of eight rows, at half the speed. Adding through
shared memory and the copy engine is no faster (benchmarks/NOTES.md, "How dq is
added").

  total = zeros(B, T, N, H)  # in that order: (B, N, T / 64, H / 64, 8, 128, 4)
  add(tile, total_ref.at[b, n, t, h])  # in a kernel
  in_rows(total)  # (B, T, N, H)
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm

from sigattn.kernels.mosaic.registers import WARPGROUP

SIDE = 64  # rows and columns of a tile
_ORDER = {"j": 8, "w": 4, "r": 8, "c": 4, "i": 2, "k": 2}  # see registers.py


def zeros(batch: int, length: int, heads: int, width: int) -> jax.Array:
  """Sums of (B, T, N, H), with T rounded up to a multiple of 64."""
  tiles = -(-length // SIDE), width // SIDE
  return jnp.zeros((batch, heads, *tiles, 8, WARPGROUP, 4), jnp.float32)


def in_rows(total: jax.Array) -> jax.Array:
  """The sums as an array (B, T, N, H)."""
  batch, heads, tall, wide = total.shape[:4]
  total = total.reshape(batch, heads, tall, wide, *_ORDER.values())
  total = jnp.einsum("bnthjwrcik->btwirnhjck", total)
  return total.reshape(batch, tall * SIDE, heads, wide * SIDE)


def add(tile: jax.Array, total: Any) -> None:
  """total += tile. The order in which warpgroups add is not fixed.

  tile: (64, 64) float32, in Layout.WGMMA. total: a Ref (8, 128, 4).
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
  def reduce(_, tile, total):
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    thread = arith.remui(mgpu.thread_idx(), mgpu.c(WARPGROUP, i32))
    place = arith.addi(
      llvm.ptrtoint(i64, utils.memref_ptr(total)),
      arith.muli(arith.extui(i64, thread), mgpu.c(16, i64)),
    )
    pairs = tile.registers.reshape(_ORDER["j"], _ORDER["i"])  # of the k
    for j, of_rows in enumerate(pairs):
      numbers = [
        llvm.extractelement(pair, mgpu.c(k, i32))
        for pair in of_rows
        for k in range(_ORDER["k"])
      ]
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [place, *numbers],
        f"red.relaxed.gpu.global.add.v4.f32 [$0+{j * WARPGROUP * 16}],"
        " {$1, $2, $3, $4};",
        "l,f,f,f,f",
        has_side_effects=True,
      )

  reduce(tile, total)
