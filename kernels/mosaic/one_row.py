"""kernels/products.py for one row, without the tensor cores.

A unit has 16 outputs (with swiglu 8 of gate and 8 of up) and all inputs, so
that no partial sums go through memory. Each compute warpgroup has half of the
outputs. A thread has the same inputs of all of them, see row_registers.strided.
Every program computes the row between two products for itself, and its
threads have it in registers as the next product needs it. So programs meet
three times:

  W_out y   meet   x, norm(x)   W_up
            meet                W_down z
            meet   x, norm(x)   W_next
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels import device
from sigattn.kernels.mosaic import row_registers, units
from sigattn.kernels.mosaic.schedule import div, rem
from sigattn.kernels.mosaic.units import WARPGROUPS

_OUTPUTS = 16  # of a unit
_MINE = _OUTPUTS // WARPGROUPS  # outputs of a warpgroup
_CHUNK = 512  # inputs of a slot of the ring, at most
_BLOCK = 256  # columns that the copy engine takes at once, at most
_MEETINGS = 3


def run(
  x_1D: jax.Array,
  y_1F: jax.Array,
  matrices: Sequence[jax.Array],
  norms: Sequence[Any],
  activation: str,
  counts: jax.Array,
  calls: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """As products.run.

  matrices: three or four. norms: behind and before the products, or None.
  """
  programs = device.current().cores
  dtype = x_1D.dtype
  chunk = math.gcd(_CHUNK, *(x.shape[1] for x in matrices))
  block = min(chunk, _BLOCK)
  sizes = [x.shape for x in matrices]
  outputs = {"stream": sizes[0][0], "branch": sizes[0][0], "z": sizes[2][1]}
  if len(matrices) == 4:
    outputs["heads"] = sizes[3][0]
  inputs = {
    "x": x_1D[0],
    "y": y_1F[0],
    "before": calls * (_MEETINGS * programs),
  }
  inputs |= {
    f"matrix{i}": x.reshape(len(x), -1, block) for i, x in enumerate(matrices)
  }
  inputs |= {f"scale{i}": x.scale_D for i, x in enumerate(norms) if x}
  slot = _OUTPUTS * chunk * dtype.itemsize
  stages = min(units.SMEM // slot, units.MOST_BARRIERS)
  plan = _Plan(
    Deal.of([size // _OUTPUTS for size, _ in sizes], programs),
    sizes, norms, activation, chunk, programs,
  )  # fmt: skip
  found, counts = units.launch(
    "sigattn_products_of_one_row",
    functools.partial(_compute, plan),
    functools.partial(_feed, plan),
    inputs,
    {x: jax.ShapeDtypeStruct((n,), dtype) for x, n in outputs.items()},
    counts,
    programs,
    [
      plgpu.SMEM((stages, _OUTPUTS, chunk // block, block), dtype),
      plgpu.Barrier(num_barriers=stages, num_arrivals=2 * WARPGROUPS),
      plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
      plgpu.SMEM((WARPGROUPS, 2, 4 * _MINE), jnp.float32),
      plgpu.SMEM((WARPGROUPS, 4), jnp.float32),
      units.met(),
    ],
  )
  heads = found["heads"][None] if "heads" in found else None
  return found["stream"][None], heads, counts


class Deal(NamedTuple):
  """The units of one product, and which program has which.

  They are dealt out by turns, and each product goes on where the one before
  stopped.
  """

  units: int
  first: int  # the program that has unit 0
  programs: int

  @classmethod
  def of(cls, counts: Sequence[int], programs: int) -> list["Deal"]:
    """A Deal for each of several products, one after the other."""
    starts = [sum(counts[:i]) % programs for i in range(len(counts))]
    pairs = zip(counts, starts, strict=True)
    return [cls(units, first, programs) for units, first in pairs]

  def count(self) -> jax.Array:
    """The number of this program's units."""
    return units.share(self.units, self._place(), self.programs)

  def unit(self, i: jax.Array) -> jax.Array:
    """The number of this program's i-th unit."""
    return self._place() + i * self.programs

  def _place(self):
    program = lax.axis_index("program")
    return rem(program + (self.programs - self.first), self.programs)


class _Plan(NamedTuple):
  """What is known before the kernel runs."""

  deals: list[Deal]
  sizes: list[tuple[int, int]]  # (outputs, inputs) of each product
  norms: Sequence[Any]
  activation: str
  chunk: int
  programs: int

  def parts(self, number):
    """2 if outputs are pairs of gate and up, else 1."""
    return 2 if number == 1 and self.activation == "swiglu" else 1

  def ring(self, smem, full, free):
    bytes_of_slot = _OUTPUTS * self.chunk * smem.dtype.itemsize
    return units.Ring(smem, full, free, bytes_of_slot)

  def steps(self, number):
    """The slots of the ring that a unit takes."""
    return self.sizes[number][1] // self.chunk


def _feed(plan, gmem, smem, full, free, *_):
  """The memory warpgroup: all weights of this program, product by product."""
  ring, step = plan.ring(smem, full, free), jnp.int32(0)
  piece = _MINE // 2
  for number, deal in enumerate(plan.deals):

    def one(i, _, number=number, start=step):
      slot, arrived = ring.slot(start + i)
      pieces = _pieces(plan, gmem[f"matrix{number}"], number, i)
      for place, source in enumerate(pieces):
        target = slot.at[pl.ds(place * piece, piece)]
        plgpu.copy_gmem_to_smem(source, target, arrived)

    count = deal.count() * plan.steps(number)
    lax.fori_loop(0, count, one, None)
    step += count
  ring.drain(step)


def _pieces(plan, matrix, number, step):
  """The weights of a step of a product, in the order of a slot of the ring.

  For each warpgroup there are two pieces: of gate and up, or two halves.
  """
  steps, parts = plan.steps(number), plan.parts(number)
  piece, blocks = _MINE // 2, matrix.shape[1] // steps
  unit, c = div(step, steps), rem(step, steps)
  first = plan.deals[number].unit(unit) * (_OUTPUTS // parts)
  apart = len(matrix) // 2 if parts == 2 else piece
  return [
    matrix.at[
      pl.ds(first + w * piece * (3 - parts) + part * apart, piece),
      pl.ds(c * blocks, blocks),
    ]
    for w in range(WARPGROUPS)
    for part in range(2)
  ]


def _compute(plan, gmem, smem, full, free, sums, warps, met):
  """The compute warpgroups."""
  sums, warps = (x.at[lax.axis_index("warpgroup")] for x in (sums, warps))
  meet = units.Meeting(gmem, met, plan.programs)
  multiply = functools.partial(
    _product, plan, gmem, plan.ring(smem, full, free), sums
  )
  dtype = smem.dtype
  load = functools.partial(_load, plan.chunk)
  x = load(gmem["x"])
  step = multiply(0, load(gmem["y"]), "branch", jnp.int32(0))
  scales = _scales(plan, gmem, 0)
  meet()
  x, h = _add(x, load(gmem["branch"]), plan.norms[:2], scales, warps, dtype)
  step = multiply(1, h, "z", step)
  meet()
  step = multiply(2, load(gmem["z"]), "branch", step)
  scales = _scales(plan, gmem, 2)
  meet()
  x, h = _add(x, load(gmem["branch"]), plan.norms[2:], scales, warps, dtype)

  @pl.when(
    (lax.axis_index("program") == 0) & (lax.axis_index("warpgroup") == 0)
  )
  def _():
    for i, part in enumerate(x):
      place = gmem["stream"].at[pl.ds(i * plan.chunk, plan.chunk)]
      place[...] = part.astype(dtype)

  if len(plan.deals) == 4:
    multiply(3, h, "heads", step)


# A row is a list of arrays (chunk,) of float32, each in row_registers.strided.


def _load(chunk, ref):
  """A row from global memory."""
  layout = row_registers.strided(chunk)
  return [
    plgpu.load(ref.at[pl.ds(first, chunk)], layout=layout).astype(jnp.float32)
    for first in range(0, ref.shape[0], chunk)
  ]


def _scales(plan, gmem, number):
  """The scales of two norms, None if absent."""
  names = f"scale{number}", f"scale{number + 1}"
  return [
    _load(plan.chunk, gmem[name]) if name in gmem else None for name in names
  ]


def _add(x, y, norms, scales, warps, dtype):
  """(x + norm(y), norm of that or None), the first rounded to `dtype`."""
  if norms[0] is not None:
    y = _rounded(_normalised(y, norms[0], scales[0], warps), dtype)
  x = _rounded([a + b for a, b in zip(x, y, strict=True)], dtype)
  h = None
  if norms[1] is not None:
    h = _normalised(x, norms[1], scales[1], warps)
  return x, h


def _rounded(row, dtype):
  return [part.astype(dtype).astype(jnp.float32) for part in row]


def _normalised(row, norm, scale, warps):
  squares = functools.reduce(jnp.add, [part * part for part in row])
  total = row_registers.sum_of_all(squares, warps)
  size = sum(part.size for part in row)
  factor = lax.rsqrt(total / size + norm.epsilon)
  return [part * factor * s for part, s in zip(row, scale, strict=True)]


def _product(plan, gmem, ring, sums, number, h, out, step):
  """This program's units of a product.

  h: the inputs, a row. out: the name of the array for the results. step: the
  number of steps of the ring so far. Returns that number after the product.
  """
  deal, out = plan.deals[number], gmem[out]
  parts, steps = plan.parts(number), plan.steps(number)
  warpgroup = lax.axis_index("warpgroup")
  mine = pl.ds(warpgroup * _MINE, _MINE)
  columns = min(plan.chunk, _BLOCK)
  shape = _MINE, plan.chunk // columns, columns
  layout = row_registers.strided(*shape)

  def block(step):
    ring.wait(step)
    return plgpu.load(ring.block(step).at[mine], layout=layout)

  def unit(i, step):
    total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    following = block(step)
    for c in range(steps):
      # The next block is loaded while this one is multiplied.
      w, following = following, block(step + c + 1) if c + 1 < steps else None
      total = row_registers.add_products(total, w, h[c])
      ring.release(step + c)
    # By turns, because threads may still read the sums of the unit before.
    # Between products they meet.
    found = row_registers.sums_of_rows(total, sums.at[rem(i, 2)], parts)
    z = units.activated(plan.activation, *found) if number == 1 else found[0]
    size = _MINE // parts
    first = (deal.unit(i) * WARPGROUPS + warpgroup) * size
    row_registers.write_first(z.astype(out.dtype), out.at[pl.ds(first, size)])
    return step + steps

  return lax.fori_loop(0, deal.count(), unit, step)
