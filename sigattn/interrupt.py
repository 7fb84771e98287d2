"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the program is. If that is a function
that JAX calls back, for example when memory is collected, the exception is
dropped, or arrives as a RuntimeError. So a program remembers that it was
interrupted, and asks before it begins something long.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

_received = False


def install() -> None:
  """Handles Ctrl-C by KeyboardInterrupt, and remembers it.

  A handler that a program has set itself remains.
  """
  if signal.getsignal(signal.SIGINT) in (
    signal.SIG_DFL,  # see train.py
    signal.default_int_handler,
  ):
    signal.signal(signal.SIGINT, _handle)
    sys.unraisablehook = _without_interrupts


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


def _without_interrupts(dropped: Any) -> None:
  """Python's note about a dropped exception, unless that is an interrupt."""
  if not issubclass(dropped.exc_type, KeyboardInterrupt):
    sys.__unraisablehook__(dropped)


def _handle(number: int, frame: Any) -> None:
  del number, frame
  global _received
  _received = True
  raise KeyboardInterrupt
