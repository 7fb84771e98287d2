"""Tiles of the Triton kernels: python -m kernels.tuning

Times every tile that can be run for each pass, head width and size of the
numbers on the card at hand, and writes the fastest to kernels/tuning.json.
Nothing is tuned when a program runs: a card that is not in the table takes the
tiles of the next older one.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import time
from typing import NamedTuple

import jax

_TABLE = pathlib.Path(__file__).with_name("tuning.json")
PASSES = ("forward", "backward_q", "backward_kv")
WIDTHS = (16, 32, 64, 128, 256)
# What one program may have of a multiprocessor, in KiB.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}


class Tile(NamedTuple):
  block_q: int
  block_k: int
  num_warps: int
  num_stages: int


def tile(problem, direction, capability):
  """The tile of a pass ("forward", "backward_q", "backward_kv")."""
  table = _table()
  known = [x for x in sorted(map(int, table)) if x <= capability]
  bits = "32" if problem.dtype == "float32" else "16"
  widths = table[str(known[-1])]["tiles"][bits][direction]
  found = Tile(*widths[str(padded(problem.head_dim))])
  # Short sequences need no larger blocks, nor the warps for them.
  block_q = min(found.block_q, padded(problem.query_len))
  block_k = min(found.block_k, padded(problem.key_len))
  rows = block_k if direction == "backward_kv" else block_q
  warps = min(found.num_warps, max(rows // 16, 1))
  return Tile(block_q, block_k, warps, found.num_stages)


def padded(length):
  """Triton's tiles are powers of two, and its products begin at 16."""
  return max(16, 1 << (length - 1).bit_length())


@functools.cache
def _table():
  return json.loads(_TABLE.read_text())


def candidates(direction, width, bits):
  """Every tile worth a try."""
  rows, others = (
    ((64, 128), (32, 64, 128)) if width < 256 else ((64, 128), (16, 32, 64))
  )
  if bits == 32:
    rows, others = (16, 32, 64), (16, 32, 64)
  for row, other in itertools.product(rows, others):
    if bits == 32 and max(row, other) * width > 2**12:
      continue  # Unrolled to more than a compiler takes.
    for warps, stages in itertools.product((4, 8), (2, 3, 4)):
      q, k = (other, row) if direction == "backward_kv" else (row, other)
      yield Tile(q, k, warps, stages)


# Measuring.


def milliseconds(function, *arrays, repeats=5):
  """Median time of a call, of enough calls to hide that of starting them."""
  jax.block_until_ready(function(*arrays))

  def run(count):
    begin = time.perf_counter()
    jax.block_until_ready([function(*arrays) for _ in range(count)])
    return (time.perf_counter() - begin) / count * 1e3

  count = max(3, min(int(30 / max(run(2), 1e-3)), 200))
  return statistics.median(run(count) for _ in range(repeats))


class Job(NamedTuple):
  direction: str
  width: int
  dtype: str
  causal: bool
  length: int
  tile: Tile


def _measure(job, lock):
  """(job, milliseconds or the reason why not), in a process of its own."""
  from kernels import triton_attn
  from kernels.problem import Operands, make

  heads = 2048 // job.width
  batch = max(16384 // job.length, 1)
  shape = (batch, job.length, heads, job.width)
  x = jax.ShapeDtypeStruct(shape, job.dtype)
  problem = make(
    x, x, x, Operands(), kind="sigmoid", scale=job.width**-0.5,
    logit_bias=-8.0, normalizer=1.0, is_causal=job.causal, window=None,
  )  # fmt: skip
  function = getattr(triton_attn, job.direction)

  def call(*arrays):
    arrays = *arrays[:3], Operands(), *arrays[3:]
    return function(problem, "ieee", job.tile, *arrays)

  count = 3 if job.direction == "forward" else 4
  try:
    compiled = jax.jit(call).lower(*[x] * count).compile()
    with lock:
      arrays = [
        jax.random.normal(key, shape, job.dtype)
        for key in jax.random.split(jax.random.key(0), count)
      ]
      return job, milliseconds(compiled, *arrays)
  except Exception as error:  # A tile that the card cannot run.
    return job, f"{type(error).__name__}: {str(error)[:200]}"


def _init(lock):
  global _lock
  _lock = lock


def _work(job):
  return _measure(job, _lock)


def measure(jobs, processes):
  """(job, milliseconds or reason) of each; only compiled side by side."""
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  context = multiprocessing.get_context("spawn")
  with context.Pool(processes, _init, (context.Lock(),)) as pool:
    yield from pool.imap_unordered(_work, jobs)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
  parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
  parser.add_argument(
    "--dtypes", nargs="+", default=("bfloat16", "float32"),
    choices=("bfloat16", "float16", "float32"),
  )  # fmt: skip
  parser.add_argument("--length", type=int, default=4096)
  parser.add_argument("--causal", action="store_true")
  parser.add_argument("--processes", type=int, default=os.cpu_count() // 2)
  parser.add_argument("--output", type=pathlib.Path, default=_TABLE)
  parser.add_argument("--log", type=pathlib.Path, help="every time, as JSON")
  args = parser.parse_args()
  jobs = [
    Job(direction, width, dtype, args.causal, args.length, tile)
    for dtype in args.dtypes
    for width in args.widths
    for direction in args.passes
    for tile in candidates(direction, width, 32 if dtype == "float32" else 16)
  ]
  times = []
  for job, found in measure(jobs, args.processes):
    shown = f"{found:.3f} ms" if isinstance(found, float) else found
    print(job.direction, job.width, job.dtype, *job.tile, shown, flush=True)
    times.append((job._asdict(), found))
  if args.log:
    args.log.write_text(json.dumps(times))


if __name__ == "__main__":
  main()
