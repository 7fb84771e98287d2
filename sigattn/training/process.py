"""Settings of the training process: signals that stop it, and its memory."""

import contextlib
import ctypes
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator

import jax

from sigattn.training import metrics


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
  """Yields an event that the first Ctrl-C or SIGTERM sets.

  A second signal has its usual effect and ends the process at once. Outside the
  main thread, which alone receives signals, the event is never set.
  """
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  old = {}

  def handle(number, _):
    metrics.log("stopping after this step; repeat the signal to stop at once")
    stop.set()
    signal.signal(number, old[number])

  for number in (signal.SIGINT, signal.SIGTERM):
    old[number] = signal.signal(number, handle)
  try:
    yield stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def keep_freed_memory() -> None:
  """Lets a training step on a CPU reuse the memory that the last step freed.

  Call it before JAX starts its threads. It has no effect on other devices, nor
  where the C library is not glibc.

  By default glibc returns large buffers to the kernel, which has to clear every
  page again for the next step: 55 instead of 40 ms per step of three layers and
  64 images on two cores (2026-11-23). In every thread but the first, glibc
  does so with buffers above 64 MiB whatever its settings are: 100 instead of
  64 ms of one core for the gradient of four layers of the acoustic model
  (2026-11-25). Therefore steps have to run in the first thread.
  """
  # Without asynchronous dispatch a step runs, and allocates, in the thread that
  # calls it.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only in glibc
  if jax.default_backend() == "cpu" and mallopt is not None:
    mallopt(-4, 0)  # M_MMAP_MAX: allocate large buffers on the heap
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def use_most_of_the_gpu() -> None:
  """Lets JAX take 92 % of a GPU's memory, instead of 75 %.

  The rest is left to CUDA's own libraries. Call it before JAX looks for a GPU.
  It has no effect where XLA_PYTHON_CLIENT_MEM_FRACTION is set.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


_LOADED = time.perf_counter()


def age() -> float:
  """Seconds since this process was started.

  Where the system does not tell (it is not Linux), since this module was
  loaded.
  """
  try:
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2]
    start = int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start
  except (AttributeError, OSError):
    return time.perf_counter() - _LOADED
