"""Runs Triton's kernels in a step of a model, by ptx_machine.py.

  python -m tests.kernels.token_step_on_ptx_machine ROWS MODEL PRODUCTS

It compares logits and caches of three layers in bfloat16 with those of the
layers. MODEL is a name of _MODELS. PRODUCTS is "joined", as on a Hopper GPU, or
"single", for a kernel for each product; the joined ones are plain JAX here. It
needs Triton's compiler and no GPU, and takes 20 seconds for a row or two. The
program exits with 1 if a result is wrong.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tune_triton
from sigattn.kernels import device, products, triton
from sigattn.kernels.triton import launch
from tests.kernels import product_cases, ptx_machine
from tests.tasks import small_lm

_MODELS = {
  "default": {}, "llama": small_lm.LLAMA, "softmax": small_lm.SOFTMAX,
}  # fmt: skip


def _start(
  kernel, arrays, outs, tile, count, constants, zeroed=(), aliases=None
):
  """launch.start."""
  inputs = [np.array(x) for x in arrays]
  results = [np.full(x.shape, _unwritten(x.dtype), x.dtype) for x in outs]
  for index in zeroed:
    results[index][...] = 0
  for source, index in (aliases or {}).items():
    results[index] = inputs[source]
  given = inputs + results
  names = [x for x in kernel.arg_names if x not in constants]
  dtypes = {x: str(y.dtype) for x, y in zip(names, given, strict=True)}
  ptx = tune_triton.compiled(kernel, dtypes, constants, tile, 90).asm["ptx"]
  unused = [np.zeros(1, np.int32)] * 2  # Triton adds two parameters.
  ptx_machine.Machine(ptx, given + unused, count).run()
  return [jnp.asarray(x) for x in results]


def _unwritten(dtype):
  return np.nan if jnp.issubdtype(dtype, jnp.floating) else 99


def _plain(x_BD, y_BF, weights, counts, calls):
  """products.run."""
  del calls
  x_BD, heads_BF = (
    None if found is None else found.astype(x_BD.dtype)
    for found in product_cases.exact(x_BD, y_BF, weights)
  )
  return x_BD, heads_BF, counts


def main(rows, model, how):
  length_B = np.arange(rows, dtype=np.int32) * 3 % 100

  def make(implementation):
    values = small_lm.WIDE | _MODELS[model]
    values["attn.implementation"] = implementation
    return small_lm.make(small_lm.small(depth=3, **values))

  token_B = small_lm.tokens(rows)
  wanted = small_lm.compiled(
    small_lm.token_step, make("xla"), token_B, length_B
  )
  device.current = lambda: device.Device("NVIDIA H200", 90, 132)
  launch.start, products.run = _start, _plain
  triton._PACKAGES = {}  # It needs no jax-triton.
  products.unsupported = lambda *_: "" if how == "joined" else "not wanted"
  with jax.disable_jit():
    found = small_lm.token_step(make(None), token_B, length_B)
  leaves = (jax.tree.leaves(x) for x in (found, wanted))
  errors = [
    product_cases.error(x, y.astype(jnp.float32))
    for x, y in zip(*leaves, strict=True)
  ]
  print("errors:", *(f"{x:.1e}" for x in errors))
  sys.exit(not all(x < 0.03 for x in errors))


if __name__ == "__main__":
  _, rows, model, how = sys.argv
  main(int(rows), model, how)
