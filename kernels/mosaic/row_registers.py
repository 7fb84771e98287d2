"""Instructions on rows in registers, for the products of a token.

A row of n numbers is laid out as `strided` says: thread t of a warpgroup has
the numbers 4 t to 4 t + 3 of every 512, or fewer neighbours if n is smaller.
The tensor cores leave their results in another layout, see registers.py.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector
from jax.extend.mlir.dialects import math as math_ops
from jaxlib.mlir.dialects import llvm

from sigattn.kernels.mosaic import registers


def strided(*shape: int) -> Any:
  """A layout in which each thread has up to four neighbours at a time.

  An array with several dimensions consists of rows of 128 or more numbers, each
  of which is laid out in this way.
  """
  of_row = np.prod(shape[1:]) if len(shape) > 1 else shape[0]
  neighbours = math.gcd(int(of_row) // registers.WARPGROUP, 4)
  return plgpu.Layout.WG_STRIDED(shape, vec_size=neighbours)


def sum_of_all(x: jax.Array, smem: Any) -> jax.Array:
  """The sum of all numbers of x, a scalar.

  x: float32, in the layout `strided`. smem: a Ref (4,) float32 in shared
  memory, which belongs to the warpgroup.
  """

  @plgpu.inline_mgpu(
    arg_types=(strided(*x.shape), plgpu.RefType()),
    return_type=plgpu.ShapeDtypeStruct(
      (), jnp.float32, plgpu.Layout.WG_SPLAT(())
    ),
  )
  def inline(_, x, smem):
    numbers = [_numbers(register) for register in x.registers.flat]
    total = functools.reduce(arith.addf, itertools.chain(*numbers))
    for distance in (1, 2, 4, 8, 16):
      total = arith.addf(total, utils.shfl_bfly(total, distance))
    warp = arith.divui(_thread(), _index(32))
    utils.warpgroup_barrier()  # Nobody reads an earlier sum any more.
    _publish(total, warp, smem)
    return mgpu.FragmentedArray.splat(_sum_of_four(smem, _index(0)), ())

  return inline(x, smem)


def _publish(number, place, smem):
  """Writes a number to smem[place], for all threads of the warpgroup."""
  place = arith.index_cast(ir.IndexType.get(), place)
  memref.store(number, smem, [place])
  utils.warpgroup_barrier()


def _sum_of_four(smem, first):
  """The sum of four neighbours in shared memory."""
  quad = ir.VectorType.get((4,), ir.F32Type.get())
  first = arith.index_cast(ir.IndexType.get(), first)
  return functools.reduce(
    arith.addf, _numbers(vector.load(quad, smem, [first]))
  )


def add_products(total: jax.Array, x: jax.Array, row: jax.Array) -> jax.Array:
  """total + x * row, for all rows of x.

  total: (rows, ...) float32, and x, of the same shape and of 16 bits, in the
  layout `strided`. row: float32, as many numbers as a row of x, also in the
  layout `strided`.
  """
  layout = strided(*total.shape)

  @plgpu.inline_mgpu(
    arg_types=(layout, layout, strided(*row.shape)),
    return_type=plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout),
  )
  def inline(_, total, x, row):
    of_row = [_numbers(register) for register in row.registers.flat]
    found = np.empty(total.registers.shape, object)
    pairs = zip(total.registers.flat, x.registers.flat, strict=True)
    for i, (sums, register) in enumerate(pairs):
      numbers = zip(
        _in_float32(register), of_row[i % len(of_row)], _numbers(sums),
        strict=True,
      )  # fmt: skip
      sums_now = [math_ops.fma(a, b, c) for a, b, c in numbers]
      found.flat[i] = vector.from_elements(sums.type, sums_now)
    return registers.fragment(found, total.layout)

  return inline(total, x, row)


def _in_float32(register):
  """The numbers of a register of 16-bit numbers.

  A bfloat16 is the upper half of a float32. So one instruction converts each of
  a pair, where the compiler takes two for the second.
  """
  f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
  type_ = ir.VectorType(register.type)
  [count] = type_.shape
  if type_.element_type != ir.BF16Type.get() or count % 2:
    return [arith.extf(f32, number) for number in _numbers(register)]
  pairs = vector.bitcast(ir.VectorType.get((count // 2,), i32), register)
  numbers = []
  for pair in _numbers(pairs):
    low = arith.shli(pair, mgpu.c(16, i32))
    high = arith.andi(pair, mgpu.c(-65536, i32))
    numbers += [arith.bitcast(f32, x) for x in (low, high)]
  return numbers


def sums_of_rows(x: jax.Array, smem: Any, parts: int) -> list[jax.Array]:
  """The sums of the rows of x, in `parts` arrays (128,), in which they repeat.

  Number i of part p is the sum of row p * size + i % size, where a part has
  size = rows / parts.

  x: (rows, ...) float32, in the layout `strided`; rows is a power of two up to
  16. smem: a Ref (4 rows or more,) float32 in shared memory, which belongs to
  the warpgroup. Threads may still read that of the call before, so it must be
  another one, or the threads must have met.
  """
  rows = x.shape[0]
  out = plgpu.ShapeDtypeStruct(
    (registers.WARPGROUP,), jnp.float32, strided(registers.WARPGROUP)
  )

  @plgpu.inline_mgpu(
    arg_types=(strided(*x.shape), plgpu.RefType()), return_type=[out] * parts
  )
  def inline(_, x, smem):
    sums = [
      functools.reduce(arith.addf, itertools.chain(*map(_numbers, of_row)))
      for of_row in x.registers.reshape(rows, -1)
    ]
    thread, distance = _thread(), rows
    # The threads exchange halves, until a thread has row `thread % rows`.
    while distance > 1:
      distance //= 2
      has_bit = arith.cmpi(
        arith.CmpIPredicate.ne,
        arith.andi(thread, _index(distance)),
        _index(0),
      )
      pairs = zip(sums[:distance], sums[distance:], strict=True)
      sums = [
        arith.addf(
          arith.select(has_bit, high, low),
          utils.shfl_bfly(arith.select(has_bit, low, high), distance),
        )
        for low, high in pairs
      ]
    [total], distance = sums, rows
    while distance < 32:
      total = arith.addf(total, utils.shfl_bfly(total, distance))
      distance *= 2
    return _rows_of_warps(total, thread, smem, rows, parts)

  return inline(x, smem)


def _rows_of_warps(total, thread, smem, rows, parts):
  """The parts of sums_of_rows, from a warp's sum of row `thread % rows`."""
  size = rows // parts
  row, warp = arith.remui(thread, _index(rows)), arith.divui(thread, _index(32))
  _publish(total, arith.addi(arith.muli(row, _index(4)), warp), smem)
  found = []
  for part in range(parts):
    row = arith.addi(arith.remui(thread, _index(size)), _index(part * size))
    number = _sum_of_four(smem, arith.muli(row, _index(4)))
    register = vector.from_elements(
      ir.VectorType.get((1,), number.type), [number]
    )
    layout = strided(registers.WARPGROUP).to_mgpu()
    found.append(registers.fragment(np.array([register], object), layout))
  return found


def write_first(x: jax.Array, out: Any) -> None:
  """Writes the first numbers of x to `out`.

  x: (128,), of 16 bits, in the layout `strided`. out: a Ref (n,) in global
  memory.
  """

  @plgpu.inline_mgpu(arg_types=(strided(*x.shape), plgpu.RefType()))
  def inline(_, x, out):
    [count], [number] = ir.MemRefType(out.type).shape, x.registers.flat
    place = _address(out, _thread(), 2)
    [number] = _numbers(number)
    _store_if_less(_thread(), count, place, 0, number, 16)

  inline(x, out)


def write_columns(
  x: jax.Array,
  out: Any,
  first: jax.Array,
  count: jax.Array,
  every_second: bool = False,
) -> None:
  """Writes slabs of 16 rows of x as columns of `out`.

  Args:
    x: (64, columns), in Layout.WGMMA.
    out: a Ref (rows, n) in global memory, of the dtype of x, with at most as
      many rows as x has columns.
    first: the number of slabs before these in a row of `out`.
    count: the number of slabs that are written, up to four.
    every_second: whether to write only 8 rows of every 16, those with i = 0. A
      slab of `out` is then 8 columns.
  """
  scalar = plgpu.Layout.WG_SPLAT(())

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), scalar, scalar)
  )
  def inline(_, x, out, first, count):
    bits, type_ = utils.bitwidth(x.mlir_dtype), ir.MemRefType(out.type)
    stride = type_.get_strides_and_offset()[0][0]
    row, column = registers.row_and_column()
    warp, row = (f(row, _index(16)) for f in (arith.divui, arith.remui))
    slab = arith.addi(first.registers.item(), warp)
    row = arith.addi(arith.muli(slab, _index(8 if every_second else 16)), row)
    place = arith.addi(arith.muli(column, _index(stride)), row)
    place = _address(out, place, bits // 8)
    # A warp without a slab has no column that exists.
    has_slab = arith.cmpi(arith.CmpIPredicate.slt, warp, count.registers.item())
    column = arith.select(has_slab, column, _index(2**30))
    numbers = itertools.chain(*map(_numbers, x.registers.flat))
    for index, number in enumerate(numbers):
      j, i, k = index // 4, index // 2 % 2, index % 2
      offset = ((8 * j + k) * stride + 8 * i) * bits // 8
      # This thread's column exists if 2 c is less than this.
      left = 0 if every_second and i else type_.shape[0] - 8 * j - k
      _store_if_less(column, left, place, offset, number, bits)

  inline(x, out, first, count)


def _store_if_less(number, bound, place, offset, value, bits):
  """Writes a value if number < bound."""
  if bound <= 0:
    return
  llvm.inline_asm(
    ir.Type.parse("!llvm.void"),
    [place, arith.bitcast(ir.IntegerType.get_signless(bits), value), number],
    f"{{ .reg .pred less; setp.lt.s32 less, $2, {bound};"
    f" @less st.global.b{bits} [$0+{offset}], $1; }}",
    f"l,{'r' if bits == 32 else 'h'},r",
    has_side_effects=True,
  )


def of_one_i(x: jax.Array, i: int) -> jax.Array:
  """x with the rows of one i also in the place of those of the other.

  So a number meets that of the row 8 before or after it. x: float32, in
  Layout.WGMMA.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,),
    return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, plgpu.Layout.WGMMA),
  )
  def inline(_, x):
    pairs = x.registers.reshape(-1, 2)
    chosen = np.repeat(pairs[:, i : i + 1], 2, axis=1)
    return registers.fragment(chosen.reshape(x.registers.shape), x.layout)

  return inline(x)


def hand_over(x: jax.Array, smem: Any) -> None:
  """Writes x to shared memory, for `take` by another warpgroup.

  x: (64, columns) float32, in Layout.WGMMA. smem: a Ref (64 columns,) float32.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
  def inline(_, x, smem):
    for pair, place in zip(x.registers.flat, _places_of_pairs(x), strict=True):
      vector.store(pair, smem, [place])

  inline(x, smem)


def take(like: jax.Array, smem: Any) -> jax.Array:
  """What a warpgroup handed over, an array like `like`."""

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
    return_type=plgpu.ShapeDtypeStruct(
      like.shape, like.dtype, plgpu.Layout.WGMMA
    ),
  )
  def inline(_, like, smem):
    pairs = [
      vector.load(pair.type, smem, [place])
      for pair, place in zip(
        like.registers.flat, _places_of_pairs(like), strict=True
      )
    ]
    found = np.array(pairs, object).reshape(like.registers.shape)
    return registers.fragment(found, like.layout)

  return inline(like, smem)


def _places_of_pairs(x):
  """Where the pairs of this thread are if threads are neighbours."""
  first = arith.muli(_thread(), _index(2))
  places = [
    arith.addi(first, _index(2 * registers.WARPGROUP * i))
    for i in range(x.registers.size)
  ]
  return [arith.index_cast(ir.IndexType.get(), place) for place in places]


def _numbers(register):
  """The numbers of a register, which is a vector."""
  count = ir.VectorType(register.type).shape[0]
  return [vector.extract(register, [], [k]) for k in range(count)]


def _thread():
  """The number of this thread in its warpgroup."""
  return arith.remui(mgpu.thread_idx(), _index(registers.WARPGROUP))


def _address(ref, place, size):
  """The address of number `place` of a Ref in global memory."""
  i64 = ir.IntegerType.get_signless(64)
  offset = arith.extui(i64, arith.muli(place, _index(size)))
  return arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(ref)), offset)


def _index(x):
  return mgpu.c(x, ir.IntegerType.get_signless(32))
