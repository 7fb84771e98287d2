"""tanh of logits in registers, a few at a time, so that the tensor cores go on.

Products of matrices and arithmetic share a multiprocessor's registers: while
the tensor cores run, a warp's tanh takes 10.7 cycles for 8, and what stands
before it costs two to three more (benchmarks/NOTES.md, "What the registers
give"). Left alone, the compiler computes the arguments of a whole tile first,
while the special-function unit idles, and reads two registers for each. Here
the arguments of the next few elements wait for the first tanh of the last few,
since their bias is made to depend on it: both units work at the same time, and
the bias stays in the operand cache.
"""

import struct

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils

from sigattn.kernels.mosaic import registers

_PAIRS = 4  # of elements at a time


def tanh(x, scale, bias, slope=None, offset=None):
  """tanh(scale x + bias + slope (row + offset - column)) by the hardware.

  x: (64, columns) float32, in registers as the tensor cores leave it. scale: a
  number. bias, slope: numbers or float32 scalars; without a slope it is 0.
  offset: int32.
  """
  given = [bias]
  if slope is not None:
    given = registers.scalars(bias, slope, offset)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, *[plgpu.Layout.WG_SPLAT(())] * len(given)),
    return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, plgpu.Layout.WGMMA),
  )
  def compute(_, x, *given):
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)

    def instructions(*arguments):
      return llvm.inline_asm(*arguments, has_side_effects=False)

    # 0x3210 copies the bias. No compiler can tell that the grid has one row.
    copy = instructions(
      i32, [],
      "{ .reg .u32 row; mov.u32 row, %ctaid.y; shl.b32 row, row, 16;"
      " or.b32 $0, row, 0x3210; }",
      "=r",
    )  # fmt: skip
    given = [s.registers.item() for s in given]
    bias = given[0] if len(given) == 1 else given[1]
    firsts = None if len(given) == 1 else registers.on_plane(*given)

    def one(number, here, i, column):
      operands = [number, here]
      argument = f"fma.rn.f32 z, $1, {_float(scale)}, $2;"
      if firsts is not None:
        operands.append(firsts[i])
        argument = (
          f"fma.rn.f32 z, $2, {_float(-column)}, $3;"
          f" fma.rn.f32 z, $1, {_float(scale)}, z;"
        )
      return instructions(
        f32, operands,
        f"{{ .reg .f32 z; {argument} tanh.approx.f32 $0, z; }}",
        "=f" + ",f" * len(operands),
      )  # fmt: skip

    # What waits: the bias, or with slopes the slope.
    here, first = bias, None
    turned = np.empty_like(x.registers)
    for index, (place, pair) in enumerate(np.ndenumerate(x.registers)):
      if index and index % _PAIRS == 0:
        here = instructions(
          f32, [bias, first, copy], "prmt.b32 $0, $1, $2, $3;", "=f,f,f,r"
        )
      j, i = divmod(index, 2)  # as registers.py has it
      found = [
        one(llvm.extractelement(pair, utils.c(k, i32)), here, i, 8 * j + k)
        for k in range(2)
      ]
      if index % _PAIRS == 0:
        first = found[0]
      turned[place] = vector.from_elements(pair.type, found)
    return mgpu.FragmentedArray(
      _registers=turned, _layout=x.layout, _is_signed=None
    )

  return compute(x, *given)


def _float(x):
  return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"
