"""Runs cases of the Hopper kernels in Pallas's interpreter.

  python -m tests.kernels.mosaic_interpreter 64 two_kernels all_but_dense ...
  python -m tests.kernels.mosaic_interpreter 64 fused all_but_dense ...
  python -m tests.kernels.mosaic_interpreter 64 clusters all_but_dense ...

The second argument chooses the backward pass. "clusters" are two kernels, and
the programs of all passes form clusters of two. (The fused backward pass has
clusters on a GPU alone, because the interpreter cannot add atomically.) The
dtype is bfloat16; a case
that is called "CASE.float16" is run in float16. The program prints the error of
each output and gradient. It exits with 1 if an error is more than twice that of
plain code in 16 bits. A kernel with a missing arrival at a barrier hangs, so
set a time limit. The interpreter needs a thread for each warpgroup. A small
machine has no more than three threads, so here two warpgroups compute, and one
in each program of a cluster.
"""

import dataclasses
import math
import sys

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import (
  gpu_callbacks,
  jaxpr_interpret,
  shared_memory,
)
from jax._src.state import primitives, types

from sigattn.kernels import (
  batching_and_sharding,
  device,
  differentiation,
  dispatch,
)
from sigattn.kernels.mosaic import (
  host,
  logit_gradient,
  reduce,
  registers,
  tiles,
)
from tests.kernels import cases, compare, ptx

CASES = [
  *cases.CASES, *cases.BLOCKS, *cases.SMALL_WEIGHTS, *cases.WIDE_RANGE,
  *cases.HIDDEN_KEYS,
]  # fmt: skip


def _let_products_read_registers():
  """Copies a factor in registers to memory, as the interpreter requires."""
  interpreter = next(
    x
    for x in vars(jaxpr_interpret).values()
    if hasattr(x, "_interpret_wgmma_ref_p")
  )
  product = interpreter._interpret_wgmma_ref_p
  space = shared_memory.get_memory_space_idx(core.MemorySpace.REGS)

  def lent(self, eqn, token, get_invals):
    values = list(get_invals())
    if isinstance(eqn.invars[1].aval, types.AbstractRef):
      return product(self, eqn, token, lambda: values)
    place = dict(mesh_location=self.mesh_location, thread=self.thread)
    token, request = gpu_callbacks.call_make_allocation_request_array(
      token=token, compute_unit=self.thread, memory_space_id=space,
      initial_ref_count=1,
    )  # fmt: skip
    token, values[1] = gpu_callbacks.call_allocate_buffer(
      token=token, allocation_request_as_array=request, value=values[1],
      source_info=eqn.source_info, **place,
    )  # fmt: skip
    token, out = product(self, eqn, token, lambda: values)
    token = gpu_callbacks.call_deallocate_buffer(
      token=token, allocation_key_as_array=values[1],
      source_info=eqn.source_info, **place,
    )  # fmt: skip
    return token, out

  interpreter._interpret_wgmma_ref_p = lent


def _add(tile, total):
  """reduce.add in plain JAX, because the interpreter has no inline assembly."""
  rows_and_columns = tile.reshape(4, 2, 8, 8, 4, 2)  # w i r j c k
  total[...] += rows_and_columns.transpose(3, 0, 2, 4, 1, 5).reshape(8, 128, 4)


def _load(total):
  """reduce.load in plain JAX."""
  j_w_r_c_i_k = total[...].reshape(8, 4, 8, 4, 2, 2)
  return j_w_r_c_i_k.transpose(1, 4, 2, 0, 3, 5).reshape(64, 64)


def _preset(accumulator, value):
  """pipeline.preset by a primitive that the interpreter knows."""
  primitives.ref_set(accumulator, None, value)


def _plane(x, first, slope, offset):
  """registers.plane in plain JAX."""
  return first + slope * (offset - _columns_less_rows(x)).astype(jnp.float32)


def _tanh(x, scale, bias, slope=0.0, offset=0):
  """registers.tanh in plain JAX."""
  return jnp.tanh(scale * x + _plane(x, bias, slope, offset))


def _sigmoid(x, polynomial):
  """registers.sigmoid, with its assembly for the inverses."""
  codes = registers._INVERSES[polynomial]
  column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
  results = [ptx.run(code, jnp.exp2(x)) for code in codes]
  return lax.select_n(column % len(codes), *results)


def _paced_sigmoid(x, polynomial, scale, bias, slope=0.0, offset=0):
  """registers.paced_sigmoid in plain JAX."""
  return _sigmoid(scale * x + _plane(x, bias, slope, offset), polynomial)


def _columns_less_rows(x):
  row, column = (lax.broadcasted_iota(jnp.int32, x.shape, i) for i in (0, 1))
  return column - row


def _hide(x, low, high, hidden, shares):
  """registers.hide in plain JAX."""
  del shares
  apart = _columns_less_rows(x)
  for bound, sign in ((low, 1), (high, -1)):
    if bound is not None:
      x = jnp.where(sign * apart >= sign * bound, x, hidden)
  return x


def _hide_from(x, end, hidden):
  """registers.hide_from in plain JAX."""
  column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.where(column < end, x, hidden)


def _add_to_rows(totals, x):
  """registers.add_to_rows in plain JAX. Here a row has only one total."""
  return totals + x.sum(1)


def _add_columns(x, total):
  """registers.add_columns in plain JAX."""
  total[...] += x.sum(0)


def _distance(x, offset):
  """registers.distance in plain JAX."""
  return jnp.abs(_columns_less_rows(x) - offset).astype(jnp.float32)


def _pretend(backward):
  """Simulates an H100 with three multiprocessors, or one if dq is added.

  The interpreter's additions are not atomic.
  """
  dispatch.IMPLEMENTATIONS = {"mosaic": "sigattn.kernels.mosaic"}
  device.current = lambda: device.Device("NVIDIA H100", 90)
  host._programs = lambda: 1 if backward == "fused" else 3
  tiles.FUSED_BACKWARD = {
    width: dataclasses.replace(
      x,
      open=0,
      masked=0,
      masked_on_h200=0,
      tile=dataclasses.replace(x.tile, cluster=1),
    )
    for width, x in tiles.FUSED_BACKWARD.items()
    if backward == "fused"
  }
  reduce.add, reduce.load = _add, _load
  logit_gradient.preset = _preset
  registers.tanh, registers.sigmoid = _tanh, _sigmoid
  registers.paced_sigmoid = _paced_sigmoid
  registers.hide, registers.distance = _hide, _distance
  registers.plane, registers.hide_from = _plane, _hide_from
  registers.add_to_rows = _add_to_rows
  registers.add_columns = _add_columns
  registers.sum_of_threads = lambda totals: totals
  of_all = dict(warpgroups=2, cluster=1)
  if backward == "clusters":
    tiles.FORWARD_CLUSTERS, tiles.MOST_BLOCKS = 0, math.inf
    of_all = dict(warpgroups=1, cluster=2)
  tiles.TILES = {
    width: tiles.Tiles(
      *(x and dataclasses.replace(x, **of_all) for x in of_width)
    )
    for width, of_width in tiles.TILES.items()
  }
  # The interpreter's effects become those of the primitives.
  for operation in (differentiation._attention, differentiation._pullback):
    operation.primitive.def_effectful_abstract_eval(
      lambda *_, call, body: (body.out_avals, body.effects)
    )
  # custom_partitioning does not accept these effects.
  batching_and_sharding.over_devices = lambda compute, _, *arguments: compute(
    *arguments
  )


def main(width, backward, names):
  jax.config.update("jax_numpy_rank_promotion", "raise")  # as in conftest.py
  _let_products_read_registers()
  _pretend(backward)
  table = {case.name: case for case in CASES}
  wrong = False
  for name in names:
    name, _, dtype = name.partition(".")
    dtype = dtype or "bfloat16"
    case = dataclasses.replace(table[name], width=width)
    arrays, options, cotangent = cases.draw(case, dtype)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
      actual = compare.run(arrays, options, cotangent)
      jax.block_until_ready(actual)
    expected = cases.exact(case, arrays, options, cotangent)
    plain = compare.plain_16_bit(case, arrays, options, cotangent)
    unit = float(jnp.finfo(dtype).eps)
    for key, value in expected.items():
      allowed = compare.error(plain[key], value) if key in plain else unit
      ours = compare.error(actual[key], value)
      print(f"{name} {key}: {ours:.1e}, plain {dtype} {allowed:.1e}")
      wrong |= not ours <= 2 * allowed + 0.2 * unit
  sys.exit(wrong)


if __name__ == "__main__":
  main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
