"""Which tiles a program of the Hopper kernels works off."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Schedule:
  """Which tiles a program works off, and in which order.

  Head after head, so that a head's blocks stay in the second-level cache, and
  the heaviest tile of a head first.

  Where tiles differ in work, a table says which are whose: each goes to the
  program that has had least by then, and the lightest quarter of every head
  comes last of all and fills the gaps. 2,048 tiles of a causal mask on 132
  programs: the busiest has 1.00 to 1.01 times its share. By turns it would have
  1.03, or 1.54 where a head has nearly as many tiles as there are programs.
  """

  def __init__(self, tiles, heads, programs, heavy_last, costs=None):
    """costs: (tiles,) work of each, where it differs between them."""
    self._tiles, self._heads, self._heavy_last = tiles, heads, heavy_last
    self._total, self.programs = tiles * heads, min(programs, tiles * heads)
    # (programs, 1 + most) int32: how many, and head * tiles + tile of each.
    self.table = None if costs is None else self._balanced(costs)

  def _balanced(self, costs):
    heaviest_first = np.argsort(-costs, stable=True)
    last = max(self._tiles // 4, 1)
    most, rest = heaviest_first[:-last], heaviest_first[-last:]
    heads = np.arange(self._heads) * self._tiles
    order = [*(heads[:, None] + most).flat, *(heads + rest[:, None]).flat]
    of_program = [[] for _ in range(self.programs)]
    loads = [(0, program) for program in range(self.programs)]  # a heap
    for position in order:
      load, program = loads[0]
      of_program[program].append(position)
      load += int(costs[position % self._tiles])
      heapq.heapreplace(loads, (load, program))
    table = np.zeros((self.programs, 1 + max(map(len, of_program))), np.int32)
    for row, positions in zip(table, of_program, strict=True):
      row[: len(positions) + 1] = len(positions), *positions
    return table

  def array(self):
    """The table as an array, or None."""
    if self.table is None:
      return None
    # Of a jit of its own: custom_partitioning takes no function with constants.
    return jax.jit(lambda: jnp.asarray(self.table))()

  def count(self, table):
    """How many are this program's. table: a Ref of the array, or None."""
    program = lax.axis_index("program")
    if table is not None:
      return table[program, 0]
    # All rounds but the last are full. Not by a division, which registers that
    # threads share cannot do: all in a loop so long would be kept by each.
    rounds = -(-self._total // self.programs)
    last = (rounds - 1) * self.programs + program
    return rounds - (last >= self._total).astype(jnp.int32)

  def tile(self, table, i):
    """(head, tile) of this program's i-th; head counts over the batch too."""
    program = lax.axis_index("program")
    if table is not None:
      # So that a compiler knows it, and divides by shifting.
      position = jnp.maximum(table[program, i + 1], 0)
      return div(position, self._tiles), rem(position, self._tiles)
    position = i * self.programs + program
    tile = rem(position, self._tiles)
    if self._heavy_last:
      tile = self._tiles - 1 - tile
    return div(position, self._tiles), tile


def div(a, b):
  return lax.div(a, lax.full_like(a, b))  # Of what is not negative.


def rem(a, b):
  return lax.rem(a, lax.full_like(a, b))
