"""Pointwise attention on Hopper GPUs (H100, H200), in Pallas Mosaic GPU.

  host            arguments, padding, and the choice of kernels
  forward         out = p v           queries are stationary    query_tiles
  dq              dq = dz k           queries are stationary    query_tiles
  dkv             dk, dv              keys are stationary       key_tiles
  fused_backward  dq, dk, dv          keys are stationary       key_tiles
  logit_gradient  dz, for dkv and fused_backward
  normalized      what backward passes need of normalised rows
  schedule        which tiles each program computes
  tiles           block sizes
  blocks          which blocks a tile sees
  vectors         logit vectors, in the product of the scores
  weights         from scores to weights
  pipeline        launch, shared memory, products
  registers       masks, distances and sigmoid in registers
  reduce          additions to global memory
  one_row         the products of a token between two calls of attention
  few_rows        the same for up to 32 rows
  units           what both share
  row_registers   rows in registers, for both
  grid            programs that wait for each other

The forward pass saves only query, key and value. There are two backward passes.
Short sequences take dkv and dq: seven matrix products, and the same bits in
every run. Long sequences take fused_backward, which adds each block's share of
dq to float32 sums in global memory. It has five products, but the order of the
sum, and so its last bits, differ from run to run. With
XLA_FLAGS=--xla_gpu_deterministic_ops=true all lengths take the first one.
tiles.FUSED_BACKWARD has the lengths from which the second one is taken. On an
H100, at n = 8,192 without a mask, they ran at these TFLOP/s, counting five
products: 512 and 607 at head width 128, 398 and 551 at 64
(benchmarks/results/adds_h100.json).

With problem.normalize the forward pass also returns, and saves, the sum of each
row. host.py says how the backward pass uses it.
"""

import functools
import logging

import jax

from sigattn.kernels import device
from sigattn.kernels import vectors as logit_vectors
from sigattn.kernels.mosaic import tiles
from sigattn.kernels.problem import Operands, Problem

# Pallas changes with each release of jax. The kernels passed their tests with
# these versions. registers.py lists the parts of jax that are used here and are
# not public.
TESTED_JAX = ("0.11.2",)
# The kinds that weights.py computes.
KINDS = ("sigmoid", "relu", "relu2", "silu")

_logger = logging.getLogger(__name__)


def unsupported(problem: Problem) -> str:
  """Why these kernels cannot compute a problem; "" if they can.

  This imports nothing that an untested version of jax may lack.
  """
  if device.current().capability != 90:
    return unsupported_card()
  if problem.kind not in KINDS:
    return f"kind={problem.kind!r}; one of {KINDS}"
  if problem.dtype not in ("bfloat16", "float16"):
    return f"{problem.dtype} is not implemented"
  for name in logit_vectors.dense(problem):
    return f"a dense {name} is not implemented"
  if not problem.scale:
    return "scale=0 is not implemented"
  if problem.head_dim not in tiles.TILES:
    return f"head_dim={problem.head_dim}; one of {sorted(tiles.TILES)}"
  if problem.is_symbolic:
    return "symbolic sizes are not implemented"
  if 0 in (problem.batch, problem.query_len, problem.key_len):
    return "nothing to compute"
  return unsupported_card()


def unsupported_card() -> str:
  """Why no kernel can run here, whatever the problem; "" if they can.

  It warns once a process if the version of jax is the only reason.
  """
  card = device.current()
  if card.capability != 90:
    return f"needs a Hopper GPU (9.0), device is {card.kind}"
  if jax.__version__ not in TESTED_JAX:
    tested = ", ".join(TESTED_JAX)
    _warn_of_jax(jax.__version__, tested)
    return f"tested with jax {tested}, installed is {jax.__version__}"
  return ""


@functools.cache  # It warns once a process.
def _warn_of_jax(installed, tested):
  _logger.warning(
    "The kernels for Hopper GPUs are not used: they were tested with jax %s, "
    "and jax %s is installed. Another implementation computes attention. To "
    "use them: pip install 'jax[cuda13]==%s'",
    tested, installed, TESTED_JAX[-1],
  )  # fmt: skip


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  problem: Problem,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """xla.attention, in 16 bits with float32 sums.

  The tangents of forward mode are those of xla.attention.

  Sigmoid weights are computed by the hardware's tanh if that is exact enough,
  see numerics.exact_sigmoid. float16 weights are multiplied by a power of two,
  so that they do not underflow. For long sequences the gradient of query is a
  sum in no fixed order, see above.
  """
  # Import it here, because another jax may lack what this module imports.
  from sigattn.kernels.mosaic import host

  problem, operands = logit_vectors.fold(problem, operands)
  return host.attention(problem, query, key, value, operands)
