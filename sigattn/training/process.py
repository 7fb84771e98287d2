"""The training process: it joins a run, and handles signals and memory."""

import contextlib
import ctypes
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sigattn import interrupt
from sigattn.training import metrics

# When one process has ended, the others end after this time. They cannot tell
# an ended process from a slow one by its steps. But its heartbeats come from a
# thread of their own, and stop when it ends.
_HEARTBEAT_SECONDS = 30
_SECONDS_OF_ONE_STOP = 1


def define_flags() -> None:
  """Defines the flags --coordinator, --processes and --process, see `join`."""
  flags.DEFINE_string(
    "coordinator",
    None,
    "Of several processes: host:port of the first, or auto.",
  )
  flags.DEFINE_integer("processes", None, "How many of them there are.", 1)
  flags.DEFINE_integer("process", None, "Which one of them this is, from 0.", 0)


def join(
  coordinator: str | None, count: int | None = None, index: int | None = None
) -> None:
  """Makes this process one of several that train one run together.

  Call it before JAX looks for devices. When a process of the run ends, JAX ends
  the others within a minute; the same commands resume the run.

  Args:
    coordinator: host:port of process 0, through which the processes find each
      other; "auto" if JAX knows the cluster (Slurm, Open MPI, Kubernetes, TPU
      and others, see jax.distributed.initialize); None for a single process.
    count: the number of processes; None with "auto".
    index: the number of this process, from 0; None with "auto".

  Raises:
    ValueError: for arguments that do not go together, or if JAX knows no
      cluster.
  """
  given = dict(coordinator=coordinator, processes=count, process=index)
  named = ", ".join(f"--{name}={value}" for name, value in given.items())
  explicit = coordinator not in (None, "auto")
  if explicit != (count is not None) or explicit != (index is not None):
    raise ValueError(
      f"{named}; give all three, or --coordinator=auto alone, or none"
    )
  if coordinator is None:
    return
  if explicit and not 0 <= index < count:
    raise ValueError(f"{named}; --process must be from 0 to {count - 1}")
  try:
    jax.distributed.initialize(
      coordinator if explicit else None,
      count,
      index,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      # After a failure the end is not awaited longer: a process may be gone.
      shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(f"{named}: {error}") from error
  metrics.console.quiet = jax.process_index() > 0  # only the first one prints
  metrics.log(
    f"process {jax.process_index()} of {jax.process_count()}, with "
    f"{jax.local_device_count()} of {jax.device_count()} devices"
  )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends this process at once if another process of its run has ended.

  JAX then raises an error in the middle of a step. It is written to stderr in
  one line. The process waits for nothing, because the other processes no longer
  answer. If JAX waits instead of raising an error, its own heartbeats end this
  process. This has no effect on a single process.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    [first, *_] = str(error).splitlines()
    print(
      f"process {jax.process_index()} of {jax.process_count()} cannot go on: "
      f"{first}. If another process has ended, its own output says why; the "
      "same commands resume the run",
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)


def what_to_lower(config: ConfigDict) -> str:
  """The advice for a training run that does not fit into memory."""
  lower = f"config.batch_size={config.batch_size}"
  if "length" in config.data:
    lower += f" or config.data.length={config.data.length}"
  return (
    f"lower {lower}, or raise config.optim.accumulate={config.optim.accumulate}"
  )


_NO_ROOM = "the run does not fit into memory"


@contextlib.contextmanager
def saying_what_to_lower(advice: str) -> Iterator[None]:
  """Raises MemoryError, with advice, if the memory of a device is exhausted."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    [first, *_] = str(error).splitlines() or [""]
    if "RESOURCE_EXHAUSTED" not in first and not isinstance(error, MemoryError):
      raise
    if first.startswith(_NO_ROOM):
      raise  # It was said within a part of the program, which knows more.
    raise MemoryError(f"{_NO_ROOM}: {advice} ({first})") from error


class _Stop:
  """Says whether to stop, from the step after a signal on.

  Several processes stop at the same step, whichever of them gets the signal.
  """

  def __init__(self) -> None:
    self._event = threading.Event()

  def set(self) -> None:
    self._event.set()

  def at(self, step: int) -> bool:
    """Whether to stop before the step. Call it once before each step."""
    if jax.process_count() == 1:
      return self._event.is_set()
    if self._event.is_set():
      self._event.clear()
      os.kill(os.getpid(), signal.SIGTERM)  # JAX informs all processes
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def stop_signals() -> Iterator[_Stop]:
  """Yields an object whose `at(step)` is True after Ctrl-C or SIGTERM.

  A second signal has its usual effect and ends the process at once, unless it
  comes within a second: a signal to all processes of a sweep reaches the run
  twice, because the sweep passes it on. Only the main thread receives signals,
  so in other threads `at` is never True.
  """
  stop = _Stop()
  if interrupt.received():  # It was lost while the run was prepared.
    stop.set()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  old, first = {}, None

  def handle(number, _):
    nonlocal first
    if first is None:
      first = time.monotonic()
      metrics.log("stopping after this step; repeat the signal to stop at once")
      stop.set()
    elif time.monotonic() - first > _SECONDS_OF_ONE_STOP:
      signal.signal(number, old[number])
      signal.raise_signal(number)

  # With several processes, JAX itself receives SIGTERM.
  is_alone = jax.process_count() == 1
  for number in (signal.SIGINT, *[signal.SIGTERM] * is_alone):
    old[number] = signal.signal(number, handle)
  try:
    yield stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def keep_freed_memory() -> None:
  """Lets a training step on a CPU reuse the memory that the last step freed.

  Call it before JAX starts its threads. It has no effect on other devices, or
  if the C library is not glibc.

  By default glibc returns large buffers to the kernel, which has to clear every
  page again for the next step. A step of three layers and 64 images then took
  55 instead of 40 ms on two cores (2026-11-23). In every thread except the
  first, glibc always does so with buffers above 64 MiB, whatever its settings
  are: the gradient of four layers of the acoustic model took 100 instead of
  64 ms on one core (2026-11-25). So steps have to run in the first thread.
  """
  # Without asynchronous dispatch, a step runs and allocates in the calling
  # thread.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only in glibc
  if jax.default_backend() == "cpu" and mallopt is not None:
    mallopt(-4, 0)  # M_MMAP_MAX: allocate large buffers on the heap
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def use_most_of_the_gpu() -> None:
  """Lets JAX take 92 % of a GPU's memory, instead of 75 %.

  The rest is left to CUDA's own libraries. Call it before JAX looks for a GPU.
  It has no effect if XLA_PYTHON_CLIENT_MEM_FRACTION is set.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


_LOADED = time.perf_counter()


def age() -> float:
  """Seconds since this process was started.

  If the system does not tell the start (it is not Linux), they count from the
  import of this module.
  """
  try:
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2]
    start = int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start
  except (AttributeError, OSError):
    return time.perf_counter() - _LOADED
