"""Pointwise attention in plain JAX: the specification, and a portable form.

`reference` is the definition: it computes all weights at once, in float32, and
JAX differentiates it. `attention` computes the same numbers in memory that
grows with S and not with T S. It needs no running maximum, no sum and no
log-sum-exp, because a weight depends on its own logit alone. It adds up the
contributions of blocks of keys, and the backward pass recomputes each block
from query, key and value:

  z = scale q k^T + bias + b + b_i + b_j - slope |i + offset - j|
  p = activation(z) / normalizer       out = p v
  dv = p^T do    dz = activation'(z) / normalizer * (do v^T)
  dq = scale dz k    dk = scale dz^T q    of biases and slopes: sums of dz

b is logit_bias, b_i query_logit_bias and b_j key_logit_bias.

With problem.normalize the rows are divided by their sums s. These are sums over
blocks of keys too, and need no maximum. If ds is the cotangent of s, then

  s = sum_j p      out = p v / s      dv = (p / s)^T do
  dz = activation'(z) / normalizer * ((do v^T - do . out) / s + ds)

The gradients of b and b_i are sums of dz over a row. For sigmoid, whose
activation' is p - p^2, the terms nearly cancel: the sum of
p (do v^T - do . out) is 0. In 16 bits only the rounding error of `out` would be
left of that sum. So it is left out:

  sum_j dz = ds s - sum_j p^2 ((do v^T - do . out) / s + ds)

differentiation.paired says where this is not done.

Inside, arrays are grouped: q_BTKGH, k_BSKH, and logits z_BKGTS.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sigattn.kernels import batching_and_sharding, differentiation, numerics
from sigattn.kernels.problem import (
  FLOATS,
  Operands,
  Problem,
  not_implemented,
)

_TILE = 2**24  # weights computed at a time: 64 MiB in float32
_MIN_BLOCK = 128  # keys; with fewer, overhead dominates
_BANDS = 8  # query blocks under a causal mask, which skips 7 of 16 parts


def unsupported(problem: Problem) -> str:
  """Empty, because this implementation supports every problem."""
  del problem
  return ""


def reference(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  problem: Problem,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """activation(scale q k^T + ...) v / normalizer, all at once in float32.

  This is the specification: every other implementation is a faster form of it.
  It keeps all weights, (B, N, T, S), and JAX differentiates it in both modes.

  Args:
    query: (B, T, N, H).
    key, value: (B, S, K, H).
    operands: as in Operands.
    problem: the Problem of these arrays.

  Returns:
    (B, T, N, H), with the dtype of query. With problem.normalize also the row
    sums, (B, T, N) float32.
  """
  with jax.default_matmul_precision("highest"):
    _, p_BKGTS, _ = _all_weights(query, key, operands, problem)
    v_BSKH = value.astype(_logits_dtype(problem))
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH)
    if problem.normalize:
      sums_BTKG = jnp.moveaxis(p_BKGTS.sum(-1), 3, 1)
      # No division by 0, and a finite gradient.
      out_BTKGH /= jnp.where(sums_BTKG > 0, sums_BTKG, 1)[..., None]
  out = out_BTKGH.reshape(query.shape).astype(query.dtype)
  return (out, sums_BTKG.reshape(query.shape[:3])) if problem.normalize else out


def weights(
  query: jax.Array, key: jax.Array, operands: Operands, problem: Problem
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(logits, weights, visible) of `reference`, each (B, N, T, S).

  The logits are in float32, before the activation, and include hidden pairs.
  The weights of hidden pairs are 0.
  """
  with jax.default_matmul_precision("highest"):
    z_BKGTS, p_BKGTS, visible = _all_weights(query, key, operands, problem)
  if problem.normalize:
    p_BKGTS = p_BKGTS * numerics.inverse(p_BKGTS.sum(-1))[..., None]
  visible = True if visible is None else visible
  arrays = z_BKGTS, p_BKGTS, jnp.broadcast_to(visible, z_BKGTS.shape)
  shape = problem.batch, problem.num_heads, problem.query_len, problem.key_len
  return tuple(x.reshape(shape) for x in arrays)


def _all_weights(query, key, operands, problem):
  q_BTKGH, k_BSKH = (
    x.astype(_logits_dtype(problem)) for x in (_group(query, problem), key)
  )
  block = _Block(0, problem.query_len, 0, problem.key_len)
  z_BKGTS = _logits(q_BTKGH, k_BSKH, operands, problem, block)
  p_BKGTS, _ = _activation(z_BKGTS, problem)
  visible = _visible(operands, problem, block)
  return z_BKGTS, _only(visible, p_BKGTS), visible


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  problem: Problem,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """`reference` in blocks of keys. It saves only query, key and value.

  With problem.normalize it also saves the output and the row sums.

  Forward and reverse mode work, and can be applied to each other. With bfloat16
  inputs the weights are rounded to bfloat16 before their product with the
  values. With float16 inputs they remain float32, because exp(-16) underflows
  in float16. If a length, segment or mask hides a row from everything, the row
  may contain NaN. Arguments and result are those of `reference`.
  """
  return differentiation.attention(
    PASSES, PASSES, problem, query, key, value, operands
  )


def _forward(problem, query, key, value, operands):
  """(out,), or (out, sums) with problem.normalize."""
  q_BTKGH, outs, sums = _group(query, problem), [], []
  for start, stop in _query_blocks(problem):

    def add(totals, first, size, start=start, stop=stop):
      block = _Block(start, stop - start, first, size)
      q, k, v, _, visible = _inputs(
        problem, operands, block, q_BTKGH, key, value
      )
      p_BKGTS = _phi(_logits(q, k, operands, problem, block), problem)
      p_BKGTS = _only(visible, p_BKGTS)
      out_BTKGH, *sums_BKGT = totals
      out_BTKGH += _product("BKGTS,BSKH->BTKGH", p_BKGTS, v, problem)
      return out_BTKGH, *(x + p_BKGTS.sum(-1) for x in sums_BKGT)

    batch, length, *heads, width = q_BTKGH.shape
    length = stop - start
    zeros = [jnp.zeros((batch, length, *heads, width), _logits_dtype(problem))]
    if problem.normalize:
      zeros.append(jnp.zeros((batch, *heads, length), _logits_dtype(problem)))
    zeros = _as_varying(tuple(zeros), query, key, value, operands)
    out_BTKGH, *sums_BKGT = _over_keys(add, zeros, problem, start, stop)
    for x in sums_BKGT:
      sums.append(_by_query(x))
      out_BTKGH *= _by_query(numerics.inverse(x))[..., None]
    outs.append(out_BTKGH)
  out = jnp.concatenate(outs, axis=1).reshape(query.shape).astype(query.dtype)
  if not problem.normalize:
    return (out,)
  return out, jnp.concatenate(sums, axis=1).reshape(query.shape[:3])


def _as_varying(zeros, *arrays):
  """The zeros, marked in a shard_map as varying over devices as arrays do."""
  arrays = jax.tree.leaves(arrays)
  return jax.tree.map(lambda x: batching_and_sharding.varying(x, arrays), zeros)


def _by_query(x_BKGT):
  """(B, T, K, G)."""
  return jnp.moveaxis(x_BKGT, 3, 1)


class _Gradients(NamedTuple):
  """Sums over the blocks; None for an operand that is not differentiated."""

  q_BTKGH: Any
  k_BSKH: Any
  v_BSKH: Any
  bias: Any
  logit_bias: Any
  alibi_slopes: Any
  query_logit_bias: Any
  key_logit_bias: Any


# The axes of (B, N, T, S) over which dz is summed, of each operand.
_SUMMED = {
  "logit_bias": (2, 3), "query_logit_bias": (3,), "key_logit_bias": (2,),
}  # fmt: skip


class _Rows(NamedTuple):
  """What the backward pass of a normalised row needs, (B, K, G, T) float32.

  dz = activation'(z) (inverse do v^T - shift), and dv = (inverse p)^T do.
  """

  inverse: Any  # 1 / s
  shift: Any  # do . out / s - ds


def _rows(problem, rows, d_out, d_sums):
  out, sums = rows

  def by_head(x_BTN):
    batch, length, _ = x_BTN.shape
    x_BTKG = x_BTN.reshape(batch, length, *_heads(problem))
    return jnp.moveaxis(x_BTKG, 1, 3)

  of_rows = numerics.inverse_and_shift(out, sums, d_sums, d_out)
  return _Rows(*map(by_head, of_rows))


def _backward(trained, problem, query, key, value, operands, rows, cotangents):
  """The gradients, in the form of differentiation.Passes."""
  d_out, sums = cotangents[0], None
  if problem.normalize:
    (_, sums), d_sums = rows, cotangents[1]
    rows = _rows(problem, rows, d_out, d_sums)
  else:
    rows = None
  q_BTKGH, do_BTKGH = _group(query, problem), _group(d_out, problem)

  def zeros(x):
    return None if x is None else jnp.zeros(x.shape, _logits_dtype(problem))

  def zeros_of(name):
    return zeros(getattr(operands, name)) if name in trained else None

  grads = _Gradients(
    q_BTKGH=zeros(q_BTKGH),
    k_BSKH=zeros(key),
    v_BSKH=zeros(value),
    **{name: zeros_of(name) for name in FLOATS},
  )
  grads = _as_varying(grads, query, key, value, operands, d_out)
  for start, stop in _query_blocks(problem):

    def add(grads, first, size, start=start, stop=stop):
      block = _Block(start, stop - start, first, size)
      inputs = _inputs(problem, operands, block, q_BTKGH, key, value, do_BTKGH)
      of_block = jax.tree.map(lambda x: x[..., start:stop, None], rows)
      return _add_gradients(grads, problem, operands, block, of_block, *inputs)

    grads = _over_keys(add, grads, problem, start, stop)
  if problem.normalize and not differentiation.paired(problem, trained):
    share_BNT = numerics.row_share(problem, sums, d_sums)
    shares = dict(logit_bias=share_BNT.sum(-1), query_logit_bias=share_BNT)
    grads = _add_sums(grads, shares, {})
  return _as_inputs(grads, query, key, value, operands)


PASSES = differentiation.Passes(_forward, _backward)


def _add_gradients(
  grads, problem, operands, block, rows, q_BTKGH, k_BSKH, v_BSKH, do_BTKGH,
  visible,
):  # fmt: skip
  z_BKGTS = _logits(q_BTKGH, k_BSKH, operands, problem, block)
  p_BKGTS, derivative_BKGTS = _activation(z_BKGTS, problem)
  dp_BKGTS = _einsum("BTKGH,BSKH->BKGTS", do_BTKGH, v_BSKH, problem)
  dz_bias = None
  if rows is not None:
    dp_BKGTS = rows.inverse * dp_BKGTS - rows.shift
    is_paired = differentiation.paired(problem, _given(grads))
    if problem.kind == "sigmoid" and not is_paired:
      dz_bias = _only(visible, -p_BKGTS * p_BKGTS * dp_BKGTS)
    p_BKGTS *= rows.inverse
  # Mask after both factors are multiplied, so that a hidden NaN has no effect.
  p_BKGTS = _only(visible, p_BKGTS)
  dz_BKGTS = _only(visible, derivative_BKGTS * dp_BKGTS)

  dq = _product("BKGTS,BSKH->BTKGH", dz_BKGTS, k_BSKH, problem)
  dk = _product("BKGTS,BTKGH->BSKH", dz_BKGTS, q_BTKGH, problem)
  dv = _product("BKGTS,BTKGH->BSKH", p_BKGTS, do_BTKGH, problem)
  grads = grads._replace(
    q_BTKGH=_add_at(grads.q_BTKGH, problem.scale * dq, {1: block.query}),
    k_BSKH=_add_at(grads.k_BSKH, problem.scale * dk, {1: block.key}),
    v_BSKH=_add_at(grads.v_BSKH, dv, {1: block.key}),
  )

  def by_head(x_BKGTS):
    return x_BKGTS.reshape(
      problem.batch, problem.num_heads, *x_BKGTS.shape[-2:]
    )

  dz_BNTS = by_head(dz_BKGTS)
  of_bias_BNTS = dz_BNTS if dz_bias is None else by_head(dz_bias)
  return _add_operand_gradients(
    grads, problem, operands, block, dz_BNTS, of_bias_BNTS
  )


def _given(grads):
  """The names of the operands that are differentiated."""
  return [name for name in FLOATS if getattr(grads, name) is not None]


def _add_operand_gradients(
  grads, problem, operands, block, dz_BNTS, of_bias_BNTS
):
  if grads.bias is not None:
    axes = [i for i, n in enumerate(grads.bias.shape) if n == 1]
    starts = {2: block.query, 3: block.key}
    starts = {i: start for i, start in starts.items() if i not in axes}
    part = dz_BNTS.sum(axes, keepdims=True)
    grads = grads._replace(bias=_add_at(grads.bias, part, starts))
  sums = {
    # A sum over the keys of a normalised row has a form of its own, see above.
    name: (of_bias_BNTS if 3 in axes else dz_BNTS).sum(axes)
    for name, axes in _SUMMED.items()
  }
  starts = {"query_logit_bias": block.query, "key_logit_bias": block.key}
  grads = _add_sums(grads, sums, starts)
  if grads.alibi_slopes is not None:
    distance_BTS = _distance(operands, problem, block)[:, None]
    slopes = -(dz_BNTS * distance_BTS).sum((2, 3))
    grads = _add_sums(grads, {"alibi_slopes": slopes}, {})
  return grads


def _add_sums(grads, sums, starts):
  """Adds sums of shape (B, N, ...) to grads.

  A sum is reduced over each axis in which its gradient has size 1. sums: by the
  name of the operand; operands without a gradient are skipped. starts: where a
  sum begins in the last axis of its operand.
  """
  totals = {}
  for name, part in sums.items():
    total = getattr(grads, name)
    if total is None:
      continue
    axes = [axis for axis in (0, 1) if total.shape[axis] == 1]
    part = part.sum(axes, keepdims=True)
    totals[name] = _add_at(total, part, {2: starts.get(name, 0)})
  return grads._replace(**totals)


def _add_at(total, part, starts):
  """Adds `part` to total. starts: {axis: where the part begins}."""
  if part.shape == total.shape:
    return total + part
  index = [starts.get(axis, 0) for axis in range(total.ndim)]
  old = lax.dynamic_slice(total, index, part.shape)
  return lax.dynamic_update_slice(total, old + part, index)


def _as_inputs(grads, query, key, value, operands):
  """The cotangents, with the shapes and dtypes of the inputs."""

  def like(grad, x):
    return None if grad is None else batching_and_sharding.cotangent(grad, x)

  names = "bias", "alibi_slopes", *_SUMMED
  d_operands = Operands(**{
    name: like(getattr(grads, name), getattr(operands, name)) for name in names
  })  # fmt: skip
  return (
    like(grads.q_BTKGH, query),
    like(grads.k_BSKH, key),
    like(grads.v_BSKH, value),
    d_operands,
  )


# Blocks.


class _Block(NamedTuple):
  """Some queries and some keys; `key` may be traced."""

  query: int  # first query
  queries: int
  key: Any  # first key
  keys: int


def _query_blocks(problem):
  """(start, stop) of the blocks of queries that are computed together."""
  length = problem.query_len
  bounded = problem.bounds != (None, None)
  moves = problem.shapes.query_offset is not None
  if _is_small(problem) or moves or not bounded:
    return [(0, length)]
  size = max(-(-length // _BANDS), _MIN_BLOCK)
  return [(i, min(i + size, length)) for i in range(0, length, size)]


def _is_small(problem):
  if problem.is_symbolic:  # Blocks need sizes.
    return True
  weights = problem.batch * problem.num_heads * problem.query_len
  return weights * problem.key_len <= _TILE


def _over_keys(add, total, problem, start, stop):
  """Applies add(total, first, size) to each block of visible keys."""
  if problem.is_symbolic:
    return add(total, 0, problem.key_len)
  low, high = _key_range(problem, start, stop)
  block = high - low
  if not _is_small(problem):
    rows = problem.batch * problem.num_heads * (stop - start)
    block = max(_TILE // rows // _MIN_BLOCK, 1) * _MIN_BLOCK
  count, rest = divmod(max(high - low, 0), max(block, 1))
  if count == 1:
    total = add(total, low, block)
  elif count > 1:
    total = lax.fori_loop(
      0, count, lambda i, x: add(x, low + i * block, block), total
    )
  return add(total, high - rest, rest) if rest else total


def _key_range(problem, start, stop):
  """(low, high): the keys that queries start..stop see by their positions."""
  left, right = problem.bounds
  if problem.shapes.query_offset is not None:  # It is not known here.
    left = right = None
  low = 0 if left is None else max(start - left, 0)
  high = problem.key_len if right is None else stop + right
  return low, min(high, problem.key_len)


def _inputs(problem, operands, block, q_BTKGH, k_BSKH, v_BSKH, *do_BTKGH):
  """The block's rows of each array, and which of its pairs are visible.

  Rows that are hidden from the whole block are set to 0, because 0 times NaN is
  NaN.
  """
  queries = [
    lax.slice_in_dim(x, block.query, block.query + block.queries, axis=1)
    for x in (q_BTKGH, *do_BTKGH)
  ]
  keys = [_slice(x, 1, block.key, block.keys) for x in (k_BSKH, v_BSKH)]
  visible = _visible(operands, problem, block)
  if problem.masked_by_data:
    seeing, seen = visible.any((1, 2, 4)), visible.any((1, 2, 3))
    queries = [_only(seeing[:, :, None, None, None], x) for x in queries]
    keys = [_only(seen[:, :, None, None], x) for x in keys]
  d_out = queries[1:] or [None]
  return queries[0], *keys, *d_out, visible


def _slice(x, axis, start, size):
  if size == x.shape[axis]:
    return x
  return lax.dynamic_slice_in_dim(x, start, size, axis)


# The mathematics of one block.


def _activation(z, problem):
  """The weights activation(z) / normalizer, and their derivatives in z."""
  if problem.kind == "sigmoid":
    p = lax.logistic(z)
    derivative = p * (1 - p)
  elif problem.kind == "relu":
    p, derivative = jnp.maximum(z, 0), (z > 0).astype(z.dtype)
  elif problem.kind == "silu":
    z = jnp.maximum(z, -1e30)  # -inf times 0 is not a number.
    half = lax.logistic(z)
    p, derivative = z * half, half * (1 + z * (1 - half))
  elif problem.kind == "relu2":
    p = jnp.maximum(z, 0)
    p, derivative = p * p, 2 * p
  else:
    raise not_implemented(problem.kind, "kernels/xla.py")
  if problem.normalizer == 1:
    return p, derivative
  return p / problem.normalizer, derivative / problem.normalizer


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _phi(z, problem):
  """The weights, differentiated as in the backward pass, also at 0."""
  return _activation(z, problem)[0]


@_phi.defjvp
def _phi_tangent(problem, primals, tangents):
  p, derivative = _activation(*primals, problem)
  return p, derivative * tangents[0]


def _logits(q_BTKGH, k_BSKH, operands, problem, block):
  z = problem.scale * _einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, problem)
  if operands.bias is not None:
    z = z + _block_of(operands.bias, problem, block).astype(z.dtype)
  if operands.alibi_slopes is not None:
    slopes = _per_head(operands.alibi_slopes, problem).astype(z.dtype)
    distance = _distance(operands, problem, block)[:, None, None]
    z = z - slopes * distance
  for vector in _vectors(operands, block):
    z = z + _by_key_head(vector, problem).astype(z.dtype)
  if operands.logit_bias is not None:
    return z + _per_head(operands.logit_bias, problem).astype(z.dtype)
  return z + problem.logit_bias


def _vectors(operands, block):
  """The block's query_logit_bias and key_logit_bias, (B, N, T, S) with ones."""
  if operands.query_logit_bias is not None:
    part = lax.slice_in_dim(
      operands.query_logit_bias, block.query, block.query + block.queries,
      axis=2,
    )  # fmt: skip
    yield part[..., None]
  if operands.key_logit_bias is not None:
    yield _slice(operands.key_logit_bias, 2, block.key, block.keys)[:, :, None]


def _visible(operands, problem, block):
  """bool (B or 1, K or 1, G or 1, T, S), or None if everything is visible."""
  i = block.query + jnp.arange(block.queries)[:, None]
  j = block.key + jnp.arange(block.keys)[None]
  place = _place(operands, i)
  left, right = problem.bounds
  parts = []
  if right is not None:
    parts.append(j[None] <= place + right)
  if left is not None:
    parts.append(j[None] >= place - left)
  if operands.query_seq_lengths is not None:
    parts.append(i[None] < operands.query_seq_lengths[:, None, None])
  if operands.key_value_seq_lengths is not None:
    parts.append(j[None] < operands.key_value_seq_lengths[:, None, None])
  if operands.query_segment_ids is not None:
    queries = lax.slice_in_dim(
      operands.query_segment_ids,
      block.query,
      block.query + block.queries,
      axis=1,
    )
    keys = _slice(operands.key_value_segment_ids, 1, block.key, block.keys)
    parts.append(queries[:, :, None] == keys[:, None])
  parts = [x[:, None, None] for x in parts]
  if operands.mask is not None:
    parts.append(_block_of(operands.mask, problem, block))
  if not parts:
    return None
  visible = functools.reduce(jnp.logical_and, parts)
  return jnp.broadcast_to(
    visible, (*visible.shape[:3], block.queries, block.keys)
  )


def _only(visible, x):
  """x where a pair is visible, else 0."""
  return x if visible is None else jnp.where(visible, x, jnp.zeros_like(x))


def _distance(operands, problem, block):
  """|i + offset - j|, (B or 1, T, S)."""
  i = block.query + jnp.arange(block.queries)[:, None]
  j = block.key + jnp.arange(block.keys)[None]
  distance = abs(_place(operands, i) + problem.distance_offset - j[None])
  return distance.astype(_logits_dtype(problem))


def _place(operands, i):
  """i (T, 1) + operands.query_offset, (B or 1, T, 1)."""
  if operands.query_offset is None:
    return i[None]
  return i[None] + operands.query_offset[:, None, None]


def _block_of(x_BNTS, problem, block):
  """The block's part of a bias or mask, (B, K, G, T, S); axes of 1 stay 1."""
  if x_BNTS.shape[2] > 1:
    x_BNTS = lax.slice_in_dim(
      x_BNTS, block.query, block.query + block.queries, axis=2
    )
  if x_BNTS.shape[3] > 1:
    x_BNTS = _slice(x_BNTS, 3, block.key, block.keys)
  return _by_key_head(x_BNTS, problem)


def _by_key_head(x_BNTS, problem):
  """Splits N into K and G: (B, K, G, T, S); an axis of 1 stays 1."""
  batch, heads, *rest = x_BNTS.shape
  if heads == 1:
    return x_BNTS.reshape(batch, 1, 1, *rest)
  return x_BNTS.reshape(batch, *_heads(problem), *rest)


def _per_head(x_BN, problem):
  return x_BN.reshape(x_BN.shape[0], *_heads(problem), 1, 1)


def _group(x_BTNH, problem):
  batch, length, _, width = x_BTNH.shape
  return x_BTNH.reshape(batch, length, *_heads(problem), width)


def _heads(problem):
  """(K, G)."""
  return problem.num_kv_heads, problem.num_heads // problem.num_kv_heads


# Precision.


def _logits_dtype(problem):
  return numerics.wide(problem.dtype)


def _einsum(equation, a, b, problem):
  return jnp.einsum(
    equation, a, b, preferred_element_type=_logits_dtype(problem)
  )


def _product(equation, weights, x, problem):
  """The product of weights, or of their gradients, with rows of an input."""
  dtype = _logits_dtype(problem)
  if problem.dtype == "bfloat16":
    dtype = jnp.bfloat16
  return _einsum(equation, weights.astype(dtype), x.astype(dtype), problem)
