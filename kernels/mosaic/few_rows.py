"""kernels/products.py for a few rows, with the tensor cores.

They multiply 64 x 16 weights by 16 x 8 inputs or more, so rows are padded to a
multiple of 8. What is computed for the padding is not written.

A unit has 64 outputs. Its steps are blocks of 64 x 128 weights, and the two
compute warpgroups take turns. One of them adds up both sums and writes them.
W_out and W_down have few outputs, so their units have a part of the inputs
only. When all programs have met, a stage adds these parts up, adds the result
to the stream, and normalises it: a row for each warpgroup.

  W_out y   meet   x, norm(x)   meet   W_up   meet
  W_down z  meet   x, norm(x)   meet   W_next

With swiglu a unit has 32 gates and 32 ups, by turns of 8 rows. So a thread of
the tensor cores has both of an output.
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

_SIDE = 64  # outputs of a unit
_CHUNK = 128  # inputs of a step
_AHEAD = 4  # steps of a warpgroup whose inputs are loaded ahead
_PIECES = 8  # copies of a block of weights
_PADDING = 8  # rows are padded to a multiple of it
# What the beginning and end of a unit cost, and what it costs to add up its
# parts, in multiples of the time that one input of a unit takes.
_UNIT_COST, _PART_COST = 64, 32
_MEETINGS = 5


class _Cut(NamedTuple):
  """How a product is cut into units."""

  outputs: int
  inputs: int
  depth: int  # inputs of a unit

  @classmethod
  def of(cls, number: int, shape: Sequence[int], programs: int) -> "_Cut":
    """The cut with which the programs take the least time.

    number: of the product. A stage follows products 0 and 2.
    """
    outputs, inputs = shape
    if number % 2:
      return cls(outputs, inputs, inputs)

    def cost(cut):
      rounds = pl.cdiv(cut.units, programs)
      return rounds * (cut.depth + _UNIT_COST) + cut.parts * _PART_COST

    depths = range(_CHUNK, inputs + 1, _CHUNK)
    cuts = [cls(outputs, inputs, x) for x in depths if inputs % x == 0]
    return min(cuts, key=cost)

  @property
  def parts(self) -> int:
    """How many units have the same outputs."""
    return self.inputs // self.depth

  @property
  def units(self) -> int:
    return self.outputs // _SIDE * self.parts

  @property
  def steps(self) -> int:
    """Steps of a unit."""
    return self.depth // _CHUNK

  def place(self, unit):
    """(the number of 64 outputs, the part) of a unit."""
    return div(unit, self.parts), rem(unit, self.parts)

  def inputs_of(self, part, step):
    """The inputs of a step of a unit."""
    return pl.ds(part * self.depth + step * _CHUNK, _CHUNK)


class _Plan(NamedTuple):
  """What is known before the kernel runs."""

  rows: int
  cuts: list[_Cut]
  deals: list[units.Deal]
  norms: Sequence[Any]
  activation: str
  programs: int

  @property
  def padded(self):
    """The rows of a tile of the tensor cores."""
    return pl.cdiv(self.rows, _PADDING) * _PADDING

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
  deals = units.Deal.of([cut.units for cut in cuts], programs)
  plan = _Plan(len(x_BD), cuts, deals, norms, activation, programs)
  inputs, outputs = _arrays(plan, x_BD, y_BF, matrices, calls)
  padded, per_slot = plan.padded, _CHUNK * dtype.itemsize
  for_inputs = WARPGROUPS * _AHEAD * padded * per_slot + 4 * _SIDE * padded
  stages = (units.SMEM - for_inputs) // (_SIDE * per_slot)
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
      blocks(stages, _SIDE, _CHUNK),
      plgpu.Barrier(num_barriers=stages, num_arrivals=_PIECES),
      plgpu.Barrier(num_barriers=stages),
      blocks(WARPGROUPS, _AHEAD, padded, _CHUNK),
      plgpu.Barrier(num_barriers=WARPGROUPS * _AHEAD),
      plgpu.SMEM((_SIDE * padded,), jnp.float32),
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
    "z": (stored, plan.cuts[2].inputs),
  }  # fmt: skip
  if len(plan.cuts) == 4:
    shapes["heads"] = rows, plan.cuts[3].outputs
  outputs = {x: jax.ShapeDtypeStruct(s, dtype) for x, s in shapes.items()}
  parts = max(cut.parts for cut in plan.cuts[::2])
  outputs["sums"] = jax.ShapeDtypeStruct((parts, rows, width), jnp.float32)
  return inputs, outputs


def _feed(plan, gmem, smem, full, free, *_):
  """The memory warpgroup: all weights of this program, product by product."""
  ring, step = units.Ring(smem, full, free), jnp.int32(0)
  size = _SIDE // _PIECES
  for number, (cut, deal) in enumerate(zip(plan.cuts, plan.deals, strict=True)):
    matrix, is_gated = gmem[f"matrix{number}"], plan.is_gated(number)
    # Where the pieces of a block are, from its first row on.
    offsets = [piece * size for piece in range(_PIECES)]
    if is_gated:
      up = cut.outputs // 2
      offsets = [x // 2 * size + x % 2 * up for x in range(_PIECES)]
    rows = _SIDE // (1 + is_gated)

    def one(i, _, start=step, cut=cut, deal=deal, matrix=matrix, rows=rows,
            offsets=offsets):  # fmt: skip
      unit, c = div(i, cut.steps), rem(i, cut.steps)
      block, part = cut.place(deal.unit(unit))
      slot, arrived = ring.slot(start + i)
      columns = cut.inputs_of(part, c)
      for piece, offset in enumerate(offsets):
        plgpu.copy_gmem_to_smem(
          matrix.at[pl.ds(block * rows + offset, size), columns],
          slot.at[pl.ds(piece * size, size)],
          arrived,
        )

    count = deal.count() * cut.steps
    lax.fori_loop(0, count, one, None)
    step += count
  ring.drain(step)


def _compute(
  plan, gmem, smem, full, free, inputs, arrived, handed, handing, warps, met
):  # fmt: skip
  """The compute warpgroups: products and stages."""
  warpgroup = lax.axis_index("warpgroup")
  meet = units.Meeting(gmem, met, plan.programs)
  multiply = _Products(
    plan, gmem, units.Ring(smem, full, free), inputs.at[warpgroup],
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
  inputs: Any  # (_AHEAD, rows, _CHUNK), of this warpgroup
  arrived: Any  # (warpgroups * _AHEAD,), a barrier for each of them
  handed: Any  # sums that warpgroup 1 hands over to warpgroup 0
  handing: Any  # two barriers: they are there, and they have been taken
  warpgroup: jax.Array

  def __call__(self, number, source, target, at):
    """This program's units of a product.

    at: the units and steps of this program, and the steps of this warpgroup,
    before the product. Returns them after it.
    """
    (done, before, mine), cut = at, self.plan.cuts[number]
    deal, source = self.plan.deals[number], self.gmem[source]
    total = deal.count() * cut.steps
    # The steps of all products are counted together, and a warpgroup has every
    # second one.
    skipped = rem(before + self.warpgroup, WARPGROUPS)
    own = self._own(total, skipped)

    def load(step):
      """Starts to load the inputs of a step of this warpgroup."""
      among_all = step * WARPGROUPS + skipped
      unit, c = div(among_all, cut.steps), rem(among_all, cut.steps)
      _, part = cut.place(deal.unit(unit))
      slot = rem(mine + step, _AHEAD)
      # 0, in a form that JAX does not know. It refuses a constant slice that
      # ends beyond the last row, where the copy engine writes zeros.
      zero = jnp.minimum(unit, 0)
      rows = pl.ds(zero, self.inputs.shape[1])
      plgpu.copy_gmem_to_smem(
        source.at[rows, cut.inputs_of(part, c)],
        self.inputs.at[slot],
        self._arrival(slot),
      )

    def step(accumulator, step, _):
      slot = rem(mine + step, _AHEAD)
      place = before + step * WARPGROUPS + skipped
      self.ring.wait(place)
      plgpu.barrier_wait(self._arrival(slot))
      rows = plgpu.transpose_ref(self.inputs.at[slot], (1, 0))
      plgpu.wgmma(accumulator, self.ring.block(place), rows)
      # One thread lets the next inputs overwrite these when it has waited. The
      # warps start a product together, see pipeline.free_barrier.
      plgpu.wgmma_wait(0)
      self.ring.release(place)
      pl.when(step + _AHEAD < own)(functools.partial(load, step + _AHEAD))

    def unit(i, first):
      end = self._own((i + 1) * cut.steps, skipped)

      def multiply(accumulator):
        lax.fori_loop(first, end, functools.partial(step, accumulator), None)
        return pipeline.read(accumulator, 0)

      accumulator = pipeline.accumulator(_SIDE, self.inputs.shape[1])
      sums = pl.run_scoped(multiply, accumulator)
      write = functools.partial(self._write, number, target, deal.unit(i))
      self._hand_over(done + i, sums, write)
      return end

    lax.fori_loop(0, jnp.minimum(own, _AHEAD), lambda i, _: load(i), None)
    lax.fori_loop(0, deal.count(), unit, jnp.int32(0))
    return done + deal.count(), before + total, mine + own

  def _arrival(self, slot):
    return self.arrived.at[self.warpgroup * _AHEAD + slot]

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
    block, part = cut.place(unit)
    is_gated = plan.is_gated(number)
    size = _SIDE // (1 + is_gated)
    columns = pl.ds(block * size, size)
    if target == "sums":
      row_registers.write_columns(sums, out.at[part, :, columns])
      return
    both = [sums]
    if is_gated:  # Rows i = 0 and i = 1 of the result are the same.
      both = [row_registers.of_one_i(sums, i) for i in range(2)]
    if number == 1:
      sums = units.activated(plan.activation, *both)
    place = out.at[pl.ds(0, plan.rows), columns]
    row_registers.write_columns(sums.astype(out.dtype), place, is_gated)


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
