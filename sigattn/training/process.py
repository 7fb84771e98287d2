"""The process that trains: how it is asked to stop, and its memory."""

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator

import jax

from sigattn.training import metrics


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
  """An event that the first Ctrl-C or SIGTERM sets; the second one kills."""
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  old = {}

  def handle(number, _):
    metrics.log("stopping after this step; once more to stop at once")
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
  """Lets a CPU's step reuse the memory that the last one freed.

  By default glibc gives large buffers back to the kernel, which then clears
  page after page for the next step: 55 instead of 40 ms, with three layers and
  64 images a step on two cores (2026-11-23). glibc does so, whatever it was
  told, with buffers above 64 MiB of any thread but the first: 100 instead of 64
  ms of a core, for the gradient of four layers of the acoustic model
  (2026-11-25). To be called before JAX starts its threads.
  """
  # Steps then run, and allocate, in the thread that asks for them.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
  if jax.default_backend() == "cpu" and mallopt is not None:
    mallopt(-4, 0)  # M_MMAP_MAX: large buffers from the heap too
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
