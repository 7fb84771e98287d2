"""How long a call takes on a GPU."""

import statistics
import time

import jax
import jax.numpy as jnp


def milliseconds(call, wait=jax.block_until_ready, repeats=5, settle=0.0):
  """Median time of a call. Calls are batched, which hides the launch overhead.

  Args:
    call: a function without arguments that starts work on the GPU.
    wait: a function that waits for the result of a call.
    repeats: the number of batches.
    settle: the seconds for which the call runs before it is timed. A card at
      the limit of its power keeps the clock of the call before for a while.
  """

  def run(count):
    begin = time.perf_counter()
    for _ in range(count):
      # A GPU works in order, so it suffices to wait for the last result. The
      # others are not kept: they would fill its memory.
      last = call()
    wait(last)
    return (time.perf_counter() - begin) / count * 1e3

  run(1)
  begin = time.perf_counter()
  count = max(3, min(int(20 / run(2)), 200))
  while time.perf_counter() - begin < settle:
    run(count)
  return statistics.median(run(count) for _ in range(repeats))


def copy_rate(gib=2):
  """Bytes per second that copying an array reads and writes.

  A card that has just been idle copies more slowly: 3.6 to 3.8 TB/s on H200s
  that reached 4.2 a few seconds later.
  """
  x = jnp.ones((gib * 2**28,), jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  return 2 * x.nbytes / milliseconds(lambda: copy(x), settle=2.0) * 1e3
