"""Pointwise attention: activation(scale q k^T + ...) v, by the best kernel.

This package imports neither Flax nor the rest of the project. An implementation
is a module with two functions:

  unsupported(problem) -> str   why it cannot compute the problem; "" if it can
  attention(query, key, value, operands, problem) -> (B, T, N, H), and with
    problem.normalize a pair of that and the row sums, (B, T, N) float32
"""

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import jax
from jax.sharding import PartitionSpec

from sigattn.kernels import batching_and_sharding, device, numerics, xla
from sigattn.kernels.problem import Operands, Problem, make_problem

__all__ = [
  "IMPLEMENTATIONS", "Operands", "Problem", "attention", "choose", "weights",
]  # fmt: skip

# The fastest for long sequences comes first. xla supports every problem, so it
# comes last.
IMPLEMENTATIONS = {
  "mosaic": "sigattn.kernels.mosaic",
  "triton": "sigattn.kernels.triton",
  "xla": "sigattn.kernels.xla",
}

# Below this length Triton is tried before Mosaic. Mosaic has large tiles, and
# pads lengths to a multiple of 8 by a copy: on an H100, 196 tokens of width 64
# took 2.1 times Triton's time forward and 1.9 times backward. At 1,024 tokens
# both take the same time for the two passes together.
_SHORT = 512
# With so few queries, as in decoding, most of Mosaic's tile of 64 is padding.
_FEW = 16

# The end of each error that refuses a named implementation.
ADVICE = "pass implementation=None to let the library choose, or 'xla'"

_logger = logging.getLogger(__name__)


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  *,
  kind: str,
  scale: float,
  logit_bias: float | None,
  normalizer: float = 1.0,
  normalize: bool = False,
  is_causal: bool = False,
  local_window_size: int | tuple[int | None, int | None] | None = None,
  query_offset: int | None = None,
  paired: bool = False,
  implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """out = activation(scale q k^T + bias + logit_bias + alibi) v / normalizer.

  A row of the output without a visible key is zero.

  Args:
    query: (B, T, N, H).
    key, value: (B, S, K, H), K dividing N. In 8 bits they are cast to the
      query's dtype first.
    operands: arrays that change the logits or decide what is visible.
    kind: one of problem.ACTIVATIONS; attention.py has their formulas.
    scale: a float.
    logit_bias: a float, or None if operands.logit_bias holds an array.
    normalizer: a float.
    normalize: divides the weights of a row by their sum over the visible keys.
      A row whose weights are all zero remains zero.
    is_causal: query i sees the keys j <= i, as in jax.nn.
    local_window_size: w or (left, right): query i sees i - left .. i + right;
      None for all keys on a side.
    query_offset: an int, the position of the first query among the keys: i
      begins there. None if operands.query_offset is an array, or if it is not
      given; then i begins at 0, and for ALiBi at S - T.
    paired: whether both logit vectors are those of one gate, see
      differentiation.paired.
    implementation: a name of IMPLEMENTATIONS. None: the first that supports
      the problem.

  Returns:
    (B, T, N, H), with the dtype of query. With `normalize` also the sums by
    which the rows were divided, (B, T, N) float32.

  Raises:
    ValueError: for arguments that make no sense for any implementation.
    NotImplementedError: if the named implementation does not support them.
  """
  key, value = numerics.widened(query, key, value)
  options = dict(
    kind=kind,
    scale=scale,
    logit_bias=logit_bias,
    normalizer=normalizer,
    normalize=normalize,
    is_causal=is_causal,
    query_offset=query_offset,
    paired=paired,
  )
  problem = make_problem(
    query, key, value, operands, window=local_window_size, **options
  )
  split = batching_and_sharding.shards(query, key, value, operands)
  if split:
    local = functools.partial(
      attention, local_window_size=local_window_size,
      implementation=implementation, **options,
    )  # fmt: skip
    *split, out_spec = split
    if normalize:
      out_spec = out_spec, PartitionSpec(*out_spec[:3])  # of the row sums
    return batching_and_sharding.over_shards(local, *split, out_spec)(
      query, key, value, operands
    )
  module = _module(choose(problem, implementation))
  return module.attention(query, key, value, operands, problem)


def weights(
  query: jax.Array,
  key: jax.Array,
  operands: Operands,
  *,
  local_window_size: int | tuple[int | None, int | None] | None = None,
  **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(logits, weights, visible), each (B, N, T, S), for inspection.

  The specification computes them, in float32 and all at once. The arguments are
  those of `attention`, without the values and the implementation.
  """
  key, _ = numerics.widened(query, key, key)
  problem = make_problem(
    query, key, key, operands, window=local_window_size, **options
  )
  return xla.weights(query, key, operands, problem)


def choose(problem: Problem, implementation: str | None = None) -> str:
  """The name of the implementation that will compute the problem.

  The choice, and why others were rejected, is logged once per problem. On a
  machine without an NVIDIA GPU, where the choice is always the same, it is
  logged once.

  Raises:
    ValueError: for an unknown name.
    NotImplementedError: with the reasons, if none supports the problem, or if
      the named one does not.
  """
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{implementation=}; choose from {[None, *IMPLEMENTATIONS]}"
    )
  return _choose(problem, implementation, device.current())


# Cached, so that each problem is logged once for each device.
@functools.lru_cache(maxsize=4096)
def _choose(problem, implementation, card):
  declined = {}
  for name in [implementation] if implementation else _fastest_first(problem):
    reason = _module(name).unsupported(problem)
    if not reason:
      if declined and card.capability is None:
        _log_portable(name, card.kind)
      else:
        _log(problem, name, declined)
      return name
    declined[name] = reason
  reasons = "; ".join(f"{name}: {why}" for name, why in declined.items())
  raise NotImplementedError(f"attention {problem}: {reasons}; {ADVICE}")


def _log(problem, name, declined):
  reasons = "".join(
    f"; not {x}: {declined[x]}" for x in IMPLEMENTATIONS if x in declined
  )
  _logger.info("attention %s by %s%s", problem, name, reasons)


@functools.cache
def _log_portable(name, kind):
  _logger.info("attention by %s: %s is no NVIDIA GPU", name, kind)


def _fastest_first(problem):
  names = list(IMPLEMENTATIONS)
  if problem.is_symbolic:
    return names
  short = max(problem.query_len, problem.key_len) < _SHORT
  short |= problem.query_len <= _FEW
  # With ALiBi and H = 32 (n = 2,048), forward and backward without a mask take
  # Mosaic 4.2 ms and Triton 3.5. With a causal mask both take the same time,
  # and with wider heads Mosaic is faster.
  alibi = problem.shapes.alibi_slopes is not None and problem.head_dim <= 32
  if (short or alibi) and "mosaic" in names[:-1]:
    names.remove("mosaic")
    names.insert(-1, "mosaic")  # Only xla comes after it.
  return names


def _module(name: str) -> ModuleType:
  # Import it only when it is used, because a laptop need not have Triton.
  return importlib.import_module(IMPLEMENTATIONS[name])
