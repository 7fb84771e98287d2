"""Reverse-mode differentiation, which the kernels of Triton and Mosaic share.

The forward pass saves query, key, value and the operands alone: a weight
depends on its own logit, so the backward pass recomputes it without row
statistics.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

from sigattn.kernels import batching_and_sharding
from sigattn.kernels.problem import Operands, Problem

_GRADIENTS = ("BTNH", "BSKH", "BSKH", "BN", "BN")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attention(
  forward: Callable[..., tuple[jax.Array]],
  backward: Callable[..., tuple[jax.Array, ...]],
  problem: Problem,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
) -> jax.Array:
  """(B, T, N, H) by `forward`, with the gradients that `backward` computes.

  Works under jit, vmap, shard_map and on meshes, see batching_and_sharding.

  Args:
    forward: (problem, query, key, value, operands) -> (out,).
    backward: (trained, problem, query, key, value, operands, d_out) -> the
      gradients (dq, dk, dv, dlogit_bias (B, N), dslopes (B, N)). The last two
      are not summed over examples, and they count only if `trained`, that is,
      if logit_bias or alibi_slopes is differentiated.
    problem, query, key, value, operands: as in xla.attention.
  """
  del backward
  (out,) = batching_and_sharding.over_batch(
    forward, ("BTNH",), problem, query, key, value, operands
  )
  return out


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Trained:
  """Whether logit_bias or alibi_slopes is differentiated."""

  operands: bool


def _save_inputs(forward, backward, problem, *inputs):
  # Leaves are pairs of a value and whether it is differentiated.
  trained = any(x.perturbed for x in jax.tree.leaves(inputs[-1]))
  inputs = jax.tree.map(lambda x: x.value, inputs)
  out = attention(forward, backward, problem, *inputs)
  return out, (_Trained(trained), *inputs)


def _pull_back(forward, backward, problem, saved, d_out):
  del forward
  trained, query, key, value, operands = saved
  *d_inputs, d_bias_BN, d_slopes_BN = batching_and_sharding.over_batch(
    functools.partial(backward, trained.operands), _GRADIENTS,
    problem, query, key, value, operands, d_out,
  )  # fmt: skip
  d_operands = Operands()._replace(
    logit_bias=batching_and_sharding.head_cotangent(
      d_bias_BN, operands.logit_bias
    ),
    alibi_slopes=batching_and_sharding.head_cotangent(
      d_slopes_BN, operands.alibi_slopes
    ),
  )
  inputs = query, key, value
  return *map(batching_and_sharding.cotangent, d_inputs, inputs), d_operands


attention.defvjp(_save_inputs, _pull_back, symbolic_zeros=True)
