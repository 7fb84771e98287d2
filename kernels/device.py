"""What is computed on: asked for at each call, inside jit too."""

import re
from typing import NamedTuple

import jax


class Device(NamedTuple):
  kind: str  # as its maker calls it: NVIDIA H200, cpu
  capability: int | None  # 90 for compute capability 9.0; None: not NVIDIA's


def current():
  """The device that JAX puts new arrays on.

  Arrays that were committed elsewhere do not count: tracers do not know where
  they are.
  """
  device = jax.config.jax_default_device or jax.local_devices()[0]
  if isinstance(device, str):
    device = jax.local_devices(backend=device)[0]
  # A GPU of AMD's has gfx942 here, a CPU nothing.
  version = str(getattr(device, "compute_capability", ""))
  digits = re.fullmatch(r"(\d+)\.(\d)", version)
  capability = int(digits[1] + digits[2]) if digits else None
  return Device(device.device_kind, capability)
