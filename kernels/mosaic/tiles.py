"""The tile sizes of the Hopper kernels, by head width.

block_q is always a number of queries, and block_kv a number of keys. In
forward.py and dq.py a tile of queries is stationary in shared memory and blocks
of keys are streamed past it. In dkv.py and fused_backward.py it is the other
way round. Shared code asks a tile for `stationary` and `streamed`.
"""

import dataclasses
from typing import ClassVar, NamedTuple


@dataclasses.dataclass(frozen=True)
class QueryTile:
  """The sizes of a kernel with stationary queries."""

  block_q: int  # queries of one compute warpgroup
  block_kv: int  # keys of one streamed block
  stages: int  # streamed blocks in shared memory
  warpgroups: int  # compute warpgroups; one more feeds them
  registers: int  # per compute thread; at most 512 over all warpgroups
  overlap: bool = False  # start a step's second product with the next's first
  paced: bool = False  # compute weights in small groups, see registers.tanh
  # Compute every second inverse of the exact sigmoid by a polynomial, which
  # spares the special-function unit (registers.sigmoid). This is faster at head
  # width 64. At 128 the forward pass is slower, and other widths were not
  # measured (benchmarks/NOTES.md, "The exact sigmoid on an H200").
  polynomial: bool = False
  cluster: int = 1  # programs that share streamed blocks, see pipeline.py

  of_queries: ClassVar[bool] = True  # Queries are stationary.

  @property
  def of_program(self) -> int:
    """Queries of all compute warpgroups of a program together."""
    return self.block_q * self.warpgroups

  @property
  def stationary(self) -> int:
    """Queries of all programs of a cluster together."""
    return self.of_program * self.cluster

  @property
  def streamed(self) -> int:
    """Keys of one block."""
    return self.block_kv


@dataclasses.dataclass(frozen=True)
class KeyTile:
  """The sizes of a kernel with stationary keys."""

  block_kv: int  # keys of one compute warpgroup
  block_q: int  # queries of one streamed block
  stages: int  # as in QueryTile
  warpgroups: int
  registers: int
  polynomial: bool = False  # as in QueryTile
  cluster: int = 1  # as in QueryTile
  # Start the products do v^T of normalised rows at -shift. With the registers
  # of head width 64 this is slower.
  preset: bool = False

  of_queries: ClassVar[bool] = False

  @property
  def of_program(self) -> int:
    """Keys of all compute warpgroups of a program together."""
    return self.block_kv * self.warpgroups

  @property
  def stationary(self) -> int:
    """Keys of all programs of a cluster together."""
    return self.of_program * self.cluster

  @property
  def streamed(self) -> int:
    """Queries of one block."""
    return self.block_q


class Tiles(NamedTuple):
  """The tiles of one head width."""

  forward: QueryTile
  dq: QueryTile
  dkv: KeyTile
  # With logit vectors, which take shared memory; None: `dq` itself.
  dq_with_vectors: QueryTile | None = None


TILES = {
  32: Tiles(
    QueryTile(64, 128, 3, 3, 160),
    QueryTile(64, 128, 2, 2, 240),
    KeyTile(64, 64, 2, 2, 240),
  ),
  64: Tiles(
    QueryTile(64, 64, 4, 4, 112, paced=True, polynomial=True),
    QueryTile(64, 128, 2, 2, 240, polynomial=True),
    KeyTile(64, 64, 2, 2, 240, polynomial=True),
  ),
  96: Tiles(
    QueryTile(64, 128, 2, 2, 240, overlap=True),
    QueryTile(64, 128, 2, 2, 240),
    KeyTile(64, 64, 2, 2, 240),
  ),
  128: Tiles(
    QueryTile(64, 128, 2, 2, 240, overlap=True, cluster=2),
    QueryTile(64, 128, 2, 2, 240),
    KeyTile(64, 64, 2, 2, 240),
    dq_with_vectors=QueryTile(64, 64, 2, 2, 240),
  ),
  192: Tiles(
    QueryTile(64, 64, 2, 2, 240),
    QueryTile(64, 32, 2, 2, 240),
    KeyTile(64, 64, 2, 2, 240),
  ),
  256: Tiles(
    QueryTile(64, 32, 2, 2, 240),
    QueryTile(64, 32, 1, 2, 240),
    KeyTile(64, 32, 2, 2, 240),
  ),
}

# The tiles of the forward pass without masks, ALiBi, lengths, segments and
# normalised rows, from LONG keys on. There most blocks are full, and all are
# computed alike.
LONG_TILES = {64: QueryTile(64, 192, 2, 3, 160, paced=True, polynomial=True)}
LONG = 8192

# The least number of keys from which programs of the forward pass form
# clusters, if `cluster` says so. It gained 2 to 5 % with 16,384 keys, and
# nothing clear with 4,096 (benchmarks/NOTES.md, "Clusters").
FORWARD_CLUSTERS = 8192
# Programs form no clusters if they would stream more blocks than this times as
# many as they do alone. A program also computes the blocks that only the other
# one sees. With a causal mask these are 3 % of 4,096 keys and 6 % of 2,048.
MOST_BLOCKS = 1.035


@dataclasses.dataclass(frozen=True)
class FusedBackward:
  """The tile of the fused backward pass, and from which lengths it is used.

  With few keys, or half of them hidden, its sums of dq make the memory the
  limit. The memory of an H200 is 1.43 times as fast as that of an H100. With
  1,024 keys and a causal mask at head width 128, the two kernels take 0.84 to
  0.86 of the fused one's time on an H100, and 1.06 to 1.09 on an H200
  (benchmarks/NOTES.md, "Short causal passes").
  """

  tile: KeyTile
  open: float  # minimum key length without a mask
  masked: float  # minimum key length with one, on all cards but an H200
  masked_on_h200: float  # the same on an H200
  stages_with_vectors: int  # Vectors take shared memory: fewer blocks fit.


FUSED_BACKWARD = {
  64: FusedBackward(
    KeyTile(64, 128, 3, 2, 240, polynomial=True),
    open=1024,
    masked=1024,
    masked_on_h200=1024,
    stages_with_vectors=3,
  ),
  128: FusedBackward(
    KeyTile(64, 64, 3, 2, 240, cluster=2, preset=True),
    open=1024,
    masked=2048,
    masked_on_h200=1024,
    stages_with_vectors=2,
  ),
}

# The head width up to which the registers hold dk and dv at the same time.
# Wider heads compute them one after the other.
WIDEST_DK_AND_DV = 128
