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

_GRADIENTS = ("BTNH", "BSKH", "BSKH")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sums:
  """Which sums of dz, the gradient of the logits, the backward pass returns.

  Each is float32, and none is a sum over examples. With problem.normalize the
  rows of sigmoid sum -p^2 (inverse do v^T - shift) in the place of dz, see
  numerics.row_share.
  """

  rows: bool = False  # over the keys, (B, N, T)
  keys: bool = False  # over the queries, (B, N, S)
  slopes: bool = False  # of -dz distance over both, (B, N)

  @property
  def axes(self) -> tuple[str, ...]:
    """The axes of those that are returned, in their order."""
    all_axes = {"BNT": self.rows, "BNS": self.keys, "BN": self.slopes}
    return tuple(axes for axes, wanted in all_axes.items() if wanted)


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
    backward: (sums, problem, query, key, value, operands, d_out, *rows) -> the
      gradients (dq, dk, dv), and then what `sums` asks for: only what an array
      that is differentiated needs. rows: with problem.normalize the inverse and
      the shift of each row, (B, T, N) float32 each: dz = phi'(z) (inverse
      do v^T - shift), dv = (inverse p)^T do.
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


def _save_inputs(forward, backward, problem, *inputs):
  # Leaves are pairs of a value and whether it is differentiated.
  wanted = _wanted(problem, inputs[-1])
  inputs = jax.tree.map(lambda x: x.value, inputs)
  result = attention(forward, backward, problem, *inputs)
  result = jax.tree.map(lambda x: checkpoint_name(x, "attention"), result)
  rows = result if problem.normalize else ()
  return result, (wanted, *inputs, rows)


def _wanted(problem, operands):
  """The Sums from which the gradients of the operands are computed."""

  def trained(name):
    operand = getattr(operands, name)
    return operand is not None and operand.perturbed

  # The sum of dz over all pairs, from what is exact: see xla.py.
  of_all = trained("logit_bias")
  return Sums(
    rows=trained("query_logit_bias") or (of_all and problem.normalize),
    keys=trained("key_logit_bias") or (of_all and not problem.normalize),
    slopes=trained("alibi_slopes"),
  )


def _pull_back(forward, backward, problem, saved, cotangents):
  del forward
  wanted, query, key, value, operands, rows = saved
  cotangents = jax.tree.map(_instantiate, cotangents, is_leaf=_is_zero)
  d_out, share = cotangents, None
  if problem.normalize:
    (out, sums), (d_out, d_sums) = rows, cotangents
    inverse = numerics.inverse(sums)
    rows = inverse, numerics.shift(out, inverse, d_out, d_sums)
    share = numerics.row_share(problem, sums, d_sums)
  results = batching_and_sharding.over_batch(
    functools.partial(backward, wanted), (*_GRADIENTS, *wanted.axes),
    problem, query, key, value, operands, d_out, *rows,
  )  # fmt: skip
  d_inputs, d_operands = results[:3], results[3:]
  found = dict(zip(wanted.axes, d_operands, strict=True))
  if share is not None and wanted.rows:
    found["BNT"] += share
  inputs = query, key, value
  return (
    *map(batching_and_sharding.cotangent, d_inputs, inputs),
    _operand_gradients(operands, found),
  )


def _operand_gradients(operands, found):
  """The cotangents of the operands, from the sums by their axes."""
  of_all = found.get("BNT", found.get("BNS"))
  gradients = dict(
    logit_bias=None if of_all is None else of_all.sum(-1),
    alibi_slopes=found.get("BN"),
    query_logit_bias=found.get("BNT"),
    key_logit_bias=found.get("BNS"),
  )
  return Operands(**{
    name: batching_and_sharding.operand_cotangent(
      gradient, getattr(operands, name)
    )
    for name, gradient in gradients.items()
  })  # fmt: skip


def _is_zero(x):
  return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _instantiate(x):
  return jax.numpy.zeros(x.shape, x.dtype) if _is_zero(x) else x


attention.defvjp(_save_inputs, _pull_back, symbolic_zeros=True)
