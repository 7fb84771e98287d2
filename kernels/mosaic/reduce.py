"""float32 sums in global memory, to which warpgroups add from registers.

The tensor cores leave a tile of 64 x 64 numbers spread over a warpgroup: thread
32 w + 4 r + c holds those of the rows 16 w + 8 i + r and the columns
8 j + 2 c + k, for i, k < 2 and j < 8. The sums lie in memory in that order, j
first, then the threads, then i and k: one instruction adds a thread's four
numbers of a j, and a warp's lie side by side (512 bytes). In rows they would
fall into eight sectors of as many rows, at half the speed; through shared
memory and the copy engine it is no faster (benchmarks/NOTES.md).

  total = zeros(B, T, N, H)  # in that order: (B, N, T / 64, H / 64, 8, 128, 4)
  add(tile, total_ref.at[b, n, t, h])  # in a kernel
  in_rows(total)  # (B, T, N, H)
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils

SIDE = 64  # rows and columns of a tile
_THREADS = 128
_ORDER = {"j": 8, "w": 4, "r": 8, "c": 4, "i": 2, "k": 2}


def zeros(batch, length, heads, width):
  """Sums of (B, T, N, H), with rows up to a multiple of 64."""
  tiles = -(-length // SIDE), width // SIDE
  return jnp.zeros((batch, heads, *tiles, 8, _THREADS, 4), jnp.float32)


def in_rows(total):
  """(B, T, N, H) of sums."""
  batch, heads, tall, wide = total.shape[:4]
  total = total.reshape(batch, heads, tall, wide, *_ORDER.values())
  total = jnp.einsum("bnthjwrcik->btwirnhjck", total)
  return total.reshape(batch, tall * SIDE, heads, wide * SIDE)


def add(tile, total):
  """total += tile, in the order in which warpgroups come to it.

  tile: (64, 64) float32, in registers as the tensor cores leave it. total: a
  Ref (8, 128, 4).
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
  def reduce(_, tile, total):
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
    place = arith.addi(
      llvm.ptrtoint(i64, utils.memref_ptr(total)),
      arith.muli(arith.extui(i64, thread), utils.c(16, i64)),
    )
    pairs = tile.registers.reshape(_ORDER["j"], _ORDER["i"])  # of the k
    for j, of_rows in enumerate(pairs):
      numbers = [
        llvm.extractelement(pair, utils.c(k, i32))
        for pair in of_rows
        for k in range(_ORDER["k"])
      ]
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [place, *numbers],
        f"red.relaxed.gpu.global.add.v4.f32 [$0+{j * _THREADS * 16}],"
        " {$1, $2, $3, $4};",
        "l,f,f,f,f",
        has_side_effects=True,
      )

  reduce(tile, total)
