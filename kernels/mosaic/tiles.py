"""How the Hopper kernels are cut up, by head width."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
  """How a kernel is cut up."""

  rows: int  # of one compute warpgroup
  block: int  # rows of the other side at a time
  stages: int  # blocks in shared memory
  warpgroups: int  # that compute
  registers: int  # of a thread of those; all warpgroups' must fit in 512
  overlap: bool = False  # start a step's second product with the next's first
  paced: bool = False  # tanh by tanh


# By head width: tiles of queries for the output and for dq, and of keys.
TILES = {
  32: (
    Tile(64, 128, 3, 3, 160),
    Tile(64, 128, 2, 2, 240),
    Tile(64, 64, 2, 2, 240),
  ),
  64: (
    Tile(64, 64, 4, 4, 112, paced=True),
    Tile(64, 128, 2, 2, 240),
    Tile(64, 64, 2, 2, 240),
  ),
  96: (
    Tile(64, 128, 2, 2, 240, overlap=True),
    Tile(64, 128, 2, 2, 240),
    Tile(64, 64, 2, 2, 240),
  ),
  128: (
    Tile(64, 128, 2, 2, 240, overlap=True),
    Tile(64, 128, 2, 2, 240),
    Tile(64, 64, 2, 2, 240),
  ),
  192: (
    Tile(64, 64, 2, 2, 240),
    Tile(64, 32, 2, 2, 240),
    Tile(64, 64, 2, 2, 240),
  ),
  256: (
    Tile(64, 32, 2, 2, 240),
    Tile(64, 32, 1, 2, 240),
    Tile(64, 32, 2, 2, 240),
  ),
}
# Of the output, where most blocks are full and all are computed alike.
LONG_TILES = {64: Tile(64, 192, 2, 3, 160, paced=True)}
LONG = 8192


@dataclasses.dataclass(frozen=True)
class Added:
  """Where shares of dq are added in memory: from so many keys on."""

  tile: Tile  # of keys
  open: float  # without masks
  masked: float


ADDED = {
  64: Added(Tile(64, 128, 3, 2, 240), open=1024, masked=1024),
  128: Added(Tile(64, 64, 3, 2, 240), open=1024, masked=2048),
}
BOTH = 128  # The head width up to which registers hold dk and dv at once.
