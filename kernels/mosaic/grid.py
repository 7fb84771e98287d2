"""All programs of a grid wait for each other, with a count in global memory.

No program ends its wait before all have begun, so all of them must run at the
same time: there must not be more than the multiprocessors hold.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.extend.mlir import ir
from jaxlib.mlir.dialects import llvm


def arrive(count: Any) -> None:
  """One thread of the warpgroup adds 1 to a count, a Ref (1,) int32.

  Those who see the new count also see what this thread knows to be written.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def inline(_, count):
    with utils.single_thread(utils.ThreadSubset.WARPGROUP):
      code = "red.release.gpu.global.add.s32 [$0], 1;"
      _assembly(code, [_address(count)], "l")

  inline(count)


def wait(count: Any, least: jax.Array) -> None:
  """A warpgroup waits until a count, a Ref (1,) int32, is at least `least`."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
  def inline(_, count, least):
    with utils.single_thread(utils.ThreadSubset.WARPGROUP):
      _assembly(
        "{ .reg .pred missing; .reg .s32 n;"
        " again: ld.acquire.gpu.global.s32 n, [$0];"
        " setp.lt.s32 missing, n, $1; @missing bra again; }",
        [_address(count), least.registers.item()],
        "l,r",
      )
    utils.warpgroup_barrier()

  inline(count, jnp.asarray(least, jnp.int32))


def fence() -> None:
  """Orders this thread's accesses and those of the copy engine."""

  @plgpu.inline_mgpu(arg_types=())
  def inline(_):
    _assembly("fence.proxy.async;", [], "")

  inline()


def _address(ref):
  i64 = ir.IntegerType.get_signless(64)
  return llvm.ptrtoint(i64, utils.memref_ptr(ref))


def _assembly(code, operands, constraints):
  llvm.inline_asm(
    ir.Type.parse("!llvm.void"), operands, code, constraints,
    has_side_effects=True,
  )  # fmt: skip
