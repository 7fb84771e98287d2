"""Tiles."""
from typing import NamedTuple


class Tile(NamedTuple):
  block_q: int
  block_k: int
  num_warps: int
  num_stages: int


def padded(width):
  """Triton's tiles are powers of two, and its products begin at 16."""
  return max(16, 1 << (width - 1).bit_length())


def tile(problem, direction, capability):
  return Tile(16, 16, 4, 2)
