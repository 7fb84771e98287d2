"""dot_product_attention: jax.nn's function with sigmoid and ReLU attention.

Sigmoid attention (Ramapuram et al., 2409.04431) is the whole of

  out = sigmoid(scale q k^T + b) v,   b = -log n,

a weight a pair, with no sum over the row. The bias makes a row's weights add
up to about 1 where the logits are small, as softmax's do: n sigmoid(-log n) =
n / (n + 1).

Shapes: B batch, T queries, S keys, N heads, K key-value heads (K divides N),
H head width.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sigattn.kernels import dispatch

KINDS = ("sigmoid", "softmax", "relu", "relu2")


def implementations(kind):
  """The names that `implementation` may have, besides None, for a kind."""
  return ("xla", "cudnn") if kind == "softmax" else (*dispatch.IMPLEMENTATIONS,)


def dot_product_attention(
  query,
  key,
  value,
  bias=None,
  mask=None,
  *,
  kind="sigmoid",
  logit_bias=None,
  n=None,
  alibi_slopes=None,
  scale=None,
  is_causal=False,
  query_seq_lengths=None,
  key_value_seq_lengths=None,
  query_segment_ids=None,
  key_value_segment_ids=None,
  local_window_size=None,
  implementation=None,
  dropout_rng=None,
  dropout_rate=0.0,
  broadcast_dropout=True,
  deterministic=None,
  dtype=None,
  precision=None,
  module=None,
):
  """out = phi(scale q k^T + bias + alibi + b) v, a drop-in for jax.nn's.

  kind      phi(z)           b by default   source
  sigmoid   1 / (1 + e^-z)   -log n         2409.04431
  softmax   over the row     none           goes to jax.nn
  relu      max(z, 0) / n    0              2309.08586
  relu2     max(z, 0)^2 / n  0              2309.08586

  The arguments of jax.nn.dot_product_attention mean what they mean there.
  Except with softmax, a row that sees no key is zero.

  Args:
    query: (B, T, N, H) or (T, N, H); float16, bfloat16 or float32.
    key, value: (B, S, K, H) or (S, K, H).
    bias: (B, N, T, S), axes of 1 broadcast; added to the logits.
    mask: the same shapes, bool; True: visible.
    kind: one of KINDS.
    logit_bias: b. A float, or an array (N,) or (B, N), which has a gradient.
      None: as in the table. Senseless with softmax, which cancels it.
    n: the key length that b and ReLU's divisor are made for. None: S, padding
      included. A model gives its own longest length here, so that training
      and evaluation at another length agree.
    alibi_slopes: (N,) or (B, N), positive: subtracts slope * |i + S - T - j|
      from the logit of query i and key j (2108.12409). The last query and the
      last key stand together, as one decodes. Unlike softmax, sigmoid does not
      cancel a constant of the row, so that this full offset matters.
    scale: of q k^T; None: 1 / sqrt(H).
    is_causal: query i sees the keys j <= i.
    query_seq_lengths, key_value_seq_lengths: (B,) integers; what lies beyond
      is neither seen nor computed into a gradient, and may hold NaN.
    query_segment_ids, key_value_segment_ids: (B, T) and (B, S) integers, of
      sequences packed into one row; a query sees the keys of its own id.
    local_window_size: w or (left, right): query i sees i - left to i + right.
    implementation: None: the fastest that can; a name of
      implementations(kind).
    dropout_rng, dropout_rate, broadcast_dropout, deterministic, dtype,
      precision, module: what Flax's MultiHeadAttention passes to an
      attention_fn. dtype: what query, key and value are cast to first. With
      `deterministic` given, a mask may be of Flax's 0 and 1 in any dtype.

  Returns:
    The shape and dtype of query.

  Raises:
    ValueError: for arguments that make no sense, active dropout among them.
    NotImplementedError: where the named implementation cannot do this.
  """
  del dropout_rng, broadcast_dropout
  if kind not in KINDS:
    raise ValueError(f"{kind=}; choose from {KINDS}")
  _check_flax(dropout_rate, deterministic, precision, module)
  if implementation not in (None, *implementations(kind)):
    raise ValueError(
      f"{implementation=}; with {kind=} choose from "
      f"{(None, *implementations(kind))}"
    )
  query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
  shape = query.shape
  if query.ndim == 3:
    query, key, value = (_unsqueeze(x, 4) for x in (query, key, value))
  if query.ndim != 4 or key.ndim != 4:
    raise ValueError(
      f"query.shape={shape}, key.shape={key.shape}; must be (B, T, N, H) and "
      "(B, S, K, H), or both without B"
    )
  if mask is not None and deterministic is not None:
    mask = jnp.asarray(mask) != 0
  operands = _operands(
    query,
    bias=bias,
    mask=mask,
    alibi_slopes=alibi_slopes,
    query_seq_lengths=query_seq_lengths,
    key_value_seq_lengths=key_value_seq_lengths,
    query_segment_ids=query_segment_ids,
    key_value_segment_ids=key_value_segment_ids,
  )
  masks = dict(is_causal=is_causal, local_window_size=local_window_size)
  attend = _softmax if kind == "softmax" else _pointwise
  out = attend(
    query, key, value, operands, kind=kind, logit_bias=logit_bias,
    n=_length(n, key), scale=_scale(scale, query),
    implementation=implementation, **masks,
  )  # fmt: skip
  return out.reshape(shape)


class Weights(NamedTuple):
  """All that dot_product_attention computes before the values come in."""

  logits_BNTS: Any  # float32: scale q k^T + bias + alibi + b, hidden pairs too
  weights_BNTS: Any  # float32: phi of them, 0 where hidden
  visible_BNTS: Any  # bool


def attention_weights(
  query,
  key,
  *,
  kind="sigmoid",
  logit_bias=None,
  n=None,
  scale=None,
  is_causal=False,
  local_window_size=None,
  **operands,
):
  """The Weights A of which dot_product_attention's output is A v: to look at.

  They are held all at once. The arguments are dot_product_attention's, with a
  batch axis; operands: its arrays, from `bias` to `key_value_segment_ids`.
  """
  operands = _operands(query, **operands)
  is_softmax = kind == "softmax"
  if is_softmax:
    _check_no_bias(kind, logit_bias)
    kind, logit_bias = "sigmoid", 0.0  # of the same logits
  operands, numbers = _bias_and_divisor(
    query, operands, kind, logit_bias, _length(n, key)
  )
  found = Weights(
    *dispatch.weights(
      query,
      key,
      operands,
      kind=kind,
      scale=_scale(scale, query),
      is_causal=is_causal,
      local_window_size=local_window_size,
      **numbers,
    )
  )
  if not is_softmax:
    return found
  weights_BNTS = jax.nn.softmax(found.logits_BNTS, where=found.visible_BNTS)
  # Of a row that sees nothing, jax.nn's are NaN.
  weights_BNTS = jnp.where(found.visible_BNTS, weights_BNTS, 0)
  return found._replace(weights_BNTS=weights_BNTS)


def _check_no_bias(kind, logit_bias):
  if logit_bias is not None:
    raise ValueError(
      f"{logit_bias=} with {kind=}: softmax cancels a constant of the row; "
      "give None"
    )


def _scale(scale, query):
  return 1 / math.sqrt(query.shape[3]) if scale is None else scale


def _length(n, key):
  n = key.shape[1] if n is None else n
  if not n > 0:
    raise ValueError(f"{n=}; must be > 0")
  return n


def _operands(
  query, *, bias=None, mask=None, alibi_slopes=None, **lengths_and_segments
):
  """dispatch.Operands of arrays that may lack axes in front."""
  return dispatch.Operands(
    bias=_unsqueeze(bias, 4),
    mask=_unsqueeze(mask, 4),
    alibi_slopes=_per_head("alibi_slopes", alibi_slopes, _heads(query)),
    **{
      name: _unsqueeze(x, 1 if name.endswith("lengths") else 2)
      for name, x in lengths_and_segments.items()
    },
  )


def _heads(query):
  """(B, N)."""
  return query.shape[0], query.shape[2]


def default_logit_bias(kind, n):
  """b where none is given: -log n for sigmoid, 0 for ReLU kinds."""
  return -math.log(n) if kind == "sigmoid" else 0.0


def _pointwise(query, key, value, operands, *, kind, logit_bias, n, **options):
  operands, numbers = _bias_and_divisor(query, operands, kind, logit_bias, n)
  return dispatch.attention(
    query, key, value, operands, kind=kind, **numbers, **options
  )


def _bias_and_divisor(query, operands, kind, logit_bias, n):
  """b and what the activation is divided by, as `kernels` takes them.

  Returns (operands, {"logit_bias", "normalizer"}).
  """
  if logit_bias is None:
    logit_bias = default_logit_bias(kind, n)
  elif not isinstance(logit_bias, (int, float, np.number)):
    array = _per_head("logit_bias", logit_bias, _heads(query))
    operands, logit_bias = operands._replace(logit_bias=array), None
  normalizer = 1.0 if kind == "sigmoid" else n
  return operands, dict(logit_bias=logit_bias, normalizer=normalizer)


def _softmax(query, key, value, operands, *, kind, logit_bias, n, **options):
  del n  # Softmax normalises by itself.
  _check_no_bias(kind, logit_bias)
  bias, mask = operands.bias, operands.mask
  if operands.alibi_slopes is not None:
    length, keys = query.shape[1], key.shape[1]
    i = jnp.arange(length)[:, None] + keys - length
    distance = abs(i - jnp.arange(keys)[None])[None, None]
    alibi = -operands.alibi_slopes[:, :, None, None] * distance
    bias = alibi if bias is None else bias + alibi
  if (operands.query_segment_ids is None) != (
    operands.key_value_segment_ids is None
  ):
    raise ValueError(
      "query_segment_ids and key_value_segment_ids; give both or neither"
    )
  if operands.query_segment_ids is not None:
    same = (
      operands.query_segment_ids[:, :, None]
      == operands.key_value_segment_ids[:, None]
    )[:, None]
    mask = same if mask is None else mask & same
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    bias,
    mask,
    query_seq_lengths=operands.query_seq_lengths,
    key_value_seq_lengths=operands.key_value_seq_lengths,
    **options,
  )


def _check_flax(dropout_rate, deterministic, precision, module):
  if dropout_rate and not deterministic:
    raise ValueError(
      f"{dropout_rate=}; attention weights are not dropped here: give 0"
    )
  if precision is not None:
    raise ValueError(f"{precision=}; use jax.default_matmul_precision instead")
  if module is not None:
    raise ValueError(
      "sow_weights=True; the weights are never held as one array"
    )


def _unsqueeze(x, ndim):
  """x as an array with axes of 1 in front, up to ndim; None stays."""
  if x is None:
    return None
  x = jnp.asarray(x)
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _per_head(name, x, heads):
  """(), (N,) or (B, N) as (1 or B, N); heads: (B, N)."""
  if x is None:
    return None
  x = jnp.asarray(x)
  if x.ndim > 2 or x.shape not in ((), heads[1:], heads):
    raise ValueError(f"{name}.shape={x.shape}; must be {heads[1:]} or {heads}")
  return jnp.broadcast_to(x, heads[1:])[None] if x.ndim < 2 else x
