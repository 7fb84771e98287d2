"""Instructions on a tile in registers: masks, distances, sigmoid, row sums.

The tensor cores (wgmma) leave a tile of 64 rows spread over a warpgroup, which
has 4 warps of 32 threads. This is the layout of such a fragment:

  thread 32 w + 4 r + c, w < 4, r < 8, c < 4, holds the numbers of
    rows     16 w + r + 8 i    for i < 2
    columns  2 c + 8 j + k     for k < 2, j < columns / 8

  The threads that hold 8 columns (one j) of the 16 rows of a warp, w = 0:

              column 0   1   2   3   4   5   6   7
    row 0  (r = 0)   t0  t0  t1  t1  t2  t2  t3  t3    i = 0
    row 1  (r = 1)   t4  t4  t5  t5  t6  t6  t7  t7
    ...
    row 8  (r = 0)   t0  t0  t1  t1  t2  t2  t3  t3    i = 1

In Pallas this is Layout.WGMMA. Its registers are an array of pairs (the two k),
in the order of j and then i; so pair number 2 j + i.

So row minus column is a number of the thread, one for each i, minus a constant,
8 j + k. A comparison or an addition takes that constant as an immediate. If it
were written with an array of column numbers, the compiler would compute the
array before the loop over blocks and keep all of it: up to 64 numbers a thread,
although the products leave no registers for them.

This file uses parts of jax that are not public:

  FragmentedArray(_registers=..., _layout=..., _is_signed=...)
    builds a tile from registers. It has no public constructor.
  jaxlib.mlir.dialects.llvm
    has inline assembly. jax.extend.mlir has no llvm dialect.

tests/kernels/mosaic_interpreter.py also imports jax._src, so that Pallas's
interpreter can multiply a factor that is in registers. mosaic.TESTED_JAX names
the versions of jax with which all of this was tested.
"""

import functools
import struct
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, math, vector
from jaxlib.mlir.dialects import llvm

WARPGROUP = 128  # threads
_SPLAT = plgpu.Layout.WG_SPLAT(())
_ROW = plgpu.Layout.WGMMA.reduce(1)  # one number for each row
_PACE = 4  # number of pairs whose weights are computed at a time


def hide(
  x: jax.Array,
  low: jax.Array | None,
  high: jax.Array | None,
  hidden: float,
  shares: bool,
) -> jax.Array:
  """x where row + low <= column <= row + high, else `hidden`.

  A thread has rows r and r + 8, and row r + 8 sees a column if row r sees the
  column eight before it. With `shares` one comparison serves both, so that
  there are little more than half as many. Their results wait in registers, of
  which some kernels have none left.

  x: (64, columns) float32, in Layout.WGMMA. low, high: int32 scalars; one of
  them may be None, for no bound.
  """
  sides = (low, arith.CmpIPredicate.sle), (high, arith.CmpIPredicate.sge)
  sides = [
    (bound, predicate) for bound, predicate in sides if bound is not None
  ]
  bounds, predicates = zip(*sides, strict=True)

  def cover(x, *bounds):
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    limits = [_rows_minus_columns(bound) for bound in bounds]

    def one(value, i, column):
      if shares:
        i, column = 0, column - 8 * i
      column = mgpu.c(column, i32)
      seen = [
        arith.cmpi(predicate, limit[i], column)
        for predicate, limit in zip(predicates, limits, strict=True)
      ]
      seen = functools.reduce(arith.andi, seen)
      return arith.select(seen, value, mgpu.c(hidden, f32))

    return _map(one, x)

  return _in_registers(cover, x, *bounds)


def hide_from(x: jax.Array, end: jax.Array, hidden: float) -> jax.Array:
  """x where column < end, else `hidden`.

  x: (64, columns) float32, in Layout.WGMMA. end: an int32 scalar.
  """

  def cover(x, end):
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    _, column = row_and_column()
    limit = arith.subi(end, column)

    def one(value, _, column):
      column = mgpu.c(column, i32)
      seen = arith.cmpi(arith.CmpIPredicate.sgt, limit, column)
      return arith.select(seen, value, mgpu.c(hidden, f32))

    return _map(one, x)

  return _in_registers(cover, x, end)


def add_to_rows(totals: jax.Array, x: jax.Array) -> jax.Array:
  """Adds the rows of x to totals, each thread for itself.

  Each thread adds up its own numbers of a row, with one addition for each. The
  four threads of a row therefore have different totals until `sum_of_threads`
  is called. Until then, use the totals for nothing else.

  totals: (64,) float32, one number for each row, zeros at first. x: (64,
  columns) float32, in Layout.WGMMA.
  """

  @plgpu.inline_mgpu(
    arg_types=(_ROW, plgpu.Layout.WGMMA),
    return_type=plgpu.ShapeDtypeStruct(totals.shape, totals.dtype, _ROW),
  )
  def inline(_, totals, x):
    sums = [vector.extract(t, [], [0]) for t in totals.registers.flat]
    for index, pair in enumerate(x.registers.flat):
      both = arith.addf(*(vector.extract(pair, [], [k]) for k in range(2)))
      sums[index % 2] = arith.addf(sums[index % 2], both)
    return _like(totals, sums)

  return inline(totals, x)


def sum_of_threads(totals: jax.Array) -> jax.Array:
  """The sums of rows, from the totals that add_to_rows left in the threads."""

  @plgpu.inline_mgpu(
    arg_types=(_ROW,),
    return_type=plgpu.ShapeDtypeStruct(totals.shape, totals.dtype, _ROW),
  )
  def inline(_, totals):
    sums = []
    for register in totals.registers.flat:
      total = vector.extract(register, [], [0])
      for distance in (1, 2):  # c counts the threads of a row.
        total = arith.addf(total, utils.shfl_bfly(total, distance))
      sums.append(total)
    return _like(totals, sums)

  return inline(totals)


def add_columns(x: jax.Array, total: Any) -> None:
  """total += the sums of the columns of x, over its 64 rows.

  The rows of a warp are added in registers: eight threads hold the same
  columns, and exchange halves three times, until each has the sums of an eighth
  of the columns. The four warps add their sums to memory in no fixed order.

  x: (64, columns) float32, in Layout.WGMMA, columns a multiple of 64. total: a
  Ref (columns,) float32 in global memory.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
  def inline(_, x, total):
    pairs = x.registers.reshape(-1, 2)  # (j, i)
    sums = [arith.addf(*of_rows) for of_rows in pairs]
    r, c = _row_and_column_of_lane()
    for bit in (4, 2, 1):
      sums = _exchange(sums, r, bit)
    i64 = ir.IntegerType.get_signless(64)
    column = arith.addi(arith.muli(r, _index(8)), arith.muli(c, _index(2)))
    place = arith.addi(
      llvm.ptrtoint(i64, utils.memref_ptr(total)),
      arith.muli(arith.extui(i64, column), mgpu.c(4, i64)),
    )
    for block, pair in enumerate(sums):
      numbers = [llvm.extractelement(pair, _index(k)) for k in range(2)]
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [place, *numbers],
        f"red.relaxed.gpu.global.add.v2.f32 [$0+{block * 64 * 4}], {{$1, $2}};",
        "l,f,f",
        has_side_effects=True,
      )

  inline(x, total)


def _exchange(pairs, r, bit):
  """Half of the pairs, each added to the same pair of the thread r ^ bit.

  A thread keeps the upper half of every 2 * bit pairs if r has the bit, else
  the lower half, and gives the other half away. In the end it has pair r of
  every eight.
  """
  has_bit = arith.cmpi(
    arith.CmpIPredicate.ne, arith.andi(r, _index(bit)), _index(0)
  )
  left = []
  for start in range(0, len(pairs), 2 * bit):
    for low in range(start, start + bit):
      first, second = pairs[low], pairs[low + bit]
      kept = arith.select(has_bit, second, first)
      given = arith.select(has_bit, first, second)
      numbers = []
      for k in range(2):
        number = llvm.extractelement(given, _index(k))
        number = utils.shfl_bfly(number, 4 * bit)
        mine = llvm.extractelement(kept, _index(k))
        numbers.append(arith.addf(mine, number))
      left.append(vector.from_elements(kept.type, numbers))
  return left


def _index(x):
  return mgpu.c(x, ir.IntegerType.get_signless(32))


def _row_and_column_of_lane():
  """r and c of this thread."""
  lane = arith.remui(mgpu.thread_idx(), _index(32))
  return arith.divui(lane, _index(4)), arith.remui(lane, _index(4))


def distance(x: jax.Array, offset: int | jax.Array) -> jax.Array:
  """|row + offset - column|, float32, of the shape of x. offset: int32."""

  def compute(x, offset):
    f32 = ir.F32Type.get()
    firsts = [arith.sitofp(f32, r) for r in _rows_minus_columns(offset)]

    def one(_, i, column):
      return math.absf(arith.subf(firsts[i], mgpu.c(float(column), f32)))

    return _map(one, x)

  return _in_registers(compute, x, jnp.asarray(offset, jnp.int32))


def plane(
  x: jax.Array,
  first: float | jax.Array,
  slope: float | jax.Array,
  offset: int | jax.Array,
) -> jax.Array:
  """first + slope (row + offset - column), float32, of the shape of x.

  first, slope: numbers or float32 scalars. offset: int32.
  """

  def compute(x, *numbers):
    f32 = ir.F32Type.get()
    _, slope, _ = numbers
    firsts = _first_on_plane(*numbers)

    def one(_, i, column):
      # fma is one instruction. The compiler would compute separate products
      # before the loop, and keep them in registers.
      return math.fma(slope, mgpu.c(float(-column), f32), firsts[i])

    return _map(one, x)

  return _in_registers(compute, x, *_plane_scalars(first, slope, offset))


def tanh(
  x: jax.Array,
  scale: float,
  bias: float | jax.Array,
  slope: float | jax.Array | None = None,
  offset: int | jax.Array | None = None,
) -> jax.Array:
  """tanh(scale x + bias + slope (row + offset - column)) by the hardware.

  It is paced: computed for a few elements at a time, so that the tensor cores
  are not held up. Matrix products and arithmetic share the registers of a
  multiprocessor. While the tensor cores run, the tanh of a warp takes 10.7
  cycles instead of 8, and each instruction before it costs two to three more
  (benchmarks/NOTES.md, "What the registers give"). Without pacing, the compiler
  computes the arguments of a whole tile first, while the special-function unit
  idles, and reads two registers for each argument. Here the bias of the next
  few elements depends on the first tanh of the last few, so that their
  arguments wait for it. Then both units work at the same time, and the bias
  stays in the operand cache.

  Args:
    x: (64, columns) float32, in Layout.WGMMA.
    scale: a number.
    bias, slope: numbers or float32 scalars; without a slope it is 0.
    offset: int32.
  """
  return _paced(["tanh.approx.f32 $0, z;"], x, scale, bias, slope, offset)


def paced_sigmoid(
  x: jax.Array,
  polynomial: bool,
  scale: float,
  bias: float | jax.Array,
  slope: float | jax.Array | None = None,
  offset: int | jax.Array | None = None,
) -> jax.Array:
  """sigmoid of scale x + bias + slope (row + offset - column), paced as tanh.

  The sigmoid is that of `sigmoid`, and the other arguments are those of `tanh`.
  """
  codes = [f"ex2.approx.ftz.f32 z, z; {x}" for x in _INVERSES[polynomial]]
  return _paced(codes, x, scale, bias, slope, offset)


def sigmoid(x: jax.Array, polynomial: bool) -> jax.Array:
  """1 / (1 + 2^x), which keeps the relative precision of small weights.

  2^x and the inverse are one instruction each of the special-function unit,
  which computes 16 numbers a clock. The other units of a multiprocessor compute
  64 or 128. With `polynomial` these compute half of the inverses, with a
  relative error of 3.3e-5.

  x: (64, columns) float32, in Layout.WGMMA.
  """
  codes = _INVERSES[polynomial]

  def compute(x):
    def one(number, _, column):
      code = codes[column % len(codes)]
      return _run(f"ex2.approx.ftz.f32 z, $1; {code}", [number])

    return _map(one, x)

  return _in_registers(compute, x)


def _paced(codes, x, scale, bias, slope, offset):
  """Results of the codes, by turns of columns, for the arguments of `tanh`."""
  numbers = [bias]
  if slope is not None:
    numbers = _plane_scalars(bias, slope, offset)

  def compute(x, *numbers):
    copy = _code_of_copy()
    bias, firsts = numbers[0], None
    if len(numbers) > 1:
      bias, firsts = numbers[1], _first_on_plane(*numbers)
    # The number that depends on a result: the bias, or the slope of a plane.
    waiting, first = bias, None
    turned = np.empty_like(x.registers)
    for index, (place, pair) in enumerate(np.ndenumerate(x.registers)):
      if index and index % _PACE == 0:
        waiting = _wait(bias, first, copy)
      both = _pair(codes, pair, index, scale, waiting, firsts)
      if index % _PACE == 0:
        first = both[0]
      turned[place] = vector.from_elements(pair.type, both)
    return fragment(turned, x.layout)

  return _in_registers(compute, x, *numbers)


def _in_registers(compute: Callable, x: jax.Array, *numbers: Any) -> jax.Array:
  """Applies compute(x, *numbers) in MLIR; the result has the shape of x.

  compute takes a FragmentedArray and one MLIR value for each number.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, *[_SPLAT] * len(numbers)),
    return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, plgpu.Layout.WGMMA),
  )
  def inline(_, x, *numbers):
    return compute(x, *(number.registers.item() for number in numbers))

  return inline(x, *numbers)


def fragment(registers: np.ndarray, layout: Any) -> mgpu.FragmentedArray:
  """A tile of float32 numbers that are in these registers."""
  return mgpu.FragmentedArray(
    _registers=registers, _layout=layout, _is_signed=None
  )


def _like(totals, sums):
  """An array like `totals`, made of a thread's numbers for i in (0, 1)."""
  registers = np.empty(totals.registers.shape, object)
  pairs = zip(np.ndenumerate(totals.registers), sums, strict=True)
  for (place, register), number in pairs:
    registers[place] = vector.from_elements(register.type, [number])
  return fragment(registers, totals.layout)


def _map(function, x):
  """Applies function(number, i, 8 j + k) to each number of a thread."""
  registers = np.empty(x.registers.shape, object)
  for index, (place, pair) in enumerate(np.ndenumerate(x.registers)):
    j, i = divmod(index, 2)
    numbers = [
      function(vector.extract(pair, [], [k]), i, 8 * j + k) for k in range(2)
    ]
    registers[place] = vector.from_elements(pair.type, numbers)
  return fragment(registers, x.layout)


def _plane_scalars(first, slope, offset):
  """The numbers of a plane as arrays, of the types that MLIR expects."""
  return (
    jnp.asarray(first, jnp.float32),
    jnp.asarray(slope, jnp.float32),
    jnp.asarray(offset, jnp.int32),
  )


def _first_on_plane(first, slope, offset):
  """[first + slope (16 w + r + 8 i - 2 c + offset) for i in (0, 1)]."""
  f32 = ir.F32Type.get()
  return [
    arith.addf(first, arith.mulf(slope, arith.sitofp(f32, row)))
    for row in _rows_minus_columns(offset)
  ]


def _rows_minus_columns(offset):
  """[16 w + r + 8 i - 2 c + offset for i in (0, 1)] of this thread."""
  row, column = row_and_column()
  first = arith.addi(arith.subi(row, column), offset)
  return first, arith.addi(first, mgpu.c(8, ir.IntegerType.get_signless(32)))


def row_and_column() -> tuple[Any, Any]:
  """16 w + r and 2 c of this thread."""
  i32 = ir.IntegerType.get_signless(32)

  def number(x):
    return mgpu.c(x, i32)

  thread = arith.remui(mgpu.thread_idx(), number(WARPGROUP))
  warp = arith.divui(thread, number(32))
  row = arith.divui(arith.remui(thread, number(32)), number(4))
  column = arith.muli(arith.remui(thread, number(4)), number(2))
  return arith.addi(row, arith.muli(warp, number(16))), column


# Assembly for tanh and the sigmoid.


def _code_of_copy():
  """0x3210, for which prmt copies its first operand.

  The compiler cannot know this, because the number depends on the second index
  of the grid, which is always 0.
  """
  i32 = ir.IntegerType.get_signless(32)
  return _assembly(
    i32, [],
    "{ .reg .u32 row; mov.u32 row, %ctaid.y; shl.b32 row, row, 16;"
    " or.b32 $0, row, 0x3210; }",
    "=r",
  )  # fmt: skip


def _wait(bias, first, copy):
  """The bias, in a form that depends on the number `first`."""
  return _assembly(
    ir.F32Type.get(),
    [bias, first, copy],
    "prmt.b32 $0, $1, $2, $3;",
    "=f,f,f,r",
  )


def _pair(codes, pair, index, scale, waiting, firsts):
  """The results for the two numbers of a pair, number `index` of a fragment."""
  i32 = ir.IntegerType.get_signless(32)
  j, i = divmod(index, 2)
  return [
    _number(
      codes[k % len(codes)],
      llvm.extractelement(pair, mgpu.c(k, i32)),
      scale,
      waiting,
      None if firsts is None else firsts[i],
      8 * j + k,
    )
    for k in range(2)
  ]


def _number(code, number, scale, waiting, first, column):
  operands = [number, waiting]
  argument = f"fma.rn.f32 z, $1, {_float(scale)}, $2;"
  if first is not None:
    operands.append(first)
    argument = (
      f"fma.rn.f32 z, $2, {_float(-column)}, $3;"
      f" fma.rn.f32 z, $1, {_float(scale)}, z;"
    )
  return _run(f"{argument} {code}", operands)


def _run(code, operands):
  """The float32 that the code assigns to $0. The operands are $1, $2, ..."""
  return _assembly(
    ir.F32Type.get(), operands, f"{{ .reg .f32 z; {code} }}",
    "=f" + ",f" * len(operands),
  )  # fmt: skip


def _assembly(*arguments):
  return llvm.inline_asm(*arguments, has_side_effects=False)


def _float(x):
  """A float32 as PTX writes it."""
  return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


# 1 / (1 + z) for z = 2^x has two forms. In the usual form of a division the
# compiler scales numbers above 2^126, because their inverses are denormal; that
# takes four instructions. In _DIVISION these inverses are 0.
#
# _POLYNOMIAL has no division. The bits of a positive float32, read as an
# integer, are nearly a linear function of its logarithm. So _MAGIC minus the
# bits of d = 1 + z gives the bits of a number r near 1 / d. If _MAGIC is
# (254 - c) 2^23 with 0 < c < 1, the product y = d r lies between
# m - h = 1 - c / 2 and m + h = (3 - c)^2 / 8. Then r ((y - v)^2 + a) is the
# inverse, with the relative error
#
#   y ((y - v)^2 + a) - 1 = y^3 - 2 v y^2 + (v^2 + a) y - 1.
#
# Of all cubic polynomials that begin with y^3, Chebyshev's has the smallest
# maximum between m - h and m + h, which is h^3 / 4. This is the one if
# v = 3 m / 2, a = 3 (m^2 - h^2) / 4 and m^3 - 3 m h^2 / 4 = 1. The last
# equation determines c = 0.0999742. Then m = 1.0006408, h = 0.0506279, and the
# error is 3.25e-5. The derivative p - p^2 of a weight p near 1 has this as an
# absolute error. That is small beside 1/4, its value for weights of 1/2.
#
# d is at most the number with the bits _MAGIC. There r is 0, so that a hidden
# pair, z = inf, has the weight 0. min.NaN keeps a d that is not a number.
_MAGIC = 0x7EF3340C
_V, _A = 1.5009612, 0.7490391
_DIVISION = "add.rn.ftz.f32 z, z, 0f3F800000; rcp.approx.ftz.f32 $0, z;"
_POLYNOMIAL = (
  "add.rn.ftz.f32 z, z, 0f3F800000;"
  f" min.NaN.ftz.f32 z, z, 0f{_MAGIC:08X};"
  f" .reg .b32 r; mov.b32 r, z; sub.s32 r, {_MAGIC}, r;"
  f" fma.rn.ftz.f32 z, z, r, {_float(-_V)};"
  f" fma.rn.ftz.f32 z, z, z, {_float(_A)};"
  " mul.rn.ftz.f32 $0, r, z;"
)
# The codes of consecutive columns, by turns, without and with the polynomial.
_INVERSES = (_DIVISION,), (_POLYNOMIAL, _DIVISION)
