"""Runs the products of a token by ptx_machine.py, with 132 programs.

  python -m tests.kernels.products_on_ptx_machine ROWS NORMS NEXT DTYPE D F N

NORMS, NEXT (1 or 0), and the sizes D, F and N are those of product_cases.draw.
It needs no GPU, but the compiler that `pip install 'jax[cuda13]'` brings. Sizes
of 256 take 15 seconds, and those of 85M (768 2048 2304) two minutes. The
program exits with 1 if a result is wrong.
"""

import os
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sigattn.kernels import device, products
from sigattn.kernels.mosaic import few_rows
from tests.kernels import product_cases, ptx_machine, ptx_tiles

_CALL = 3  # the number of calls before this one
_CARD = device.Device("NVIDIA H200", 90, 132)
_DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "kernels.md"


def _ptx(inputs, folder):
  """The code of the kernel for an H200."""
  card = re.search(r'CARD = """(.*?)"""', _DOCUMENT.read_text(), re.DOTALL)[1]
  jax.devices()  # finds the compiler
  gpus = topologies.get_topology_desc(
    "", "cuda", topology="1x1x1", target_config=card
  ).devices
  place = NamedSharding(Mesh(np.array(gpus), ("gpu",)), PartitionSpec())
  leaves, tree = jax.tree.flatten(inputs)
  is_array = [isinstance(x, jax.Array) for x in leaves]

  def run(arrays, counts):
    arrays = iter(arrays)
    both = zip(leaves, is_array, strict=True)
    all_leaves = [next(arrays) if traced else x for x, traced in both]
    return products.run(*jax.tree.unflatten(tree, all_leaves), counts, _CALL)

  def shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  arrays = [shape(x) for x in leaves if isinstance(x, jax.Array)]
  counts = shape(jnp.zeros(1, jnp.int32))
  os.environ["MOSAIC_GPU_DUMP_TO"] = folder
  os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
  traced = jax.jit(run).trace(arrays, counts)
  traced.lower(lowering_platforms=("cuda",)).compile()
  [path] = pathlib.Path(folder).glob("*.ptx")
  return path.read_text()


def _bits(x):
  """The bits of a 16-bit array."""
  return np.array(x).view(np.uint16)


def _empty(*shape):
  return np.full(shape, 0x7FFF, np.uint16)  # NaN


def _scales(branch):
  norms = branch.norm_out, branch.norm_in
  return [(f"scale{i}", np.array(x.scale_D)) for i, x in enumerate(norms) if x]


def _one_row(x, y, weights, matrices, before):
  """(arrays by name, copies), as mosaic/one_row.py has them."""
  arrays = [
    ("before", before), ("x", _bits(x[0])), ("y", _bits(y[0])),
    ("branch", _empty(x.shape[1])), *_scales(weights.attention),
    ("z", _empty(matrices[2].shape[1])), *_scales(weights.mlp),
    ("stream", _empty(x.shape[1])),
  ]  # fmt: skip
  if len(matrices) == 4:
    arrays.append(("heads", _empty(len(matrices[3]))))
  chunk = np.gcd.reduce([512, *(x.shape[1] for x in matrices)])
  block = min(chunk, 256)
  copies = [
    ptx_tiles.boxes(x.reshape(len(x), -1, block), (4, chunk // block, block))
    for x in matrices
  ]
  return arrays, copies


def _few_rows(x, y, weights, matrices, before):
  """(arrays by name, copies), as mosaic/few_rows.py has them."""
  rows, width = x.shape
  padded = -(-rows // 8) * 8
  stored = padded if rows > 8 else rows
  z = _empty(stored, matrices[2].shape[1])
  parts = max(
    few_rows._Cut.of(i, matrices[i].shape, _CARD.cores).parts for i in (0, 2)
  )
  sums = np.full((parts, rows, width), np.nan, np.float32)
  h, y_padded = _empty(stored, width), _empty(stored, y.shape[1])
  y_padded[:rows] = _bits(y)
  y_padded[rows:] = 0
  arrays = [
    ("before", before), ("sums", sums), *_scales(weights.attention),
    ("x", _bits(x)), ("middle", _empty(*x.shape)),
    ("h", h), ("z", z), *_scales(weights.mlp), ("stream", _empty(*x.shape)),
  ]  # fmt: skip
  if len(matrices) == 4:
    arrays.append(("heads", _empty(rows, len(matrices[3]))))
  copies = [ptx_tiles.tiles(a, padded, 128) for a in (y_padded, h, z)]
  return arrays, copies + [ptx_tiles.tiles(a, 8, 128) for a in matrices]


def main(rows, norms, has_next, dtype, *sizes):
  device.current = lambda: _CARD
  inputs = product_cases.draw(rows, "swiglu", norms, has_next, sizes, dtype)
  x, y, weights = inputs
  if reason := products.unsupported(x, weights):
    raise NotImplementedError(reason)
  matrices = [_bits(x) for x in products._matrices(weights)]
  meetings = 3 if rows == 1 else 5
  before = np.array([_CALL * meetings * _CARD.cores], np.int32)
  counts = before.copy()
  # A kernel has its parameters in the order in which its code names them first.
  kernel = _one_row if rows == 1 else _few_rows
  arrays, copies = kernel(x, y, weights, matrices, before)
  with tempfile.TemporaryDirectory() as folder:
    ptx = _ptx(inputs, folder)
  arguments = [*(array for _, array in arrays), None, counts]
  ptx_machine.Machine(ptx, arguments, _CARD.cores, copies).run()
  # The last call of several rows needs no meeting before W_next.
  meetings -= rows > 1 and not has_next
  assert counts[0] - before[0] == meetings * _CARD.cores
  arrays, wrong = dict(arrays), False
  expected = product_cases.exact(*inputs)
  for name, wanted in zip(("stream", "heads"), expected, strict=True):
    if wanted is not None:
      found = jnp.asarray(arrays[name].view(x.dtype)).reshape(wanted.shape)
      off = product_cases.error(found, wanted)
      print(f"{name}: {off:.1e}")
      wrong |= not off < 0.01
  sys.exit(wrong)


if __name__ == "__main__":
  _, rows, norms, has_next, dtype, *sizes = sys.argv
  main(int(rows), norms, bool(int(has_next)), dtype, *map(int, sizes))
