"""Calls the kernel for few queries and many keys, and says when it fits.

The kernel is in decode_kernel.py.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sigattn.kernels.problem import FLOAT8, Operands, Problem
from sigattn.kernels.triton import launch, tiles

MOST_QUERIES = 16  # With more, a tile of queries of one head is full enough.
LEAST_KEYS = 128  # Fewer are not worth dividing.
# The programs that keep an H100 busy: four on each of its 132 multiprocessors.
_PROGRAMS = 4 * 132
# The least number of slots for each program. The second is for small blocks.
_LEAST_SHARE, _LEAST_SMALL_SHARE = 128, 64


class Tile(NamedTuple):
  """How the work of the kernel is cut up."""

  rows: int  # queries times heads, of a program
  block_kv: int  # keys of a step
  splits: int  # programs that share the keys of an example
  num_warps: int
  num_stages: int  # steps whose keys are loaded ahead


class New(NamedTuple):
  """How the query and the key of a new token are changed before attention.

  RMSNorm over the features of each head comes first. It has the scales (H,) and
  epsilon. Then comes RoPE, with the cosines and sines of the angles of each
  row, (B, half of the rotated features). A step whose values are None is left
  out.

  arrived: `counters`. They are passed from call to call, so that not every call
  must set them to zero.
  """

  arrived: jax.Array
  q_scale: jax.Array | None = None
  k_scale: jax.Array | None = None
  epsilon: float | None = None
  cos: jax.Array | None = None
  sin: jax.Array | None = None


def fits(problem: Problem) -> bool:
  """Whether the decode kernel computes the forward pass of a problem."""
  return (
    problem.query_len <= MOST_QUERIES
    and problem.key_len >= LEAST_KEYS
    and problem.shapes.query_segment_ids is None
  )


def tile(problem: Problem, paged: bool = False) -> Tile:
  """The tile of a problem. paged: whether its keys lie in pages."""
  group = problem.num_heads // problem.num_kv_heads
  wide = problem.dtype == "float32"
  rows = min(tiles.padded(problem.query_len * group), 16 if wide else 64)
  width = tiles.padded(problem.head_dim)
  eight_bits = problem.key_dtype == FLOAT8
  # Small blocks leave room for more programs on a multiprocessor, which start
  # while others end. At width 64 a whole step of 1B took 0 to 6 % less time.
  small = width <= 64 and not wide and not eight_bits
  block_kv = 32 if wide or width > 128 or small else 64
  share = _LEAST_SMALL_SHARE if small else _LEAST_SHARE
  splits = -(-_PROGRAMS // (cells(problem, rows) * problem.batch))
  splits = min(splits, -(-problem.key_len // share))
  stages = 2 if wide else 3
  if wide and width >= 128 and eight_bits:
    # A tile is converted in registers, and larger ones spill.
    block_kv, stages = 16, 1
  if paged:
    # A load of keys waits for the load of their pages' numbers, and Triton
    # divides the stages between these two. With this number, as many keys are
    # loaded ahead as without pages.
    stages = 2 * stages - 1
  # Products of float32 need many registers, which spill with four warps.
  warps = 8 if wide and width >= 128 else 4
  return Tile(rows, block_kv, splits, warps, stages)


def in_float16(problem: Problem) -> bool:
  """Whether the products of bfloat16 queries are computed in float16.

  This is faster if the keys are in 8 bits, see decode_kernel.py, and float16
  holds numbers of 8 bits exactly. A query beyond 65,504 becomes 65,504. Only
  the weights of sigmoid and softmax, at most 1, are sure to be in range.
  """
  kinds = "sigmoid", "softmax"
  eight_bits = problem.key_dtype == FLOAT8 and problem.dtype == "bfloat16"
  return eight_bits and problem.kind in kinds


def counters(problem: Problem, tile: Tile) -> jax.Array:
  """Zeros, in which the kernel counts the programs that have finished."""
  return jnp.zeros(problem.batch * cells(problem, tile.rows), jnp.int32)


def cells(problem: Problem, rows: int) -> int:
  """The number of programs of an example if its keys are not divided."""
  group = problem.num_heads // problem.num_kv_heads
  return problem.num_kv_heads * -(-problem.query_len * group // rows)


def forward(
  problem: Problem,
  precision: str,
  tile: Tile,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  pages: jax.Array | None = None,
  new: New | None = None,
) -> tuple[jax.Array, ...]:
  """(out, sums): (B, T, N, H), and with problem.normalize (B, T, N) float32.

  With `new` it also returns (key, value, arrived). Key and value then have the
  new token in slot `operands.query_offset`, in the rows that have such a slot.

  Args:
    problem: with pages, key_len is their number in a row times their length.
    precision: of float32 products, a value of Triton's input_precision.
    tile: how the work is cut up.
    query: (B, T, N, H).
    key, value: (B, S, K, H), or (pages, length, K, H); of problem.key_dtype.
    operands: without dense ones and segments.
    pages: None, or (B, pages of a row) int32.
    new: for one new token in each row. query is then (B, 1, N + 2 K, H): the
      token's query heads, then its key heads and its value heads.
  """
  from sigattn.kernels.triton import decode_kernel

  extends = new is not None
  page = None if pages is None else key.shape[1]
  splits = tile.splits
  shares = (splits,) if splits > 1 else ()
  rows = problem.batch, problem.query_len, problem.num_heads
  heads, softmax = (*rows, problem.head_dim), problem.kind == "softmax"
  before = New(launch.unread()) if new is None else new
  shapes = [
    (heads, query.dtype),
    (rows if problem.normalize else (1,), "float32"),
    ((*shares, *heads) if shares else (1,), "float32"),
    ((*shares, *rows) if shares and problem.normalize else (1,), "float32"),
    ((*shares, *rows) if shares and softmax else (1,), "float32"),
    ((problem.batch * cells(problem, tile.rows),), "int32"),
    *((x.shape if extends else (1,), x.dtype) for x in (key, value)),
  ]
  results = launch.start(
    decode_kernel.decode,
    (
      query,
      key,
      value,
      before.arrived,
      launch.given(pages, jnp.int32),
      *(
        launch.given(x, jnp.float32)
        for x in (before.q_scale, before.k_scale, before.cos, before.sin)
      ),
      *launch.logit_operands(operands),
    ),
    [jax.ShapeDtypeStruct(*x) for x in shapes],
    tile,
    problem.batch * cells(problem, tile.rows) * splits,
    constants(problem, precision, tile, page, new),
    zeroed=(5,) if shares and not extends else (),
    aliases={1: 6, 2: 7, 3: 5} if extends else {},
  )
  out, sums, _, _, _, arrived, key, value = results
  return (out, sums, key, value, arrived) if extends else (out, sums)


def constants(
  problem: Problem,
  precision: str,
  tile: Tile,
  page: int | None,
  new: New | None = None,
) -> dict[str, Any]:
  """The compile-time arguments of the kernel, except warps and stages.

  page: the keys of a page, or None. new: as in forward.
  """
  epsilon, cos = (None, None) if new is None else (new.epsilon, new.cos)
  width = tiles.padded(problem.head_dim)
  group = problem.num_heads // problem.num_kv_heads
  rows = min(_power_of_two(problem.query_len * group), tile.rows)
  # As many shares are added at a time as fit in 32 registers of a thread.
  chunk = max(tile.num_warps * 32 * 32 // (rows * width), 1)
  half = in_float16(problem)
  if half:  # The weights are scaled as in float16.
    problem = dataclasses.replace(problem, dtype="float16")
  return launch.common("decode", problem, precision) | dict(
    PAGE=page,
    ROWS=tile.rows,
    BLOCK_KV=tile.block_kv,
    SPLITS=tile.splits,
    CELLS=cells(problem, tile.rows),
    ALL_ROWS=problem.batch * problem.query_len * problem.num_heads,
    ADDED_ROWS=rows,
    CHUNK=min(chunk, _power_of_two(tile.splits)),
    NEW=new is not None,
    QK_EPSILON=epsilon,
    TURNED=0 if cos is None else 2 * cos.shape[1],
    HALF=half,
  )


def _power_of_two(number):
  """The least power of two that is not below the number."""
  return 1 << (number - 1).bit_length()
