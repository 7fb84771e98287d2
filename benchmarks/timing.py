"""How long a call takes on a GPU."""

import statistics
import time

import jax


def milliseconds(call, wait=jax.block_until_ready, repeats=5):
  """Median time of a call, of as many at once as hide the start of one."""

  def run(count):
    begin = time.perf_counter()
    for _ in range(count):
      # A GPU works in order. Results that are kept would fill its memory.
      last = call()
    wait(last)
    return (time.perf_counter() - begin) / count * 1e3

  run(1)
  count = max(3, min(int(20 / run(2)), 200))
  return statistics.median(run(count) for _ in range(repeats))
