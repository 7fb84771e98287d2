"""Runs the few PTX instructions of the exact sigmoid in JAX, in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np

_TINY = float(np.finfo(np.float32).tiny)


def run(code: str, z: jax.Array) -> jax.Array:
  """The float32 array that the code assigns to $0; z is its register."""
  registers = {"z": jnp.asarray(z)}
  for line in filter(None, map(str.strip, code.split(";"))):
    name, target, *sources = re.split(r"[,\s]+", line)
    if name == ".reg":
      continue
    read = _float if name.endswith("f32") else _bits
    result = _OPERATIONS[name](*(read(registers, x) for x in sources))
    is_float = result.dtype == jnp.float32
    registers[target] = _flush(result) if is_float else result.view(jnp.float32)
  return registers["$0"]


def _float(registers, name):
  if name.startswith("0f"):
    return jnp.uint32(int(name[2:], 16)).view(jnp.float32)
  return _flush(registers[name])


def _bits(registers, name):
  if name in registers:
    return registers[name].view(jnp.int32)
  return jnp.int32(int(name))


def _flush(x):
  """Replaces denormal numbers by 0, as `.ftz` says."""
  return jnp.where(jnp.abs(x) < _TINY, jnp.float32(0), x)


_OPERATIONS = {
  "add.rn.ftz.f32": jnp.add,
  "fma.rn.ftz.f32": lambda a, b, c: a * b + c,
  "min.NaN.ftz.f32": jnp.minimum,
  "mov.b32": lambda x: x,
  "mul.rn.ftz.f32": jnp.multiply,
  "rcp.approx.ftz.f32": jnp.reciprocal,
  "sub.s32": jnp.subtract,
}
