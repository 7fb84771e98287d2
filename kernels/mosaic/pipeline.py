"""Parts that all Hopper kernels share: launch, shared memory, ring, products.

A kernel is a persistent grid: there is one program for each multiprocessor, and
it computes many tiles. A program has a few compute warpgroups and, after them,
one memory warpgroup. The memory warpgroup lets the copy engine (TMA) bring
blocks into a ring of slots in shared memory, as far ahead as there are slots:

  memory warpgroup                       compute warpgroups
    wait free[slot]                        wait full[slot]
    copy a block to slot -- full[slot] ->  products with the tensor cores
                         <- free[slot] --  arrive free[slot] when they are done

While one warpgroup stores its result, the others compute, and the blocks of the
next tile are on their way.

Two programs may form a cluster (cluster = 2 in tiles.py). They compute
neighbouring tiles of one head, and stream the same blocks. Each of them loads
one half of a block, and the copy engine writes it to the shared memory of both.
So each block is read half as often from the second-level cache. Before it loads
its half, each program waits until the slot is free in both.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels.mosaic.schedule import Schedule, rem
from sigattn.kernels.mosaic.tiles import KeyTile, QueryTile

_CLUSTER = "cluster"  # the axis of the programs of a cluster
_MEMORY_REGISTERS = 24  # registers of a thread of the memory warpgroup


@dataclasses.dataclass(frozen=True)
class Gmem:
  """The arrays of a kernel in global memory, as Refs; None if absent.

  Inputs come first, then outputs. The letters B, T, S, N, K and H are those of
  problem.py.
  """

  query: Any  # (B, T, N, H)
  key: Any  # (B, S, K, H)
  value: Any  # (B, S, K, H)
  d_out: Any = None  # (B, T, N, H)
  scalars: Any = None  # (B, N, 2) float32: logit_bias and slope
  plan: Any = None  # (B, tiles, 4) int32, as blocks.plan
  query_ids: Any = None  # (B, T and the rest of a tile) int32
  key_ids: Any = None  # (B, S and the rest of a tile) int32
  query_lengths: Any = None  # (B,) int32
  key_lengths: Any = None  # (B,) int32
  # (B, N, 1 or 2, T and the rest of a tile) float32, see weights.of_normalized
  rows: Any = None
  offsets: Any = None  # (B,) int32: query_offset
  parts: Any = None  # logit vectors of the stationary side, see vectors.py
  columns: Any = None  # logit vectors of the streamed side
  table: Any = None  # of the schedule
  out: Any = None  # (B, T, N, H); in dq.py the gradient of the queries
  sums: Any = None  # (B, N, T and the rest of a tile) float32, sums of rows
  # (warpgroups, B, N, T and the rest of a block) float32: input and output
  row_sums: Any = None
  dq_sums: Any = None  # as reduce.zeros; input and output
  dk: Any = None  # (B, S, K, H)
  dv: Any = None  # (B, S, K, H)
  dz_sums: Any = None  # (1 or 2, B, N, S and the rest of a tile) float32


def launch(
  name: str,
  kernel: Callable[..., None],
  schedule: Schedule,
  tile: QueryTile | KeyTile,
  inputs: Mapping[str, jax.Array | None],
  outputs: Mapping[str, jax.ShapeDtypeStruct],
  scratch: Sequence[Any],
  *,
  automatic_barriers: bool = True,
) -> Callable[[Mapping[str, Any]], list[jax.Array]]:
  """A function of `inputs` (arrays or Refs) that runs a kernel.

  Args:
    name: what profilers and the dumps of Mosaic call it.
    kernel: takes Gmem and a Ref for each element of scratch.
    schedule, tile: how many programs (or clusters) and warpgroups there are.
    inputs: names of Gmem and arrays; those that are None are left out.
    outputs: names of Gmem and the types of the results.
    scratch: the contents of shared memory, barriers included.
    automatic_barriers: whether Mosaic adds barriers between writes to shared
      memory and reads of it.
  """
  names = [name for name, x in inputs.items() if x is not None]
  in_gmem = len(names) + len(outputs)

  def body(*refs):
    gmem = zip((*names, *outputs), refs[:in_gmem], strict=True)
    kernel(Gmem(**dict(gmem)), *refs[in_gmem:])

  run = plgpu.kernel(
    body,
    out_type=list(outputs.values()),
    grid=(schedule.programs,),
    grid_names=("program",),
    cluster=(tile.cluster,) if tile.cluster > 1 else (),
    cluster_names=(_CLUSTER,) if tile.cluster > 1 else (),
    kernel_name=name,
    num_threads=tile.warpgroups + 1,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=_parameters(automatic_barriers),
  )
  return lambda inputs: run(*(inputs[name] for name in names))


def one_warpgroup(
  name: str,
  kernel: Callable[..., None],
  programs: int,
  outputs: Sequence[jax.ShapeDtypeStruct],
  scratch: Sequence[Any],
) -> Callable[..., list[jax.Array]]:
  """A function of arrays that runs a kernel whose programs do one thing each.

  There are more programs than multiprocessors, and each has one warpgroup.

  Args:
    name: what profilers call it.
    kernel: takes a Ref for each array, output and element of scratch.
    programs: their number; the kernel finds its own by the name "program".
    outputs: the types of the results.
    scratch: the contents of shared memory, barriers included.
  """
  return plgpu.kernel(
    kernel,
    out_type=list(outputs),
    grid=(programs,),
    grid_names=("program",),
    kernel_name=name,
    scratch_types=list(scratch),
    compiler_params=_parameters(automatic_barriers=True),
  )


def _parameters(automatic_barriers):
  return plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=not automatic_barriers,
    reduction_scratch_bytes=0,  # Sums over rows need no shared memory.
  )


def by_role(
  tile: QueryTile | KeyTile,
  warpgroup: jax.Array,
  compute: Callable[[], None],
  feed: Callable[[], None],
) -> None:
  """Runs compute in the compute warpgroups, and feed in the memory warpgroup.

  The memory warpgroup hardly needs registers, so it gives most of its registers
  to the compute warpgroups.
  """

  @pl.when(warpgroup < tile.warpgroups)
  def _():
    plgpu.set_max_registers(tile.registers, action="increase")
    compute()

  @pl.when(warpgroup == tile.warpgroups)
  def _():
    plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
    feed()


# Shared memory.


def smem_blocks(
  tile: QueryTile | KeyTile,
  count: int,
  rows: int,
  width: int,
  dtype: jnp.dtype,
) -> Any:
  """Shared memory for `count` blocks of (rows, width).

  It is tiled and swizzled as the tensor cores and the copy engine require.
  """
  # A product reads as many rows of a block at once as the swizzle is wide.
  columns = math.gcd(width, tile.streamed)
  return _swizzled((count, rows, width), columns, dtype)


def smem_for_copies(*shape: int, dtype: jnp.dtype) -> Any:
  """Shared memory for blocks (..., rows, width), with the widest swizzle.

  A product may read a block if its other factor has the same swizzle.
  """
  return _swizzled(shape, shape[-1], dtype)


def _swizzled(shape, columns, dtype):
  """Shared memory whose swizzle is at most as wide as `columns` numbers."""
  bits = jnp.finfo(dtype).bits
  swizzle = plgpu.find_swizzle(columns * bits)
  transforms = (
    plgpu.TilingTransform((8, 8 * swizzle // bits)),
    plgpu.SwizzleTransform(swizzle),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


class Ring:
  """Slots in shared memory for streamed blocks, counted by steps."""

  def __init__(
    self,
    smem: Any,
    full: Any,
    free: Any,
    stages: int,
    cluster: int = 1,
    hides_slots: bool = False,
  ):
    """smem: (stages, rows, width). full, free: a barrier for each slot.

    cluster: the number of programs that fill their rings together.
    hides_slots: whether to keep the compiler from computing the addresses of
    the slots before the loop over steps, see at_step. With two slots it does
    that.
    """
    self._smem, self._full, self._free = smem, full, free
    self._stages, self._hides_slots = stages, hides_slots
    self._axes = _CLUSTER if cluster > 1 else None

  def _slot(self, step):
    slot = rem(step, self._stages)
    return at_step(slot, step) if self._hides_slots else slot

  def fill(self, step: jax.Array, source: Any) -> None:
    """Memory warpgroup: waits for a free slot, and starts to copy a block."""
    slot = self._slot(step)

    @pl.when(step >= self._stages)
    def _():
      plgpu.barrier_wait(self._free.at[slot])

    plgpu.copy_gmem_to_smem(
      source, self._smem.at[slot], self._full.at[slot],
      collective_axes=self._axes,
    )  # fmt: skip

  def fill_too(self, step: jax.Array, source: Any, smem: Any) -> None:
    """Memory warpgroup, after `fill`: copies the step's block of another array.

    smem: (stages, ...). The barriers `full` must expect one more arrival.
    """
    slot = self._slot(step)
    plgpu.copy_gmem_to_smem(source, smem.at[slot], self._full.at[slot])

  def drain(self, count: jax.Array) -> None:
    """Memory warpgroup: waits until the last of `count` blocks were used.

    In a cluster no program may end earlier. The other one still writes to its
    slots, and arrives at its barriers.
    """

    def last(step, _):
      plgpu.barrier_wait(self._free.at[self._slot(step)])

    lax.fori_loop(jnp.maximum(count - self._stages, 0), count, last, None)

  def wait(self, step: jax.Array) -> None:
    """Compute warpgroup: waits for the block of a step."""
    plgpu.barrier_wait(self._full.at[self._slot(step)])

  def block(self, step: jax.Array) -> Any:
    """The block of a step, a Ref (rows, width)."""
    return self.of_step(self._smem, step)

  def of_step(self, smem: Any, step: jax.Array) -> Any:
    """The slot of a step in an array that `fill_too` fills."""
    return smem.at[self._slot(step)]

  def release(self, step: jax.Array) -> None:
    """Compute warpgroup: signals that it no longer needs the block."""
    plgpu.barrier_arrive(self._free.at[self._slot(step)])


def free_barrier(tile: QueryTile | KeyTile) -> Any:
  """A barrier for each slot of a Ring, at which compute warpgroups arrive.

  Those of both programs of a cluster arrive at the barriers of each, because
  each program writes to the slots of both. One thread then arrives for a whole
  warpgroup. So products must be the only readers of a block, and the kernel
  must wait for them before it releases the block: the warps of a warpgroup
  start a product together, and CUTLASS relies on the same.
  """
  arguments = dict(num_barriers=tile.stages, num_arrivals=tile.warpgroups)
  if tile.cluster == 1:
    return plgpu.Barrier(**arguments)
  return plgpu.ClusterBarrier(collective_axes=(_CLUSTER,), **arguments)


def place_in_cluster(tile: QueryTile | KeyTile) -> int | jax.Array:
  """This program's first row, counted from the first one of its cluster."""
  if tile.cluster == 1:
    return 0
  return lax.axis_index(_CLUSTER) * tile.of_program


def store(value: jax.Array, smem: Any, destination: Any) -> None:
  """Starts to write a tile to global memory through smem.

  The copy is still running when this returns.
  """
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous copy
  smem[...] = value
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem, destination)


# Products and loops.


def accumulator(*shape: int) -> Any:
  """float32 registers to which the tensor cores add."""
  return plgpu.ACC(shape, jnp.float32)


def preset(accumulator: Any, value: jax.Array) -> None:
  """Sets an accumulator to the value to which products will be added.

  Call it before products start: otherwise the compiler waits for their end.
  """
  accumulator[...] = value


def read(accumulator: Any, in_flight: int) -> jax.Array:
  """Reads an accumulator, once at most `in_flight` later products run."""
  value = plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)
  # Without the barrier the compiler may move later code ahead of the wait.
  return lax.optimization_barrier(value)


def at_step(index: int | jax.Array, step: jax.Array) -> jax.Array:
  """The index, in a form that the compiler cannot compute before the loop.

  Otherwise the compiler computes the addresses of all slices that the products
  read before the loop over steps, keeps them in registers, and spills them.
  """
  return index + jnp.minimum(lax.optimization_barrier(step), 0)


def zero_padding(
  x: jax.Array, first: jax.Array, lengths: Any, batch: jax.Array
) -> jax.Array:
  """x with zeros in its rows from lengths[batch] on, if there are lengths.

  first: where the rows of x begin in their sequence. lengths: a Ref, or None.
  """
  if lengths is None:
    return x
  row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
  return jnp.where(row < lengths[batch] - first, x, 0.0)
