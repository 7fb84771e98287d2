"""Measures attention of one query to a cache of keys, as in decoding.

  python -m benchmarks.decode_attention            on a GPU, in bfloat16
  python -m benchmarks.decode_attention --sweep    other tiles of our kernel

Every key and value must be read once, so the time is compared with the time
that a copy of as many bytes takes. The rate of a copy is measured in the same
run. Many calls run in one program, over several caches in turn, which do not
fit into the L2 cache of the GPU together. The first command prints a table and
writes benchmarks/results/decode_attention_<device>.json. The second command
prints the times of tiles that differ from ours in one or two numbers, and
writes nothing.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention
from benchmarks.timing import copy_rate, milliseconds
from sigattn.kernels import device
from sigattn.kernels.problem import Operands, make_problem
from sigattn.kernels.triton import decode

_L2_MANY = 256 * 2**20  # the least number of bytes of all caches of a cell
_CALLS = 128  # the least number of calls of one program


class Cell(NamedTuple):
  """One query for each of `batch` rows, against `length` keys."""

  batch: int
  length: int
  heads: int
  kv_heads: int
  width: int

  @property
  def bytes(self):
    """The size of the keys and values."""
    return 4 * self.batch * self.length * self.kv_heads * self.width

  @property
  def shapes(self):
    """The shapes of query and key."""
    return (
      (self.batch, 1, self.heads, self.width),
      (self.batch, self.length, self.kv_heads, self.width),
    )

  @property
  def caches(self):
    return max(2, min(-(-_L2_MANY // self.bytes), 16))

  @property
  def rounds(self):
    return -(-_CALLS // self.caches)


CELLS = tuple(
  Cell(batch, length, heads, kv_heads, width)
  for heads, kv_heads in ((16, 16), (32, 8))
  for width in (64, 128)
  for batch, length in (
    (1, 4000), (8, 4000), (1, 32000), (64, 2000), (32, 512),
  )
)  # fmt: skip


class Baseline(NamedTuple):
  """One implementation."""

  name: str
  package: str  # that it needs
  milliseconds: Callable[[Cell], float]  # of one call


# JAX.


def _inputs(cell):
  """(query, caches): a pair of keys and values each."""
  of_query, of_key = cell.shapes
  query = jax.random.normal(jax.random.key(0), of_query, "bfloat16")
  normal = jax.jit(lambda key: jax.random.normal(key, of_key, "bfloat16"))
  keys = jax.random.split(jax.random.key(1), 2 * cell.caches)
  arrays = [normal(key) for key in keys]
  return query, list(zip(arrays[::2], arrays[1::2], strict=True))


def _program(attend, cell):
  """A compiled program of many calls of attend(query, key, value).

  The output of a call is the query of the next one, so that no two calls
  overlap.
  """

  def one_round(_, carry):
    query, caches = carry
    for key, value in caches:
      query = attend(query, key, value)
    return query, caches

  @jax.jit
  def run(query, caches):
    return jax.lax.fori_loop(0, cell.rounds, one_round, (query, caches))[0]

  of_query, of_key = (jax.ShapeDtypeStruct(x, "bfloat16") for x in cell.shapes)
  return run.lower(of_query, [(of_key, of_key)] * cell.caches).compile()


def _timed(program, cell):
  query, caches = _inputs(cell)
  time = milliseconds(lambda: program(query, caches))
  return time / (cell.rounds * cell.caches)


def _jax_time(attend, cell):
  return _timed(_program(attend, cell), cell)


def _problem(cell, normalize=False):
  query, key = (jax.ShapeDtypeStruct(x, "bfloat16") for x in cell.shapes)
  return make_problem(
    query, key, key, Operands(), kind="sigmoid", scale=cell.width**-0.5,
    logit_bias=-8.0, normalizer=1.0, normalize=normalize, is_causal=False,
    window=None,
  )  # fmt: skip


def _with_tile(tile, problem, query, key, value):
  arrays = query, key, value, Operands()
  return decode.forward(problem, "ieee", tile, *arrays)[0]


def _ours(cell, normalize=False):
  problem = _problem(cell, normalize)
  return _jax_time(
    functools.partial(_with_tile, decode.tile(problem), problem), cell
  )


def _softmax(cell):
  problem = dataclasses.replace(_problem(cell, True), kind="softmax")
  return _jax_time(
    functools.partial(_with_tile, decode.tile(problem), problem), cell
  )


def _paged(cell):
  """With pages in random order, and as short as possible.

  Short pages need the most numbers to be read.
  """
  page, problem = 16, _problem(cell)
  tile = decode.tile(problem, paged=True)
  count = cell.batch * cell.length // page
  table = np.random.default_rng(0).permutation(count).astype("int32")
  table = table.reshape(cell.batch, -1)

  def attend(query, *arrays):
    arrays = [x.reshape(count, page, *x.shape[2:]) for x in arrays]
    return decode.forward(
      problem, "ieee", tile, query, *arrays, Operands(), jnp.asarray(table)
    )[0]

  return _jax_time(attend, cell)


def _jax_nn(cell):
  return _jax_time(
    functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
    cell,
  )


# torch: the calls are captured as one graph.


def _torch_time(attend, cell):
  import torch

  of_query, of_key = cell.shapes

  def normal(shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

  query = normal(of_query)
  caches = [(normal(of_key), normal(of_key)) for _ in range(cell.caches)]

  def one_round():
    out = query
    for key, value in caches:
      out = attend(out, key, value)
    return out

  with torch.no_grad():
    for _ in range(3):
      one_round()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      for _ in range(cell.rounds):
        one_round()
  time = milliseconds(graph.replay, lambda _: torch.cuda.synchronize())
  return time / (cell.rounds * cell.caches)


def _torch_softmax(backend, cell):
  from torch.nn import attention as torch_attention
  from torch.nn.functional import scaled_dot_product_attention

  def attend(*inputs):
    with torch_attention.sdpa_kernel(
      getattr(torch_attention.SDPBackend, backend)
    ):
      out = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in inputs),
        enable_gqa=cell.heads != cell.kv_heads,
      )
    return out.transpose(1, 2)

  return _torch_time(attend, cell)


def _flash_2(cell):
  import flash_attn

  return _torch_time(flash_attn.flash_attn_with_kvcache, cell)


BASELINES = (
  Baseline("sigattn triton", "jax_triton", _ours),
  Baseline(
    "sigattn triton normalized", "jax_triton",
    functools.partial(_ours, normalize=True),
  ),
  Baseline("sigattn triton, pages", "jax_triton", _paged),
  Baseline("sigattn triton softmax", "jax_triton", _softmax),
  Baseline("cuDNN (jax.nn)", "jax", _jax_nn),
  Baseline(
    "cuDNN (torch)", "torch",
    functools.partial(_torch_softmax, "CUDNN_ATTENTION"),
  ),
  Baseline(
    "FlashAttention-2 (torch)", "torch",
    functools.partial(_torch_softmax, "FLASH_ATTENTION"),
  ),
  Baseline("FlashAttention-2", "flash_attn", _flash_2),
)  # fmt: skip


def _measure(cells, save):
  """The whole result. A partial result is saved after each cell."""
  rate = copy_rate()
  print(f"{device.current().kind}: a copy at {rate / 1e12:.2f} TB/s")
  result = {
    "copy_gb_per_second": round(rate / 1e9),
    "method": "one query a row, bfloat16; medians of programs of many calls in"
    " a row over several caches",
    "rows": [],
  }
  for cell in cells:
    for baseline in BASELINES:
      if importlib.util.find_spec(baseline.package) is None:
        continue
      try:
        time = baseline.milliseconds(cell)
      except Exception as error:  # A baseline may refuse a size.
        reason = str(error).strip().splitlines() or [""]
        print(f"{baseline.name}: {type(error).__name__} {reason[0][:120]}")
        continue
      row = {"implementation": baseline.name} | cell._asdict()
      row |= {
        "microseconds": round(time * 1e3, 2),
        "bytes": cell.bytes,
        "share_of_copy_rate": round(cell.bytes / time * 1e3 / rate, 3),
      }
      result["rows"].append(row)
      print(
        "{:26} B{:<3} S{:<6} N{:<3} K{:<3} H{:<4} {:9.2f} us {:12,} bytes"
        " {:.3f}".format(*row.values()),
        flush=True,
      )
    save(result)
  return result


# Other tiles.


def candidates(tile: decode.Tile, cell: Cell) -> list[decode.Tile]:
  """Tiles that differ from ours in one or two numbers."""
  cells = cell.batch * cell.kv_heads
  splits = {
    min(-(-132 * times // cells), -(-cell.length // tile.block_kv))
    for times in (1, 2, 4, 6, 8, 12)
  }
  found = {tile}
  for count in {1, *splits}:
    found.add(tile._replace(splits=count))
    found.add(tile._replace(splits=count, num_stages=4))
    found.add(tile._replace(splits=count, block_kv=32, num_warps=2))
    found.add(tile._replace(splits=count, block_kv=128, num_warps=4))
    found.add(tile._replace(splits=count, block_kv=128, num_warps=8))
  for block, warps, stages in (
    (64, 4, 2), (64, 4, 5), (64, 2, 3), (64, 2, 4), (64, 8, 3), (32, 4, 4),
    (32, 2, 5), (32, 1, 4), (128, 4, 2), (128, 8, 2),
  ):  # fmt: skip
    found.add(tile._replace(block_kv=block, num_warps=warps, num_stages=stages))
  return sorted(found)


def _sweep(cells):
  rate = copy_rate()
  print(f"{device.current().kind}: a copy at {rate / 1e12:.2f} TB/s")
  for cell in cells:
    problem = _problem(cell)
    ours = decode.tile(problem)
    tiles = candidates(ours, cell)

    def compiled(tile, problem=problem, cell=cell):
      try:
        return _program(functools.partial(_with_tile, tile, problem), cell)
      except Exception as error:  # It may need too much shared memory.
        return str(error).strip().splitlines()[0][:100]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      programs = list(pool.map(compiled, tiles))
    times = {}
    for tile, program in zip(tiles, programs, strict=True):
      if isinstance(program, str):
        print(*cell, *tile, program)
        continue
      times[tile] = _timed(program, cell)
    print(*cell, "bytes allow", f"{cell.bytes / rate * 1e6:.2f} us")
    for tile in sorted(times, key=times.get):
      share = cell.bytes / times[tile] * 1e3 / rate
      mark = " <- ours" if tile == ours else ""
      print(
        f"  {times[tile] * 1e3:8.2f} us {share:.3f} {tuple(tile)}{mark}",
        flush=True,
      )


def main():
  # Leave memory for torch. JAX reads this when it first looks for a GPU.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--sweep", action="store_true", help="times other tiles of our kernel"
  )
  parser.add_argument(
    "--cells", type=int, nargs="+", default=range(len(CELLS)), metavar="I",
    help=f"indices in the list of {len(CELLS)} sizes; default: all",
  )  # fmt: skip
  arguments = parser.parse_args()
  if device.current().capability is None:
    parser.error(f"no NVIDIA GPU here, but {device.current().kind}")
  cells = [CELLS[i] for i in arguments.cells]
  if arguments.sweep:
    _sweep(cells)
    return
  kind = device.current().kind
  name = f"decode_attention_{kind.replace(' ', '_').lower()}"
  save = functools.partial(attention.write, name, kind)
  print(f"written to {save(_measure(cells, save))}")


if __name__ == "__main__":
  main()
