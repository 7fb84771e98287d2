"""How long a call takes on a GPU."""

import statistics
import time

import jax
import jax.numpy as jnp


def milliseconds(call, wait=jax.block_until_ready, repeats=5):
  """Median time of a call, with calls batched to hide launch overhead.

  Args:
    call: a function without arguments that starts work on the GPU.
    wait: waits for what a call returned.
    repeats: the number of batches.
  """

  def run(count):
    begin = time.perf_counter()
    for _ in range(count):
      # A GPU works in order, so the last result suffices. Others are dropped:
      # they would fill its memory.
      last = call()
    wait(last)
    return (time.perf_counter() - begin) / count * 1e3

  run(1)
  count = max(3, min(int(20 / run(2)), 200))
  return statistics.median(run(count) for _ in range(repeats))


def copy_rate(gib=2):
  """Bytes a second that are read and written where an array is copied."""
  x = jnp.ones((gib * 2**28,), jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  return 2 * x.nbytes / milliseconds(lambda: copy(x)) * 1e3
