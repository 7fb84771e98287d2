"""Reverse-mode differentiation, which the kernels of Triton and Mosaic share.

The forward pass saves query, key, value and the operands alone: a weight
depends on its own logit, so the backward pass recomputes it without row
statistics. With problem.normalize it also saves the output and the sum of each
row; a policy of jax.checkpoint can keep both by the name "attention".
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from sigattn.kernels import batching_and_sharding, numerics
from sigattn.kernels.problem import Operands, Problem

_GRADIENTS = ("BTNH", "BSKH", "BSKH", "BN", "BN")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attention(
  forward: Callable[..., tuple[jax.Array, ...]],
  backward: Callable[..., tuple[jax.Array, ...]],
  problem: Problem,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """(B, T, N, H) by `forward`, with the gradients that `backward` computes.

  With problem.normalize a pair of that and the row sums, (B, T, N) float32.
  Works under jit, vmap, shard_map and on meshes, see batching_and_sharding.

  Args:
    forward: (problem, query, key, value, operands) -> (out,), and with
      problem.normalize (out, sums): out = p v / s, and s, (B, T, N) float32.
    backward: (trained, problem, query, key, value, operands, d_out, *rows) ->
      the gradients (dq, dk, dv, dlogit_bias (B, N), dslopes (B, N)). The last
      two are not summed over examples, and they count only if `trained`, that
      is, if logit_bias or alibi_slopes is differentiated. rows: with
      problem.normalize the inverse and the shift of each row, (B, T, N) float32
      each: dz = phi'(z) (inverse do v^T - shift), dv = (inverse p)^T do. For
      sigmoid dlogit_bias is then the sum of -p^2 (inverse do v^T - shift), see
      numerics.bias_share.
    problem, query, key, value, operands: as in xla.attention.
  """
  del backward
  result = _forward(forward, problem, query, key, value, operands)
  return result if problem.normalize else result[0]


def _forward(forward, problem, query, key, value, operands):
  outputs = ("BTNH", "BTN") if problem.normalize else ("BTNH",)
  return batching_and_sharding.over_batch(
    forward, outputs, problem, query, key, value, operands
  )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Trained:
  """Whether logit_bias or alibi_slopes is differentiated."""

  operands: bool


def _save_inputs(forward, backward, problem, *inputs):
  # Leaves are pairs of a value and whether it is differentiated.
  trained = any(x.perturbed for x in jax.tree.leaves(inputs[-1]))
  inputs = jax.tree.map(lambda x: x.value, inputs)
  result = attention(forward, backward, problem, *inputs)
  result = jax.tree.map(lambda x: checkpoint_name(x, "attention"), result)
  rows = result if problem.normalize else ()
  return result, (_Trained(trained), *inputs, rows)


def _pull_back(forward, backward, problem, saved, cotangents):
  del forward
  trained, query, key, value, operands, rows = saved
  cotangents = jax.tree.map(_instantiate, cotangents, is_leaf=_is_zero)
  d_out = cotangents
  if problem.normalize:
    (out, sums), (d_out, d_sums) = rows, cotangents
    inverse = numerics.inverse(sums)
    rows = inverse, numerics.shift(out, inverse, d_out, d_sums)
  *d_inputs, d_bias_BN, d_slopes_BN = batching_and_sharding.over_batch(
    functools.partial(backward, trained.operands), _GRADIENTS,
    problem, query, key, value, operands, d_out, *rows,
  )  # fmt: skip
  if problem.normalize:
    d_bias_BN += numerics.bias_share(problem, sums, d_sums)
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


def _is_zero(x):
  return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _instantiate(x):
  return jax.numpy.zeros(x.shape, x.dtype) if _is_zero(x) else x


attention.defvjp(_save_inputs, _pull_back, symbolic_zeros=True)
