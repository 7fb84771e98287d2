"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the program is. If that is a function
that JAX calls back, for example when memory is collected, the exception is
dropped, or arrives as a RuntimeError. So a program remembers that it was
interrupted, and asks before it begins something long.
"""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_received = False


def install() -> None:
  """Handles Ctrl-C by KeyboardInterrupt, and remembers it.

  A handler that a program has set itself remains. Only the main thread receives
  signals, so elsewhere this does nothing.
  """
  usual = signal.SIG_DFL, signal.default_int_handler  # SIG_DFL: see train.py
  is_main = threading.current_thread() is threading.main_thread()
  if is_main and signal.getsignal(signal.SIGINT) in usual:
    signal.signal(signal.SIGINT, _handle)
    tell = sys.unraisablehook
    sys.unraisablehook = functools.partial(_without_interrupts, tell)


def received() -> bool:
  """Whether Ctrl-C was pressed since `install`."""
  return _received


def check() -> None:
  """Raises KeyboardInterrupt if an earlier one was lost."""
  if _received:
    raise KeyboardInterrupt


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
  """Raises KeyboardInterrupt for the error that Ctrl-C became."""
  try:
    yield
  except Exception as error:
    if _received:
      raise KeyboardInterrupt from error
    raise


def _without_interrupts(tell: Callable[[Any], None], dropped: Any) -> None:
  """Tells of a dropped exception, unless it is an interrupt."""
  if not issubclass(dropped.exc_type, KeyboardInterrupt):
    tell(dropped)


def _handle(number: int, frame: Any) -> None:
  del number, frame
  global _received
  _received = True
  raise KeyboardInterrupt
