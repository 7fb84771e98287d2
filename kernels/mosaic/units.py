"""What one_row.py and few_rows.py share: the launch, weights, and meetings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels.mosaic import grid, pipeline
from sigattn.kernels.mosaic.schedule import div

WARPGROUPS = 2  # that compute
SMEM = 220 * 1024  # bytes for rings
MOST_BARRIERS = 32  # that Mosaic has in an array
# The bytes that a program has asked for and that have not arrived, at most. It
# is just enough to keep the memory busy. With more, everything else that the
# programs send to memory waits in a queue behind them: with 96 KB, programs
# took up to 6 us to meet, and with 48 KB up to 4.
_BYTES_IN_FLIGHT = 48 * 1024
_MEMORY_REGISTERS, _COMPUTE_REGISTERS = 40, 216


def share(count: int, worker: jax.Array, workers: int) -> jax.Array:
  """How many of `count` things a worker has, if they are dealt out in turns."""
  return div(jnp.maximum(count - worker + (workers - 1), 0), workers)


class Ring(pipeline.Ring):
  """A ring for weights, filled at the pace at which they arrive."""

  def __init__(self, smem: Any, full: Any, free: Any, bytes_of_slot: int):
    """smem: as `block` indexes it. full, free: a barrier for each slot."""
    self.stages = full.shape[0]
    self._in_flight = _BYTES_IN_FLIGHT // bytes_of_slot
    super().__init__(smem, full, free, self.stages)

  def slot(self, step: jax.Array) -> tuple[Any, Any]:
    """Memory warpgroup: waits for a free slot; returns it and its barrier."""

    @pl.when(step >= self._in_flight)
    def _():
      self.wait(step - self._in_flight)

    @pl.when(step >= self.stages)
    def _():
      plgpu.barrier_wait(self._free.at[self._slot(step)])

    return self.block(step), self._full.at[self._slot(step)]

  def drain(self, count: jax.Array) -> None:
    """Memory warpgroup: waits until the last of `count` blocks were used.

    Only Pallas's interpreter needs it. It requires that whoever waits at a
    barrier sees all of its phases.
    """
    first = jnp.maximum(count - self._in_flight, 0)
    lax.fori_loop(first, count, lambda step, _: self.wait(step), None)
    super().drain(count)


def launch(
  name: str,
  compute: Callable[..., None],
  feed: Callable[..., None],
  inputs: Mapping[str, jax.Array],
  outputs: Mapping[str, jax.ShapeDtypeStruct],
  counts: jax.Array,
  programs: int,
  scratch: Sequence[Any],
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Runs a kernel. Returns the outputs, and the counts with its arrivals.

  Args:
    name: what profilers call it.
    compute, feed: what the compute warpgroups and the memory warpgroup do. They
      take the Refs of inputs, counts and outputs by their names, and a Ref for
      each element of scratch.
    inputs, outputs: arrays, and the types of the results.
    counts: (1,) int32, to which the kernel adds its arrivals, see grid.py.
    programs: their number. All of them run at the same time.
    scratch: the contents of shared memory, barriers included.
  """
  names = [*inputs, "counts", *outputs]

  def kernel(*refs):
    gmem = dict(zip(names, refs[: len(names)], strict=True))
    smem = refs[len(names) :]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _():
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
      compute(gmem, *smem)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
      plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
      feed(gmem, *smem)

  call = plgpu.kernel(
    kernel,
    out_type=list(outputs.values()),
    grid=(programs,),
    grid_names=("program",),
    kernel_name=name,
    num_threads=WARPGROUPS + 1,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      unsafe_no_auto_barriers=True,
      reduction_scratch_bytes=0,
    ),
  )
  return _in_place(call, inputs, outputs, counts)


def _in_place(call, inputs, outputs, counts):
  """(results by name, counts changed in place), as in fused_backward.run."""

  def body(refs):
    counts, results = refs
    for ref, x in zip(results, call(*inputs.values(), counts), strict=True):
      ref[...] = x

  empty = [lax.empty(x.shape, x.dtype) for x in outputs.values()]
  counts, results = pl.run_state(body)((counts, empty))
  return dict(zip(outputs, results, strict=True)), counts


class Meeting:
  """Where all compute warpgroups of all programs wait for each other."""

  def __init__(self, gmem: Mapping[str, Any], met: Any, programs: int):
    """met: a barrier at which the compute warpgroups arrive."""
    self._counts, self._met = gmem["counts"], met
    self._arrived, self._programs = gmem["before"][0], programs

  def __call__(self, copies: bool = False) -> None:
    """copies: whether the copy engine reads what was written before it."""
    self._arrived += self._programs
    if copies:
      grid.fence()
    plgpu.barrier_arrive(self._met)
    plgpu.barrier_wait(self._met)

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _():
      grid.arrive(self._counts)

    grid.wait(self._counts, self._arrived)
    if copies:
      grid.fence()


def met() -> Any:
  """The barrier of a Meeting."""
  return plgpu.Barrier(num_arrivals=WARPGROUPS)


def activated(
  activation: str, gate: jax.Array, up: jax.Array | None = None
) -> jax.Array:
  """phi(gate), see layers.Mlp. up: for swiglu only."""
  if activation == "swiglu":
    return gate / (1.0 + jnp.exp(-gate)) * up
  if activation == "gelu":
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + jnp.exp(-2.0 * inner))
  return gate
