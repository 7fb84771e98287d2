"""Tunes the tiles of the Triton kernels, or checks their table.

  python -m benchmarks.tune_triton          times tiles on this machine's card
  python -m benchmarks.tune_triton --check  compiles all tiles of the table

The first command tries many tiles for each pass, head width and number of bits.
It writes the fastest tile that does not spill to kernels/triton/tiles.json.
With --lengths up to 256 it writes tiles for short sequences. If a card has
none, short sequences take the other tiles. Nothing is tuned while a program
runs: a card that is not in the table takes the tiles of the next older card.
The second command needs no GPU.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax

from benchmarks.timing import milliseconds
from sigattn.kernels import device
from sigattn.kernels.differentiation import Sums
from sigattn.kernels.problem import (
  ACTIVATIONS,
  FLOAT8,
  SIGNED,
  Operands,
  make_problem,
)
from sigattn.kernels.triton import decode, tiles
from sigattn.kernels.triton.launch import FLOATS, INTEGERS, constants
from sigattn.kernels.triton.tiles import (
  DTYPES,
  PASSES,
  SHORT,
  TABLE,
  WIDTHS,
  Tile,
)

# {compute capability: KiB of shared memory that one program can use}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}


# Compiling.


class Resources(NamedTuple):
  """The resources of a multiprocessor that a kernel needs."""

  registers: int  # of a thread, at most 255
  spilled: int  # bytes of a thread
  shared: int  # bytes of a program

  def fit(self, capability, may_spill=False):
    shared = SHARED_KIB.get(capability, min(SHARED_KIB.values())) * 1024
    return (may_spill or not self.spilled) and self.shared <= shared


def resources(problem, direction, tile, capability):
  """The Resources of a kernel, compiled without a GPU."""
  from sigattn.kernels.triton import kernels

  constexprs = constants(direction, problem, "ieee", tile)
  constexprs |= _sums(problem, direction)
  kernel = getattr(kernels, direction)
  return _resources(kernel, problem, constexprs, tile, capability)


def decode_resources(problem, tile, capability, page, is_new=False):
  """The Resources of the decode kernel.

  page: the number of keys of a page, or None. is_new: whether the kernel also
  normalises, rotates and writes the new key.
  """
  from sigattn.kernels.triton import decode_kernel

  new = None
  if is_new:
    angles = jax.ShapeDtypeStruct((problem.batch, problem.head_dim // 2), "f4")
    new = decode.New(None, epsilon=1e-5, cos=angles)
  constexprs = decode.constants(problem, "ieee", tile, page, new)
  return _resources(decode_kernel.decode, problem, constexprs, tile, capability)


def compiled(kernel, dtypes, constexprs, tile, capability):
  """A kernel of Triton, compiled without a GPU. dtypes: of its pointers."""
  import triton
  from triton.backends.compiler import GPUTarget
  from triton.compiler import ASTSource

  short = {
    "bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32",
    FLOAT8: "*fp8e4nv", "int32": "*i32",
  }  # fmt: skip
  names, aligned = kernel.arg_names, [["tt.divisibility", 16]]
  pointers = [(i, x) for i, x in enumerate(names) if x not in constexprs]
  types = dict.fromkeys(names, "constexpr")
  types |= {name: short[dtypes[name]] for _, name in pointers}
  return triton.compile(
    ASTSource(kernel, types, constexprs, {(i,): aligned for i, _ in pointers}),
    target=GPUTarget("cuda", capability, 32),
    options=dict(num_warps=tile.num_warps, num_stages=tile.num_stages),
  )


def _resources(kernel, problem, constexprs, tile, capability):
  import triton

  dtypes = dict.fromkeys(kernel.arg_names, problem.dtype)
  if problem.key_dtype == FLOAT8:
    dtypes |= dict.fromkeys(("k", "v", "k_out", "v_out"), FLOAT8)
  dtypes |= dict.fromkeys(FLOATS, "float32")
  dtypes |= dict.fromkeys(INTEGERS, "int32")
  program = compiled(kernel, dtypes, constexprs, tile, capability)
  with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(program.asm["cubin"])
    file.flush()
    usage = subprocess.run(
      [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
      capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
  registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
  return Resources(int(registers), int(stack), program.metadata.shared)


def _sums(problem, direction):
  """Which sums of dz a kernel computes if all operands are differentiated."""
  shapes = problem.shapes
  if direction == "backward_q":
    return {
      "SUMS": shapes.query_logit_bias is not None,
      "SLOPE_SUMS": shapes.alibi_slopes is not None,
    }
  if direction == "backward_kv":
    of_keys = shapes.key_logit_bias, shapes.logit_bias
    return {"SUMS": any(x is not None for x in of_keys)}
  return {}


def example(width, dtype, length=4096, queries=None, **options):
  """Sigmoid attention of 16,384 tokens and 2,048 / width heads."""
  shape = (max(16384 // length, 1), length, max(2048 // width, 1), width)
  x = jax.ShapeDtypeStruct(shape, dtype)
  query = jax.ShapeDtypeStruct((shape[0], queries or length, *shape[2:]), dtype)
  options = dict(is_causal=False, window=None, logit_bias=-8.0) | options
  operands = options.pop("operands", Operands())
  return make_problem(
    query, x, x, operands, kind="sigmoid", scale=width**-0.5, normalizer=1.0,
    **options,
  )  # fmt: skip


def example_of_everything(width, dtype):
  """An example with every operand and mask that the kernels support."""
  shape = example(width, dtype)
  batch, length = shape.batch, shape.query_len
  heads = jax.ShapeDtypeStruct((batch, shape.num_heads), "float32")
  lengths = jax.ShapeDtypeStruct((batch,), "int32")
  ids = jax.ShapeDtypeStruct((batch, length), "int32")
  vector = jax.ShapeDtypeStruct((batch, shape.num_heads, length), "float32")
  operands = Operands(
    logit_bias=heads, alibi_slopes=heads, query_seq_lengths=lengths,
    key_value_seq_lengths=lengths, query_segment_ids=ids,
    key_value_segment_ids=ids, query_logit_bias=vector, key_logit_bias=vector,
    query_offset=lengths,
  )  # fmt: skip
  return example(
    width, dtype, operands=operands, logit_bias=None, window=(256, 256)
  )


EXAMPLES = {
  "full": example,
  "short": functools.partial(example, length=196),
  "causal": functools.partial(example, is_causal=True),
  "token": functools.partial(example, queries=1),
  "16-tokens": functools.partial(
    example, queries=16, is_causal=True, query_offset=4080, normalize=True
  ),
  "everything": example_of_everything,
}


def check(cards, dtypes, widths, passes, examples, kinds):
  """Prints the Resources of each tile. Returns False if one does not fit."""
  good = True
  for capability, dtype, width, direction, name, kind in itertools.product(
    cards, dtypes, widths, passes, examples, kinds
  ):
    problem = EXAMPLES[name](width, dtype)
    normalize = problem.normalize and kind not in SIGNED
    problem = dataclasses.replace(problem, kind=kind, normalize=normalize)
    # The gradient of a few queries need not be fast.
    may_spill = direction != "forward" and decode.fits(problem)
    for what, chosen, needs in _needs(problem, direction, capability):
      good &= (fits := needs.fit(capability, may_spill))
      print(
        f"sm_{capability} {dtype:8} {width:3} {what:11} {name:10} "
        f"{'' if what == 'softmax' else kind:8} "
        f"{' x '.join(map(str, chosen)):18} {needs.registers:3} registers, "
        f"{needs.spilled} B spilled, {needs.shared / 1024:.0f} KiB shared"
        f"{'' if fits else '  DOES NOT FIT'}",
        flush=True,
      )
  return good


def _needs(problem, direction, capability):
  """Yields (name, tile, Resources) of each kernel that a pass may use."""
  if direction == "forward" and decode.fits(problem):
    softmax = dataclasses.replace(problem, kind="softmax", normalize=True)
    cached = dataclasses.replace(problem, key_dtype=FLOAT8)
    forms = [
      ("decode", None, problem), ("paged", 16, problem),
      ("softmax", None, softmax), ("new token", None, problem),
      ("8 bits paged", 16, cached), ("8 bits new", None, cached),
    ]  # fmt: skip
    for name, page, x in forms[: 4 if capability < 89 else None]:
      is_new = "new" in name
      if is_new and x.query_len > 1:
        continue
      chosen = decode.tile(x, paged=page is not None)
      needs = decode_resources(x, chosen, capability, page, is_new)
      yield name, chosen, needs
    return
  chosen = tiles.tile(problem, direction, capability)
  yield direction, chosen, resources(problem, direction, chosen, capability)


# Timing.


class Job(NamedTuple):
  direction: str
  width: int
  dtype: str
  causal: bool
  length: int
  tile: Tile


def candidates(direction, width, dtype):
  """Every tile that is worth trying."""
  rows, others = (64, 128), (32, 64, 128)
  if width >= 256:
    others = (16, 32, 64)
  if dtype == "float32":
    rows = others = (16, 32, 64)
  for row, other in itertools.product(rows, others):
    if dtype == "float32" and max(row, other) * width > 2**12:
      continue  # Its products are unrolled, which takes minutes to compile.
    for warps, stages in itertools.product((4, 8), (2, 3, 4)):
      q, k = (other, row) if direction == "backward_kv" else (row, other)
      yield Tile(q, k, warps, stages)


def measure(jobs, processes):
  """Yields (job, milliseconds or an error message) for each job.

  Jobs are compiled in parallel and timed one at a time.
  """
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  context = multiprocessing.get_context("spawn")
  with context.Pool(processes, _begin, (context.Lock(),)) as pool:
    yield from pool.imap_unordered(_measure, jobs)


def _begin(lock):
  global _lock
  _lock = lock


def _measure(job):
  from sigattn.kernels import triton as triton_attention

  problem = example(job.width, job.dtype, job.length, is_causal=job.causal)
  function = getattr(triton_attention, job.direction)
  shape = (problem.batch, job.length, problem.num_heads, job.width)

  sums = () if job.direction == "forward" else (Sums(),)

  def call(query, key, value, *d_out):
    arrays = query, key, value, Operands(), *d_out
    return function(problem, "ieee", job.tile, *sums, *arrays)

  count = 3 if job.direction == "forward" else 4
  shapes = [jax.ShapeDtypeStruct(shape, job.dtype)] * count
  try:
    compiled = jax.jit(call).lower(*shapes).compile()
    with _lock:
      keys = jax.random.split(jax.random.key(0), count)
      arrays = [jax.random.normal(key, shape, job.dtype) for key in keys]
      return job, milliseconds(functools.partial(compiled, *arrays))
  except Exception as error:  # The tile is too large for card or compiler.
    return job, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


def fastest(times):
  """{(bits, pass, width): tile}, the fastest tiles that fit the card.

  Args:
    times: {job: milliseconds}. Tiles of the same pass, width and number of bits
      are compared by the sum of the times of their jobs.
  """
  groups = {}
  for job, time in times.items():
    key = tiles.bits_of(job.dtype), job.direction, job.width
    case = job.dtype, job.length, job.causal
    groups.setdefault(key, {}).setdefault(job.tile, {})[case] = time
  capability = device.current().capability
  chosen = {}
  for (bits, direction, width), by_tile in groups.items():
    cases = max(by_tile.values(), key=len).keys()
    examples = [
      example(width, dtype, length, is_causal=causal)
      for dtype, length, causal in cases
    ]
    dtypes = dict.fromkeys(dtype for dtype, *_ in cases)
    examples += [example_of_everything(width, dtype) for dtype in dtypes]
    whole = {
      t: sum(x.values()) for t, x in by_tile.items() if x.keys() == cases
    }
    for candidate in sorted(whole, key=whole.get):
      needs = (resources(x, direction, candidate, capability) for x in examples)
      if all(x.fit(capability) for x in needs):
        chosen[bits, direction, width] = candidate
        break
  return chosen


def write(chosen, short=False, path=TABLE):
  """Writes the tiles into the table's entry for this machine's card."""
  this_card = device.current()
  table = json.loads(TABLE.read_text())
  near = max(x for x in map(int, table) if x <= this_card.capability)
  card = json.loads(json.dumps(table[str(near)]))
  for (bits, direction, width), best in chosen.items():
    table_of = card.setdefault("short", {}) if short else card["tiles"]
    passes = table_of.setdefault(bits, {}).setdefault(direction, {})
    passes[str(width)] = best
  table[str(this_card.capability)] = card | {
    "device": this_card.kind,
    "date": datetime.date.today().isoformat(),
  }
  text = json.dumps(table, indent=2)
  text = re.sub(
    r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", text
  )
  path.write_text(text + "\n")


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", action="store_true")
  parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
  parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
  parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=(4096,),
    help=f"tokens; up to {SHORT} for short tiles, or all beyond",
  )  # fmt: skip
  parser.add_argument(
    "--cards", type=int, nargs="+", default=tuple(SHARED_KIB),
    help="with --check: compute capabilities, 90 for 9.0",
  )  # fmt: skip
  parser.add_argument(
    "--examples", nargs="+", default=EXAMPLES, choices=EXAMPLES,
    help="with --check: the problems that are compiled",
  )  # fmt: skip
  parser.add_argument(
    "--kinds", nargs="+", default=("sigmoid",), choices=ACTIVATIONS,
    help="with --check: the kinds that are compiled",
  )  # fmt: skip
  parser.add_argument("--processes", type=int, default=os.cpu_count() // 2)
  args = parser.parse_args()
  if args.check:
    given = args.cards, args.dtypes, args.widths, args.passes, args.examples
    sys.exit(not check(*given, args.kinds))
  short = max(args.lengths) <= SHORT
  if not short and min(args.lengths) <= SHORT:
    parser.error(f"--lengths: all of at most {SHORT}, or all of more")
  if device.current().capability is None:
    parser.error(f"no NVIDIA GPU here, but {device.current().kind}")
  jobs = [
    Job(direction, width, dtype, causal, length, tile)
    for dtype in args.dtypes
    for width in args.widths
    for direction in args.passes
    for length in args.lengths
    for causal in (False, True)
    for tile in candidates(direction, width, dtype)
  ]
  times = {}
  for job, time in measure(jobs, args.processes):
    ok = isinstance(time, float)
    print(*job[:-1], *job.tile, f"{time:.4f} ms" if ok else time, flush=True)
    if ok:
      times[job] = time
  write(fastest(times), short)
  print(f"written to {TABLE}")


if __name__ == "__main__":
  main()
