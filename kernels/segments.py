"""Finds the keys whose segments occur in a block of queries, and vice versa."""

import functools

import jax
import jax.numpy as jnp


def spans(rows: jax.Array, others: jax.Array, block: int) -> jax.Array:
  """The span of the other side that each block of rows sees, (B, blocks, 3).

  Each span is three int32 numbers: the first position on the other side that
  has a segment of the block; one past the last such position; and that second
  number again if every row of the block sees the whole span, else 0.

  Args:
    rows: (B, R) segment ids.
    others: (B, O) segment ids of the other side.
    block: the number of rows in a block.
  """
  batch, length = rows.shape
  order = jnp.argsort(others, axis=1, stable=True)
  ids = jnp.take_along_axis(others, order, axis=1)
  left = jax.vmap(functools.partial(jnp.searchsorted, side="left"))(ids, rows)
  right = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(ids, rows)
  nothing, end = left == right, others.shape[1]

  def place(index):
    index = jnp.clip(index, 0, end - 1)
    return jnp.take_along_axis(order, index, axis=1)

  first = jnp.where(nothing, end, place(left))
  last = jnp.where(nothing, 0, place(right - 1) + 1)
  gaps = (last - first != right - left) | nothing

  def blocks(x):
    pad = -length % block
    return jnp.pad(x, ((0, 0), (0, pad)), "edge").reshape(batch, -1, block)

  first, last, gaps = blocks(first), blocks(last), blocks(gaps)
  low, high = first.min(-1), last.max(-1)
  alike = (low == first.max(-1)) & (high == last.min(-1)) & ~gaps.any(-1)
  spans = jnp.stack([low, high, jnp.where(alike, high, 0)], -1)
  return spans.astype(jnp.int32)
