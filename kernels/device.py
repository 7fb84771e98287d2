"""The current device, queried at each call, inside jit too."""

import re
from typing import NamedTuple

import jax


class Device(NamedTuple):
  """The properties of a device that the choice of a kernel depends on."""

  kind: str  # the maker's name, such as NVIDIA H200, or cpu
  capability: int | None  # 90 for compute capability 9.0; None: not NVIDIA's
  cores: int | None = None  # multiprocessors; None: not known


def current() -> Device:
  """The device on which JAX puts new arrays.

  This ignores arrays that were committed to another device, because tracers do
  not know where they are.
  """
  device = jax.config.jax_default_device or jax.local_devices()[0]
  if isinstance(device, str):
    device = jax.local_devices(backend=device)[0]
  # An AMD GPU has gfx942 here, and a CPU has nothing.
  version = str(getattr(device, "compute_capability", ""))
  digits = re.fullmatch(r"(\d+)\.(\d)", version)
  capability = int(digits[1] + digits[2]) if digits else None
  cores = getattr(device, "core_count", None)
  return Device(device.device_kind, capability, cores)
