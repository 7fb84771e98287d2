"""Measures attention: python -m kernels.bench

Prints, for each length, the peak memory of one forward and backward pass of
sigmoid attention (B=1, N=4, H=64, float32) above what the process held before
it, beside the size of one matrix of weights, of which the plain form keeps
several. Writes the table to benchmarks/memory_cpu.json.
"""

import argparse
import concurrent.futures
import datetime
import json
import math
import multiprocessing
import pathlib
import platform
import re
import subprocess

import jax
import jax.numpy as jnp

import kernels

HEADS, WIDTH = 4, 64
LENGTHS = tuple(1024 * 2**i for i in range(6))
_FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def memory(length):
  """{seq_len, peak_mib, weights_mib} of a length, in a process of its own."""
  # Not multiprocessing's Pool, which starts a worker that cannot start again
  # and again.
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
    peak = pool.submit(_measure, length).result()
  return {
    "seq_len": length,
    "peak_mib": round(peak, 1),
    "weights_mib": HEADS * length**2 * 4 / 2**20,
  }


def _measure(length):
  @jax.jit
  def gradients(x):
    def loss(q, k, v):
      out = kernels.attention(
        q, k, v, kernels.Operands(), kind="sigmoid", scale=WIDTH**-0.5,
        logit_bias=-math.log(length),
      )  # fmt: skip
      return (out**2).sum()

    return jax.grad(loss, (0, 1, 2))(x, x, x)

  # What JAX itself takes to compile and run anything is there before.
  jax.block_until_ready(gradients(jnp.ones((1, 8, HEADS, WIDTH))))
  before = _peak_mib()
  x = jax.random.normal(jax.random.key(0), (1, length, HEADS, WIDTH))
  jax.block_until_ready(gradients(x))
  return _peak_mib() - before


def _peak_mib():
  # Not getrusage, whose peak a process inherits from the one that starts it.
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def _commit():
  done = subprocess.run(
    ["git", "describe", "--always", "--dirty"],
    cwd=_FOLDER.parent, capture_output=True, text=True, check=False,
  )  # fmt: skip
  return done.stdout.strip() or None


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
  lengths = parser.parse_args().lengths
  if jax.default_backend() != "cpu":
    parser.error("the peak of a process says nothing of a GPU's memory: run "
                 "it with JAX_PLATFORMS=cpu")  # fmt: skip
  print(f"{'length':>8} {'peak MiB':>10} {'one matrix MiB':>15}")
  rows = []
  for length in lengths:
    rows.append(row := memory(length))
    print(
      f"{length:8,} {row['peak_mib']:10,.1f} {row['weights_mib']:15,.1f}",
      flush=True,
    )
  result = {
    "device": f"CPU, {platform.machine()}, {multiprocessing.cpu_count()} cores",
    "date": datetime.date.today().isoformat(),
    "commit": _commit(),
    "jax": jax.__version__,
    "pass": "forward and backward, sigmoid, B=1, N=4, H=64, float32",
    "rows": rows,
  }
  path = _FOLDER / "memory_cpu.json"
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(result, indent=2) + "\n")
  print(f"written to {path.relative_to(_FOLDER.parent)}")


if __name__ == "__main__":
  main()
