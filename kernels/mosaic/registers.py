"""Masks and distances of a tile in registers, by constants of the instructions.

The tensor cores leave a tile of 64 rows spread over a warpgroup: thread
32 w + 4 r + c holds the numbers of the rows 16 w + r + 8 i and the columns
2 c + 8 j + k, for i, k < 2. Row less column is then a number of the thread, for
each of two i, less a constant, 8 j + k, which a comparison or an addition takes
as an immediate. Written with an array of column numbers instead, the compiler
computes that array before the loop over blocks and keeps all of it, up to 64
numbers a thread, where the products leave no register.
"""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, math, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils

_SPLAT = plgpu.Layout.WG_SPLAT(())


def hide(x, low, high, hidden):
  """x where row + low <= column <= row + high, else `hidden`.

  x: (64, columns) float32, in registers as the tensor cores leave it. low,
  high: int32 scalars, or None: no bound. hidden: a number.
  """
  sides = (low, arith.CmpIPredicate.sle), (high, arith.CmpIPredicate.sge)
  sides = [
    (bound, predicate) for bound, predicate in sides if bound is not None
  ]
  bounds, predicates = zip(*sides, strict=True)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, *[_SPLAT] * len(bounds)),
    return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, plgpu.Layout.WGMMA),
  )
  def cover(_, x, *bounds):
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    limits = [_rows(bound.registers.item()) for bound in bounds]

    def one(value, i, column):
      column = utils.c(column, i32)
      seen = [
        arith.cmpi(predicate, limit[i], column)
        for predicate, limit in zip(predicates, limits, strict=True)
      ]
      seen = functools.reduce(arith.andi, seen)
      return arith.select(seen, value, utils.c(hidden, f32))

    return _map(one, x)

  return cover(x, *bounds)


def distance(x, offset):
  """|row + offset - column|, float32, of the shape of x. offset: int32."""

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, _SPLAT),
    return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, plgpu.Layout.WGMMA),
  )
  def compute(_, x, offset):
    f32 = ir.F32Type.get()
    firsts = [arith.sitofp(f32, r) for r in _rows(offset.registers.item())]

    def one(_, i, column):
      return math.absf(arith.subf(firsts[i], utils.c(float(column), f32)))

    return _map(one, x)

  return compute(x, jnp.asarray(offset, jnp.int32))


def plane(x, first, slope, offset):
  """first + slope (row + offset - column), float32, of the shape of x.

  first, slope: numbers or float32 scalars. offset: int32.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, _SPLAT, _SPLAT, _SPLAT),
    return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, plgpu.Layout.WGMMA),
  )
  def compute(_, x, *given):
    f32 = ir.F32Type.get()
    first, slope, offset = (s.registers.item() for s in given)
    firsts = on_plane(first, slope, offset)

    def one(_, i, column):
      # One instruction: products would be computed before the loop, and kept.
      return math.fma(slope, utils.c(float(-column), f32), firsts[i])

    return _map(one, x)

  return compute(x, *scalars(first, slope, offset))


def scalars(first, slope, offset):
  """The numbers of a plane as arrays, of the types that on_plane takes."""
  return (
    jnp.asarray(first, jnp.float32),
    jnp.asarray(slope, jnp.float32),
    jnp.asarray(offset, jnp.int32),
  )


def on_plane(first, slope, offset):
  """[first + slope (16 w + r + 8 i - 2 c + offset) for i in (0, 1)]."""
  f32 = ir.F32Type.get()
  return [
    arith.addf(first, arith.mulf(slope, arith.sitofp(f32, row)))
    for row in _rows(offset)
  ]


def _rows(offset):
  """[16 w + r + 8 i - 2 c + offset for i in (0, 1)] of this thread."""
  i32 = ir.IntegerType.get_signless(32)

  def number(x):
    return utils.c(x, i32)

  thread = arith.remui(utils.thread_idx(), number(128))
  warp = arith.divui(thread, number(32))
  row = arith.divui(arith.remui(thread, number(32)), number(4))
  column = arith.muli(arith.remui(thread, number(4)), number(2))
  row = arith.addi(row, arith.muli(warp, number(16)))
  first = arith.addi(arith.subi(row, column), offset)
  return first, arith.addi(first, number(8))


def _map(function, x):
  """function(number, i, 8 j + k) of each of a thread's numbers."""
  registers = np.empty(x.registers.shape, object)
  for index, (place, pair) in enumerate(np.ndenumerate(x.registers)):
    j, i = divmod(index, 2)
    numbers = [
      function(vector.extract(pair, [], [k]), i, 8 * j + k) for k in range(2)
    ]
    registers[place] = vector.from_elements(pair.type, numbers)
  return mgpu.FragmentedArray(
    _registers=registers, _layout=x.layout, _is_signed=None
  )
