"""Assigns tiles to persistent programs."""

import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# How many tiles of the last heads each program has, on average. With 1 the gaps
# are wider, and with all heads fewer blocks would be found in the cache.
_ROUNDS = 3


class Schedule:
  """Says which tiles each program computes, and in which order.

  Heads follow one another, so that a head's blocks are found in the
  second-level cache. Within a head the tile with the most work comes first.

  If tiles differ in work, a table assigns them: each tile goes to the program
  that has the least work so far. The tiles of the last heads are in the order
  of their work, whichever head they belong to, so that the lightest ones fill
  the gaps. With clusters, a program here is a cluster.
  """

  def __init__(
    self,
    tiles: int,
    heads: int,
    programs: int,
    heavy_last: bool,
    costs: np.ndarray | None = None,
  ):
    """Plans the tiles of all heads.

    Args:
      tiles: number of tiles of one head.
      heads: number of heads, of all examples together.
      programs: number of programs that run at a time.
      heavy_last: whether the last tiles of a head have the most work.
      costs: (tiles,) the work of each tile, if it differs between them.
    """
    self._tiles, self._heads, self._heavy_last = tiles, heads, heavy_last
    self._total, self.programs = tiles * heads, min(programs, tiles * heads)
    # (programs, 1 + most) int32: a program's number of tiles, followed by
    # head * tiles + tile for each of them.
    self.table = None if costs is None else self._balanced(costs)

  def _balanced(self, costs):
    heaviest_first = np.argsort(-costs, stable=True)
    last = min(-(-_ROUNDS * self.programs // self._tiles), self._heads)
    heads = np.arange(self._heads) * self._tiles
    of_head = heads[:, None] + heaviest_first
    order = [*of_head[:-last].flat, *of_head[-last:].T.flat]
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

  def array(self) -> jax.Array | None:
    """The table as an array; None if every tile has the same work."""
    if self.table is None:
      return None
    # jit, because custom_partitioning accepts no function with constants.
    return jax.jit(lambda: jnp.asarray(self.table))()

  def count(self, table: Any) -> jax.Array:
    """The number of this program's tiles.

    table: a Ref of the array, or None.
    """
    program = lax.axis_index("program")
    if table is not None:
      return table[program, 0]
    # All rounds except the last are full. A division would be simpler. But
    # uniform registers, which threads share, cannot divide, so that each thread
    # would keep this count, and the addresses that depend on it, in registers
    # of its own.
    rounds = -(-self._total // self.programs)
    last = (rounds - 1) * self.programs + program
    return rounds - (last >= self._total).astype(jnp.int32)

  def tile(self, table: Any, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(head, tile) of this program's i-th tile.

    The number of a head is counted over all examples.
    """
    program = lax.axis_index("program")
    if table is not None:
      # jnp.maximum tells the compiler that the position is not negative, so
      # that it can divide by shifting.
      position = jnp.maximum(table[program, i + 1], 0)
      return div(position, self._tiles), rem(position, self._tiles)
    position = i * self.programs + program
    tile = rem(position, self._tiles)
    if self._heavy_last:
      tile = self._tiles - 1 - tile
    return div(position, self._tiles), tile


def div(a: jax.Array, b: int) -> jax.Array:
  """a // b, for a >= 0."""
  return lax.div(a, lax.full_like(a, b))


def rem(a: jax.Array, b: int) -> jax.Array:
  """a % b, for a >= 0."""
  return lax.rem(a, lax.full_like(a, b))
