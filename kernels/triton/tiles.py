"""The table of tiles of the Triton kernels: block sizes for each card.

Nothing is tuned when a program runs. A card that is not in the table takes the
tiles of the next older card. `python -m benchmarks.tune_triton` writes the
table.
"""

import functools
import json
import pathlib
from typing import NamedTuple

from sigattn.kernels.problem import Problem

TABLE = pathlib.Path(__file__).with_name("tiles.json")
PASSES = ("forward", "backward_q", "backward_kv")
WIDTHS = (16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")
SHORT = 256  # tokens up to which a sequence takes short tiles


class Tile(NamedTuple):
  """The sizes of a kernel, in the order of the table in tiles.json."""

  block_q: int  # queries
  block_kv: int  # keys
  num_warps: int
  num_stages: int  # blocks that are loaded ahead


def tile(problem: Problem, direction: str, capability: int) -> Tile:
  """The tile of a pass.

  direction: one of PASSES. capability: of the card, 90 for 9.0.
  """
  table = _table()
  cards = [x for x in sorted(map(int, table)) if x <= capability]
  card = table[str(cards[-1])]
  bits, width = bits_of(problem.dtype), str(padded(problem.head_dim))
  whole = card["tiles"][bits][direction][width]
  if max(problem.query_len, problem.key_len) <= SHORT:
    short = card.get("short", {}).get(bits, {}).get(direction, {})
    whole = short.get(width, whole)
  whole = Tile(*whole)
  if problem.window or problem.shapes.query_segment_ids is not None:
    # These masks need more registers, so the streamed block is halved.
    name = "block_q" if direction == "backward_kv" else "block_kv"
    block = getattr(whole, name)
    whole = whole._replace(**{name: min(block, max(block // 2, 32))})
  # Blocks need not be longer than the sequence. Short ones need fewer warps.
  block_q = min(whole.block_q, padded(problem.query_len))
  block_kv = min(whole.block_kv, padded(problem.key_len))
  rows, all_rows = block_q, whole.block_q
  if direction == "backward_kv":
    rows, all_rows = block_kv, whole.block_kv
  warps = max(whole.num_warps * rows // all_rows, 1)
  return Tile(block_q, block_kv, warps, whole.num_stages)


def padded(length: int) -> int:
  """The next power of two, at least 16, as Triton's products require."""
  return max(16, 1 << (length - 1).bit_length())


def bits_of(dtype: str) -> str:
  """The key of a dtype in the table: its number of bits."""
  return "32" if dtype == "float32" else "16"


@functools.cache
def _table():
  return json.loads(TABLE.read_text())
