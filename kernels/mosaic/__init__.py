"""Pointwise attention on Hopper GPUs (H100, H200), in Pallas Mosaic GPU.

The host side: what can be done, with which constants, and the derivative. The
kernels are in kernels. Forward saves query, key and value alone.

The backward pass computes dk and dv with the keys at rest. For short sequences
dq comes from a kernel of its own with the queries at rest: seven products of
matrices in all, the same bits at every run. For long ones (_ADDED says from
where) the kernel of the keys adds each block's share of dq to float32 sums in
memory: five products, and a sum whose order, and so whose last bits, differ
from run to run, unless XLA is asked for determinism
(XLA_FLAGS=--xla_gpu_deterministic_ops=true). Both forms measured on an H100,
n = 8,192 without a mask, TFLOP/s by five products: 512 and 607 at head width
128, 398 and 551 at 64 (benchmarks/NOTES.md).
"""

import jax

from sigattn.kernels import device
from sigattn.kernels.mosaic import tiles

# Pallas changes with each release of jax: these kernels passed their tests with
# these versions. What else they need of jax's inside is listed in registers.py.
TESTED_JAX = ("0.11.2",)


def unsupported(problem):
  """Why not; empty where it can."""
  if problem.dtype not in ("bfloat16", "float16"):
    return f"{problem.dtype} is not implemented"
  for name in ("bias", "mask"):
    if getattr(problem.shapes, name) is not None:
      return f"a dense {name} is not implemented"
  if problem.head_dim not in tiles.TILES:
    return f"head_dim={problem.head_dim}; one of {sorted(tiles.TILES)}"
  if 0 in (problem.batch, problem.query_len, problem.key_len):
    return "nothing to compute"
  card = device.current()
  if card.capability != 90:
    return f"needs a Hopper GPU (9.0), device is {card.kind}"
  if jax.__version__ not in TESTED_JAX:
    tested = ", ".join(TESTED_JAX)
    return f"tested with jax {tested}, installed is {jax.__version__}"
  return ""


def attention(query, key, value, operands, problem):
  """As xla.attention, in 16 bits with float32 sums. Reverse mode only.

  Sigmoid weights come from the hardware's tanh where that is exact enough, see
  problem.exact_sigmoid. float16 weights are multiplied by a power of two, so
  that they do not underflow. For long sequences the gradient of query is a sum
  in no fixed order unless XLA is asked for determinism; see above.
  """
  # Not at the top: another jax may lack what this imports.
  from sigattn.kernels.mosaic import host

  return host.attention(problem, query, key, value, operands)
