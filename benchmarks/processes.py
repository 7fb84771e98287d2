"""Runs one side of a comparison in its own process, which frees its memory."""

import os
import subprocess
import sys
from collections.abc import Sequence


def printed(
  arguments: Sequence[str], timeout: float
) -> tuple[list[str], str | None]:
  """Runs `python -m` with these arguments, and lets JAX take 94 % of the GPU.

  Returns (lines, reason). lines: what it printed, even if it was stopped after
  `timeout` seconds. reason: why it failed, or None.
  """
  environment = dict(os.environ)
  environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
  environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  try:
    done = subprocess.run(
      [sys.executable, "-m", *arguments],
      env=environment, capture_output=True, text=True, timeout=timeout,
      check=False,
    )  # fmt: skip
  except subprocess.TimeoutExpired as error:
    lines = (error.stdout or b"").decode().splitlines()
    return lines, f"took longer than {timeout} seconds"
  reason = _reason(done.stderr) if done.returncode else None
  return done.stdout.splitlines(), reason


def _reason(said):
  """The last line of stderr that names an error, or else the last line."""
  lines = [x.strip() for x in said.splitlines() if x.strip()]
  errors = [x for x in lines if "RESOURCE_EXHAUSTED" in x or "Error" in x]
  return (errors or lines or ["it failed without a message"])[-1][:300]
