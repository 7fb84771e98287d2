"""Runs Triton's kernels on NumPy arrays, with Triton's own interpreter.

Import this module before Triton. Triton then interprets all kernels.
"""

import os
import threading

import jax
import ml_dtypes
import numpy as np

os.environ["TRITON_INTERPRET"] = "1"
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

# Outputs are filled with these numbers; tests notice those that remain.
_UNWRITTEN = {"f": np.nan, "V": np.nan, "i": 99}
_ONE_AT_A_TIME = threading.Lock()  # The interpreter's state is global.


class _Array:
  """The part of a torch tensor and its storage that the interpreter uses."""

  def __init__(self, array):
    self.array, self.device = array, "cpu"
    self.dtype = str(array.dtype)

  def data_ptr(self):
    return self.array.ctypes.data

  def _self(self, *_, **__):
    return self

  untyped_storage = cpu = new_empty = set_ = copy_ = _self
  storage_offset = size = stride = _self


@triton.jit
def tanh(x):
  """kernels.tanh without assembly, because the interpreter supports none."""
  return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


_FLOATS = {
  "fp8e4nv": ml_dtypes.float8_e4m3fn, "fp16": np.float16, "fp32": np.float32,
}  # fmt: skip


def _converted(builder, source, to, rounding_mode):
  """Converts from and to 8 bits. Triton's own function rounds wrongly.

  It adds the bit that is cut off to the mantissa, and drops the carry.
  """
  del builder, rounding_mode
  values = source.data.view(_FLOATS[source.dtype.scalar.name])
  values = values.astype(_FLOATS[to.scalar.name])
  return interpreter.TensorHandle(
    values.view(interpreter._get_np_dtype(to)), to.scalar
  )


interpreter.InterpreterBuilder.create_fp_to_fp = _converted


def start(
  kernel, arrays, outs, tile, count, constants, zeroed=(), aliases=None
):
  """Replaces launch.start."""
  del tile

  def run(*arrays):
    results = [
      np.full(x.shape, _UNWRITTEN[x.dtype.kind], x.dtype) for x in outs
    ]
    for index in zeroed:
      results[index][...] = 0
    for source, index in (aliases or {}).items():
      results[index][...] = arrays[source]
    inputs = [_Array(np.array(x)) for x in arrays]
    with _ONE_AT_A_TIME:
      kernel[(count,)](*inputs, *map(_Array, results), **constants)
    return results

  return jax.pure_callback(run, outs, *arrays)
