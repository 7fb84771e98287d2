"""kernels/products.py for a few rows, with the tensor cores.

They multiply 64 x 16 weights by 16 x 8 inputs or more, so rows are padded to a
multiple of 8. What is computed for the padding is not written.

Outputs are dealt out in slabs of 16, because 64 would be too many: W_up of 1B
has 176 times 64 outputs for 132 programs, so some would have twice the work of
others. A unit has up to three slabs. A slot of the ring holds their weights for
128 inputs, and the tensor cores also read 16 rows of the next slot, whose
products nobody uses. Behind the last slot there are 16 more rows for them. The
two compute warpgroups take turns with the slots. One of them adds up both sums
and writes them.

W_out and W_down have few outputs, so their units have a part of the inputs
only. When all programs have met, a stage adds these parts up, adds the result
to the stream, and normalises it: a row for each warpgroup.

  W_out y   meet   x, norm(x)   meet   W_up   meet
  W_down z  meet   x, norm(x)   meet   W_next

With swiglu a slab has 8 gates and 8 ups. So a thread of the tensor cores has
both of an output.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels import device
from sigattn.kernels.mosaic import pipeline, row_registers, units
from sigattn.kernels.mosaic.schedule import div, rem
from sigattn.kernels.mosaic.units import WARPGROUPS

_TILE = 64  # outputs that the tensor cores compute at a time
_SLAB = 16  # outputs of a warp
_SLABS = 3  # of a unit, at most
_OUTPUTS = _SLAB * _SLABS
_CHUNK = 128  # inputs of a step
_BYTES = 2  # of an input or a weight
_PIECE = 8  # rows of weights that the copy engine takes at once
# Inputs are loaded ahead, as many as fit in these bytes, and for so many steps
# of a warpgroup at most.
_BYTES_AHEAD, _MOST_AHEAD = 64 * 1024, 8
# What the beginning and end of a unit cost, and what it costs to add up its
# parts, in multiples of the time that one input of a unit takes.
_UNIT_COST, _PART_COST = 64, 32
_PADDING = 8  # rows are padded to a multiple of it
_MEETINGS = 5


class _Cut(NamedTuple):
  """How a product is cut into units.

  The slabs are divided into groups, and the inputs into parts. A unit is a part
  of a group. A step is 128 inputs of a group. Groups differ by one slab at
  most, and larger and smaller ones alternate. Each program has consecutive
  units, so that it gets about as many of both as the others.
  """

  slabs: int
  steps: int  # of all inputs
  groups: int
  parts: int
  programs: int

  @classmethod
  def of(cls, number: int, shape: Sequence[int], programs: int) -> "_Cut":
    """A cut with which all programs have about the same work.

    number: of the product. A stage follows products 0 and 2, so their inputs
    may be divided. Their cut is the one with the least estimated time.
    """
    slabs, steps = shape[0] // _SLAB, shape[1] // _CHUNK
    if number % 2:
      units_of_program = pl.cdiv(slabs, _SLABS * programs)
      groups = min(slabs, units_of_program * programs)
      return cls(slabs, steps, groups, 1, programs)

    def cost(cut):
      slabs_of_unit = pl.cdiv(cut.slabs, cut.groups)
      inputs = pl.cdiv(cut.steps, cut.parts) * _CHUNK
      # One half is for the weights, and one for the tensor cores, which take as
      # long for one slab as for three.
      of_unit = inputs * (slabs_of_unit / _SLABS + 1) / 2 + _UNIT_COST
      rounds = pl.cdiv(cut.units, programs)
      return rounds * of_unit + cut.parts * _PART_COST

    return min(
      (
        cls(slabs, steps, pl.cdiv(slabs, size), parts, programs)
        for size in range(1, _SLABS + 1)
        for parts in range(1, steps + 1)
      ),
      key=cost,
    )

  @property
  def units(self) -> int:
    return self.groups * self.parts

  def first_unit(self, program: jax.Array) -> jax.Array:
    return div(program * self.units, self.programs)

  def first_step(self, unit: jax.Array) -> jax.Array:
    """The steps of all units before this one."""
    group, part = div(unit, self.parts), rem(unit, self.parts)
    return group * self.steps + div(part * self.steps, self.parts)

  def first_slab(self, group: jax.Array) -> jax.Array:
    return div(group * self.slabs, self.groups)

  def inputs_of(self, step: jax.Array) -> Any:
    """The inputs of a step, which is counted as in first_step."""
    return pl.ds(rem(step, self.steps) * _CHUNK, _CHUNK)


class _Ring(units.Ring):
  """Slots of 48 rows, one after the other in an array (rows, inputs)."""

  def of_step(self, smem: Any, step: jax.Array) -> Any:
    """A slot, and the first 16 rows of the next one."""
    return smem.at[pl.ds(self._slot(step) * _OUTPUTS, _TILE)]


class _Plan(NamedTuple):
  """What is known before the kernel runs."""

  rows: int
  cuts: list[_Cut]
  norms: Sequence[Any]
  activation: str
  programs: int

  @property
  def padded(self):
    """The rows of a tile of the tensor cores."""
    return pl.cdiv(self.rows, _PADDING) * _PADDING

  @property
  def ahead(self):
    """The steps of a warpgroup whose inputs are loaded ahead."""
    of_step = WARPGROUPS * self.padded * _CHUNK * _BYTES
    return min(_BYTES_AHEAD // of_step, _MOST_AHEAD)

  def ring(self, *smem):
    return _Ring(*smem, bytes_of_slot=_OUTPUTS * _CHUNK * _BYTES)

  def is_gated(self, number):
    """Whether the outputs of a product are pairs of gate and up."""
    return number == 1 and self.activation == "swiglu"


def run(
  x_BD: jax.Array,
  y_BF: jax.Array,
  matrices: Sequence[jax.Array],
  norms: Sequence[Any],
  activation: str,
  counts: jax.Array,
  calls: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """As products.run.

  matrices: three or four. norms: behind and before the products, or None.
  """
  programs, dtype = device.current().cores, x_BD.dtype
  cuts = [_Cut.of(i, x.shape, programs) for i, x in enumerate(matrices)]
  plan = _Plan(len(x_BD), cuts, norms, activation, programs)
  inputs, outputs = _arrays(plan, x_BD, y_BF, matrices, calls)
  padded, ahead, of_row = plan.padded, plan.ahead, _CHUNK * _BYTES
  for_inputs = WARPGROUPS * ahead * padded * of_row + 4 * _TILE * padded
  left = units.SMEM - for_inputs - (_TILE - _OUTPUTS) * of_row
  stages = min(left // (_OUTPUTS * of_row), units.MOST_BARRIERS)
  stages -= stages % WARPGROUPS  # So a warpgroup always has the same slots.
  blocks = functools.partial(pipeline.smem_for_copies, dtype=dtype)
  found, counts = units.launch(
    "sigattn_products_of_few_rows",
    functools.partial(_compute, plan),
    functools.partial(_feed, plan),
    inputs,
    outputs,
    counts,
    programs,
    [
      blocks(stages * _OUTPUTS + _TILE - _OUTPUTS, _CHUNK),
      plgpu.Barrier(num_barriers=stages, num_arrivals=_OUTPUTS // _PIECE),
      plgpu.Barrier(num_barriers=stages),
      blocks(WARPGROUPS, ahead, padded, _CHUNK),
      plgpu.Barrier(num_barriers=WARPGROUPS * ahead),
      plgpu.SMEM((_TILE * padded,), jnp.float32),
      plgpu.Barrier(num_barriers=2),
      plgpu.SMEM((WARPGROUPS, 4), jnp.float32),
      units.met(),
    ],
  )
  return found["stream"], found.get("heads"), counts


def _arrays(plan, x_BD, y_BF, matrices, calls):
  """The arrays and the types of the results, by their names in the kernel."""
  [rows, width], dtype = x_BD.shape, x_BD.dtype
  # Mosaic copies from arrays with fewer than 8 rows, or with a multiple of 8.
  # Nothing is written to the other rows of h and z. A product of such a row is
  # a column that is not written either.
  stored = plan.padded if rows > _PADDING else rows
  arrivals = calls * (_MEETINGS * plan.programs)
  y_BF = jnp.pad(y_BF, ((0, stored - rows), (0, 0)))
  inputs = {"x": x_BD, "y": y_BF, "before": arrivals}
  inputs |= {f"matrix{i}": x for i, x in enumerate(matrices)}
  inputs |= {f"scale{i}": x.scale_D for i, x in enumerate(plan.norms) if x}
  shapes = {
    "stream": (rows, width), "middle": (rows, width), "h": (stored, width),
    "z": (stored, matrices[2].shape[1]),
  }  # fmt: skip
  if len(matrices) == 4:
    shapes["heads"] = rows, len(matrices[3])
  outputs = {x: jax.ShapeDtypeStruct(s, dtype) for x, s in shapes.items()}
  parts = max(cut.parts for cut in plan.cuts[::2])
  outputs["sums"] = jax.ShapeDtypeStruct((parts, rows, width), jnp.float32)
  return inputs, outputs


def _feed(plan, gmem, smem, full, free, *_):
  """The memory warpgroup: all weights of this program, product by product."""
  ring, done = plan.ring(smem, full, free), jnp.int32(0)
  program = lax.axis_index("program")
  for number, cut in enumerate(plan.cuts):
    begin, end = (cut.first_step(cut.first_unit(program + i)) for i in range(2))

    def one(step, _, number=number, cut=cut, before=done - begin):
      slot, arrived = ring.slot(before + step)
      matrix = gmem[f"matrix{number}"]
      group, columns = div(step, cut.steps), cut.inputs_of(step)
      slab, after = (cut.first_slab(group + i) for i in range(2))
      for i in range(_SLABS):
        exists, target = slab + i < after, slot.at[pl.ds(i * _SLAB, _SLAB)]
        load = functools.partial(
          _load_slab, plan, number, matrix, slab + i, columns, target, arrived
        )
        pl.when(exists)(load)
        pl.when(~exists)(functools.partial(_arrive_for_slab, arrived))

    lax.fori_loop(begin, end, one, None)
    done += end - begin
  ring.drain(done)


def _load_slab(plan, number, matrix, slab, columns, target, arrived):
  """Starts to load some inputs of a slab."""
  first, apart = slab * _SLAB, _PIECE
  if plan.is_gated(number):
    first, apart = slab * _PIECE, matrix.shape[0] // 2
  for piece in range(_SLAB // _PIECE):
    plgpu.copy_gmem_to_smem(
      matrix.at[pl.ds(first + piece * apart, _PIECE), columns],
      target.at[pl.ds(piece * _PIECE, _PIECE)],
      arrived,
    )


def _arrive_for_slab(arrived):
  """In the place of a slab that the unit does not have."""
  for _ in range(_SLAB // _PIECE):
    plgpu.barrier_arrive(arrived)


def _compute(
  plan, gmem, smem, full, free, inputs, arrived, handed, handing, warps, met
):  # fmt: skip
  """The compute warpgroups: products and stages."""
  warpgroup = lax.axis_index("warpgroup")
  meet = units.Meeting(gmem, met, plan.programs)
  multiply = _Products(
    plan, gmem, plan.ring(smem, full, free), inputs.at[warpgroup],
    arrived, handed, handing, warpgroup,
  )  # fmt: skip
  worker = lax.axis_index("program") + warpgroup * plan.programs
  add = functools.partial(_add, plan, gmem, warps.at[warpgroup], worker)
  at = (jnp.int32(0),) * 3
  at = multiply(0, "y", "sums", at)
  meet()
  add(0, "x", "middle")
  meet(copies=True)
  at = multiply(1, "h", "z", at)
  meet(copies=True)
  at = multiply(2, "z", "sums", at)
  meet()
  add(2, "middle", "stream")
  if len(plan.cuts) == 4:
    meet(copies=True)
    at = multiply(3, "h", "heads", at)
  multiply.end(at)


class _Products(NamedTuple):
  """The products of one of the two compute warpgroups."""

  plan: _Plan
  gmem: dict[str, Any]
  ring: units.Ring
  inputs: Any  # (ahead, rows, _CHUNK), of this warpgroup
  arrived: Any  # (warpgroups * ahead,), a barrier for each of them
  handed: Any  # sums that warpgroup 1 hands over to warpgroup 0
  handing: Any  # two barriers: they are there, and they have been taken
  warpgroup: jax.Array

  def __call__(self, number, source, target, at):
    """This program's units of a product.

    at: the units and steps of this program, and the steps of this warpgroup,
    before the product. Returns them after it.
    """
    (done, before, mine), cut = at, self.plan.cuts[number]
    source, ahead = self.gmem[source], self.plan.ahead
    program = lax.axis_index("program")
    first, last = (cut.first_unit(program + i) for i in range(2))
    begin = cut.first_step(first)
    total = cut.first_step(last) - begin
    # The steps of all products are counted together, and a warpgroup has every
    # second one.
    skipped = rem(before + self.warpgroup, WARPGROUPS)
    own = self._own(total, skipped)

    def load(step):
      """Starts to load the inputs of a step of this warpgroup."""
      slot = rem(mine + step, ahead)
      # 0, in a form that JAX does not know. It refuses a constant slice that
      # ends beyond the last row, where the copy engine writes zeros.
      zero = jnp.minimum(step, 0)
      rows = pl.ds(zero, self.inputs.shape[1])
      columns = cut.inputs_of(begin + step * WARPGROUPS + skipped)
      plgpu.copy_gmem_to_smem(
        source.at[rows, columns], self.inputs.at[slot], self._arrival(slot)
      )

    def step(accumulator, step, _):
      slot = rem(mine + step, ahead)
      place = before + step * WARPGROUPS + skipped
      self.ring.wait(place)
      plgpu.barrier_wait(self._arrival(slot))
      rows = plgpu.transpose_ref(self.inputs.at[slot], (1, 0))
      plgpu.wgmma(accumulator, self.ring.block(place), rows)
      # One thread lets the next inputs overwrite these when it has waited. The
      # warps start a product together, see pipeline.free_barrier.
      plgpu.wgmma_wait(0)
      self.ring.release(place)
      pl.when(step + ahead < own)(functools.partial(load, step + ahead))

    def unit(unit, start):
      end = self._own(cut.first_step(unit + 1) - begin, skipped)

      def multiply(accumulator):
        lax.fori_loop(start, end, functools.partial(step, accumulator), None)
        return pipeline.read(accumulator, 0)

      accumulator = pipeline.accumulator(_TILE, self.inputs.shape[1])
      sums = pl.run_scoped(multiply, accumulator)
      write = functools.partial(self._write, number, target, unit)
      self._hand_over(done + unit - first, sums, write)
      return end

    lax.fori_loop(0, jnp.minimum(own, ahead), lambda i, _: load(i), None)
    lax.fori_loop(first, last, unit, jnp.int32(0))
    return done + last - first, before + total, mine + own

  def _arrival(self, slot):
    return self.arrived.at[self.warpgroup * self.plan.ahead + slot]

  @staticmethod
  def _own(steps, skipped):
    """How many of the first steps of a product belong to this warpgroup."""
    return div(steps - skipped + WARPGROUPS - 1, WARPGROUPS)

  def _hand_over(self, unit, sums, write):
    """Warpgroup 0 writes the sums of both."""

    @pl.when(self.warpgroup == 1)
    def _():
      @pl.when(unit > 0)
      def _():
        plgpu.barrier_wait(self.handing.at[1])

      row_registers.hand_over(sums, self.handed)
      plgpu.barrier_arrive(self.handing.at[0])

    @pl.when(self.warpgroup == 0)
    def _():
      plgpu.barrier_wait(self.handing.at[0])
      both = sums + row_registers.take(sums, self.handed)
      plgpu.barrier_arrive(self.handing.at[1])
      write(both)

  def end(self, at):
    """Waits until the last sums were taken, as units.Ring.drain."""

    @pl.when((self.warpgroup == 1) & (at[0] > 0))
    def _():
      plgpu.barrier_wait(self.handing.at[1])

  def _write(self, number, target, unit, sums):
    plan, cut, out = self.plan, self.plan.cuts[number], self.gmem[target]
    group, part = div(unit, cut.parts), rem(unit, cut.parts)
    first, end = (cut.first_slab(group + i) for i in range(2))
    if target == "sums":
      row_registers.write_columns(sums, out.at[part], first, end - first)
      return
    both, is_gated = [sums], plan.is_gated(number)
    if is_gated:  # Rows i = 0 and i = 1 of the result are the same.
      both = [row_registers.of_one_i(sums, i) for i in range(2)]
    if number == 1:
      sums = units.activated(plan.activation, *both)
    place = out.at[pl.ds(0, plan.rows)]
    row_registers.write_columns(
      sums.astype(out.dtype), place, first, end - first, is_gated
    )


def _add(plan, gmem, warps, worker, number, before, after):
  """x + norm(y), and the norm of that: a row for each warpgroup.

  warps: (4,), shared memory of this warpgroup. worker: its number.
  """
  norm_out, norm_in = plan.norms[number : number + 2]
  dtype, width = gmem[before].dtype, gmem[before].shape[1]
  layout = row_registers.strided(width)

  def scale(norm, index):
    if norm is not None:
      return plgpu.load(gmem[f"scale{index}"], layout=layout)
    return None

  def normalised(x, norm, scale):
    total = row_registers.sum_of_all(x * x, warps)
    return x * lax.rsqrt(total / x.size + norm.epsilon) * scale

  scales = scale(norm_out, number), scale(norm_in, number + 1)
  workers = plan.programs * WARPGROUPS

  def row(i, _):
    r, y = worker + i * workers, 0.0
    for part in range(plan.cuts[number].parts):
      y += plgpu.load(gmem["sums"].at[part, r], layout=layout)
    y = y.astype(dtype).astype(jnp.float32)
    if norm_out is not None:
      y = normalised(y, norm_out, scales[0])
      y = y.astype(dtype).astype(jnp.float32)
    x = plgpu.load(gmem[before].at[r], layout=layout).astype(jnp.float32)
    x = (x + y).astype(dtype)
    gmem[after].at[r][...] = x
    if norm_in is not None:
      h = normalised(x.astype(jnp.float32), norm_in, scales[1])
      gmem["h"].at[r][...] = h.astype(dtype)

  lax.fori_loop(0, units.share(plan.rows, worker, workers), row, None)
