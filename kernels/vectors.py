"""Masks and biases that broadcast over queries or keys, as logit vectors.

The kernels of Triton and Mosaic take one number for each query and one for each
key, (B or 1, N or 1, T) and (B or 1, N or 1, S), but no array over T and S. A
mask of keys becomes a vector of 0 and -inf.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sigattn.kernels.problem import Operands, Problem

_MASKS = ("bias", "mask")


def dense(problem: Problem) -> list[str]:
  """The names of the operands that vary over both queries and keys."""
  shapes = {name: getattr(problem.shapes, name) for name in _MASKS}
  return [
    name for name, shape in shapes.items() if shape and 1 not in shape[2:]
  ]


def fold(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
  """The same attention, with bias and mask moved into the logit vectors.

  Neither may be dense. Gradients flow through this function.
  """
  if operands.bias is None and operands.mask is None:
    return problem, operands
  vectors = {
    "query_logit_bias": operands.query_logit_bias,
    "key_logit_bias": operands.key_logit_bias,
  }
  for name in _MASKS:
    array = getattr(operands, name)
    if array is None:
      continue
    if name == "mask":
      array = jnp.where(array, 0.0, -jnp.inf)
    side, vector = _vector(problem, array)
    vectors[side] = _sum(vectors[side], vector)
  operands = operands._replace(bias=None, mask=None, **vectors)
  shapes = Operands(*(x if x is None else x.shape for x in operands))
  return dataclasses.replace(problem, shapes=shapes), operands


def _vector(problem, x_BNTS):
  """(the name of the operand that it becomes, (B or 1, N or 1, length))."""
  batch, heads, queries, _ = x_BNTS.shape
  if queries == 1:
    vector, length = x_BNTS[:, :, 0], problem.key_len
    return "key_logit_bias", jnp.broadcast_to(vector, (batch, heads, length))
  vector, length = x_BNTS[..., 0], problem.query_len
  return "query_logit_bias", jnp.broadcast_to(vector, (batch, heads, length))


def _sum(given: jax.Array | None, part: jax.Array) -> jax.Array:
  """The sum in float32, in which the kernels compute."""
  part = part.astype(jnp.float32)
  return part if given is None else given.astype(jnp.float32) + part
