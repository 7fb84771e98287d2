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
  in_rows(total, T, scale, dtype)  # (B, T, N, H)
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jaxlib.mlir.dialects import llvm

from sigattn.kernels.mosaic.pipeline import one_warpgroup, smem_for_copies
from sigattn.kernels.mosaic.registers import WARPGROUP, fragment
from sigattn.kernels.mosaic.schedule import div, rem

SIDE = 64  # rows and columns of a tile
_ORDER = {"j": 8, "w": 4, "r": 8, "c": 4, "i": 2, "k": 2}  # see registers.py


def zeros(batch: int, length: int, heads: int, width: int) -> jax.Array:
  """Sums of (B, T, N, H), with T rounded up to a multiple of 64."""
  tiles = -(-length // SIDE), width // SIDE
  return jnp.zeros((batch, heads, *tiles, 8, WARPGROUP, 4), jnp.float32)


def in_tiles(x: jax.Array) -> jax.Array:
  """x, (B, N, T / 64, 64 H), in the shape of `zeros`."""
  wide = x.shape[-1] // SIDE**2
  return x.reshape(*x.shape[:3], wide, 8, WARPGROUP, 4)


def in_rows(
  total: jax.Array, length: int, scale: float, dtype: jnp.dtype
) -> jax.Array:
  """scale times the sums, as an array (B, length, N, H) of 16-bit numbers."""
  batch, heads, tall, wide = total.shape[:4]

  def kernel(total, out, smem):
    program = lax.axis_index("program")
    place, head = div(program, heads), rem(program, heads)
    example, row = div(place, tall), rem(place, tall)
    rows = pl.ds(row * SIDE, SIDE)
    for column in range(wide):
      tile = load(total.at[example, head, row, column]) * scale
      smem.at[column][...] = tile.astype(dtype)
    plgpu.commit_smem()
    for column in range(wide):
      columns = pl.ds(column * SIDE, SIDE)
      plgpu.copy_smem_to_gmem(
        smem.at[column], out.at[example, rows, head, columns]
      )
    plgpu.wait_smem_to_gmem(0)

  shape = batch, length, heads, wide * SIDE
  run = one_warpgroup(
    "sigattn_in_rows", kernel, batch * tall * heads,
    [jax.ShapeDtypeStruct(shape, dtype)],
    [smem_for_copies(wide, SIDE, SIDE, dtype=dtype)],
  )  # fmt: skip
  return run(total)[0]


def add(tile: jax.Array, total: Any) -> None:
  """total += tile. The order in which warpgroups add is not fixed.

  tile: (64, 64) float32, in Layout.WGMMA. total: a Ref (8, 128, 4).
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
  def reduce(_, tile, total):
    i32 = ir.IntegerType.get_signless(32)
    place = _place(total)
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


def load(total: Any) -> jax.Array:
  """The sums of a tile, (64, 64) float32 in Layout.WGMMA.

  total: as in `add`.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),),
    return_type=plgpu.ShapeDtypeStruct(
      (SIDE, SIDE), jnp.float32, plgpu.Layout.WGMMA
    ),
  )
  def inline(_, total):
    f32 = ir.F32Type.get()
    quad, pair = (ir.VectorType.get((n,), f32) for n in (4, 2))
    pointer = ir.Type.parse("!llvm.ptr<1>")
    layout = plgpu.Layout.WGMMA.to_mgpu()
    place, pairs = _place(total), []
    for j in range(_ORDER["j"]):
      offset = mgpu.c(j * WARPGROUP * 16, ir.IntegerType.get_signless(64))
      address = llvm.inttoptr(pointer, arith.addi(place, offset))
      numbers = llvm.load(quad, address, alignment=16)
      for i in range(_ORDER["i"]):
        both = [
          vector.extract(numbers, [], [_ORDER["k"] * i + k])
          for k in range(_ORDER["k"])
        ]
        pairs.append(vector.from_elements(pair, both))
    shape = layout.registers_shape((SIDE, SIDE))
    return fragment(np.array(pairs, object).reshape(shape), layout)

  return inline(total)


def _place(total):
  """The address of this thread's first four numbers of a tile, an i64."""
  i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
  thread = arith.remui(mgpu.thread_idx(), mgpu.c(WARPGROUP, i32))
  return arith.addi(
    llvm.ptrtoint(i64, utils.memref_ptr(total)),
    arith.muli(arith.extui(i64, thread), mgpu.c(16, i64)),
  )
