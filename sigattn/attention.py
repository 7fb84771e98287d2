"""dot_product_attention: jax.nn's function with sigmoid and ReLU attention.

Sigmoid attention (Ramapuram et al., 2409.04431, Section 2) is

  out = sigmoid(scale q k^T + b) v,   b = -log n.

Each pair of a query and a key gets its own weight; rows are not normalised.
If the logits are small, the bias makes the weights of a row add up to about 1,
as softmax's do: n sigmoid(-log n) = n / (n + 1). With normalize=True the
weights of a row are divided by their sum.

Shapes: B batch, T queries, S keys, N heads, K key-value heads (K divides N),
H head width.
"""

# So that help() shows ArrayLike instead of all types that it stands for.
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from sigattn.kernels import decoding, device, dispatch, numerics
from sigattn.kernels.problem import (
  FREE_AXES,
  SIGNED,
  Problem,
  fits,
  has_8_bits,
  make_problem,
  symbolic,
)

KINDS = ("sigmoid", "softmax", "relu", "relu2", "silu")


def cannot_normalize(kind: str) -> str:
  """Why the rows of a kind are not divided by their sums; "" if they can be."""
  if kind == "softmax":
    return "which is normalised already"
  return "whose weights may be negative" if kind in SIGNED else ""


def implementations(kind: str) -> tuple[str, ...]:
  """The names that `implementation` accepts for a kind, besides None."""
  if kind == "softmax":
    return "xla", "cudnn", "triton"
  return (*dispatch.IMPLEMENTATIONS,)


def dot_product_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  bias: ArrayLike | None = None,
  mask: ArrayLike | None = None,
  *,
  kind: str = "sigmoid",
  logit_bias: ArrayLike | None = None,
  query_logit_bias: ArrayLike | None = None,
  key_logit_bias: ArrayLike | None = None,
  paired_biases: bool = False,
  n: float | None = None,
  normalize: bool = False,
  alibi_slopes: ArrayLike | None = None,
  scale: ArrayLike | None = None,
  is_causal: bool = False,
  query_offset: ArrayLike | None = None,
  query_seq_lengths: ArrayLike | None = None,
  key_value_seq_lengths: ArrayLike | None = None,
  query_segment_ids: ArrayLike | None = None,
  key_value_segment_ids: ArrayLike | None = None,
  local_window_size: int | tuple[int | None, int | None] | None = None,
  implementation: str | None = None,
  return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """out = phi(scale q k^T + bias + alibi + b + b_i + b_j) v, as in jax.nn.

  kind      phi(z)           b by default   source
  sigmoid   1 / (1 + e^-z)   -log n         2409.04431
  softmax   over the row     none           jax.nn's
  relu      max(z, 0) / n    0              2309.08586
  relu2     max(z, 0)^2 / n  0              2309.08586
  silu      z sigmoid(z) / n 0              2402.17152 (HSTU)

  The arguments of jax.nn.dot_product_attention have the same meaning here.
  A row that sees no key is zero. With softmax it is so only in the decode
  kernel. docs/jax_nn.md lists where the arguments differ from those of jax.nn.

  The table says what computes a derivative. Reverse mode is jax.grad, vjp and
  jacrev; forward mode is jvp, jacfwd and linearize; second order is one of them
  applied to another. "Portable" means plain JAX over blocks of keys.

  implementation      reverse         forward       second order
  xla                 its own pass    portable      portable
  triton              kernels         portable      portable
  mosaic              kernels         portable      portable
  softmax by xla      jax.nn's        jax.nn's      jax.nn's
  softmax by cudnn    jax.nn's        none in jax   none in jax
  softmax by triton   jax.nn's        jax.nn's      jax.nn's

  Args:
    query: (B, T, N, H) or (T, N, H); float16, bfloat16, float32 or float64.
    key, value: (B, S, K, H) or (S, K, H), of the query's dtype. With a query of
      16 or 32 bits, both may be float8_e4m3fn: a cache in 8 bits, see
      sigattn.attention.saturated. The result is that of keys and values that
      were cast to the query's dtype. The decode kernel casts them after it has
      read them; all other implementations get a copy that was cast before.
    bias: (B, N, T, S), axes of 1 broadcast; is added to the logits. A bias that
      broadcasts over queries or over keys costs the kernels no more than
      query_logit_bias and key_logit_bias do; any other takes the portable form.
    mask: the same shapes, bool; True where the query sees the key. A mask of
      keys for each example, (B, S), is given as mask[:, None, None, :].
    kind: one of KINDS.
    logit_bias: b. A float, or an array (), (N,) or (B, N), which has a
      gradient. None: as in the table. One number for each example, (B,), is
      given as logit_bias[:, None] broadcast to (B, N), because an array of one
      axis is (N,), also where B = N. Softmax refuses it, because it cancels b.
    query_logit_bias: b_i, (T,), (N, T) or (B, N, T), where B and N may be 1.
      One number for each query, with a gradient: a threshold that grows with
      the position, or one half of a forget gate (2503.02130). Softmax refuses
      it, because it cancels b_i.
    key_logit_bias: b_j, (S,), (N, S) or (B, N, S). One number for each key,
      with a gradient; -inf hides a key. N may be 1: one number for each key of
      each example, (B, S), is given as key_logit_bias[:, None, :]. An array of
      two axes is (N, S), also where B = N.
    paired_biases: set it if query_logit_bias and key_logit_bias are c_i and
      -c_j of one gate. In 16 bits with `normalize`, the gradient of c, which is
      the difference of both gradients, is then exact where it is summed over
      tokens. Without it, each of the two gradients alone is as exact as it can
      be. It is refused without both arrays.
    n: the key length that b and ReLU's divisor are made for. None: S, padding
      included. A model passes its own longest length, so that training and
      evaluation at another length agree. Softmax ignores it.
    normalize: divides the weights of a row by their sum over the keys that it
      sees. The sum needs no maximum and no rescaling. Let u be a logit without
      b, so that phi gets z = u + b. Then b becomes a soft clip: a row of
      sigmoid is softmax of u that is clipped softly at -b, and becomes softmax
      of u as b falls. Weights below float32's smallest normal number (z below
      -87) count as 0. A row whose z are all near -87 loses precision. A row is
      zero if all its z are below -87, or if it sees no key. Softmax refuses it,
      because its rows are normalised already, and so do kinds whose weights may
      be negative.
    alibi_slopes: a number, (N,) or (B, N): subtracts slope * |i - j| from the
      logit of query i and key j (2108.12409), where i counts from query_offset
      on. A negative slope favours far keys. Unlike softmax, sigmoid does not
      cancel a constant of the row, so the full distance matters.
    scale: multiplies q k^T; None: 1 / sqrt(H). A traced scale has a gradient.
      It multiplies the query in float32, and the product is rounded to the
      query's dtype. With softmax by xla it multiplies the logits, as in jax.nn.
    is_causal: query i sees the keys j <= i. A decoding step needs query_offset
      too: without it its one query is query 0, as in jax.nn, and sees key 0.
    query_offset: an integer or (B,) integers, the position of the first query
      among the keys, for is_causal, local_window_size and alibi_slopes alike:
      the queries are i = query_offset .. query_offset + T - 1, the keys are
      j = 0 .. S - 1. A decoding step writes the key and the value of its token
      into slot `pos` of the cache, and passes query_offset=pos. Queries that
      lie before all keys have a negative offset. Queries may also lie beyond
      all keys (an offset of S or more), if the keys are only an earlier part of
      the text; is_causal then hides no key. An array may be traced. Each
      Python number is compiled into a program of its own. None: i begins at 0
      for is_causal and local_window_size, as in jax.nn, but at S - T for
      alibi_slopes, so that the last query and the last key have distance 0.
      An offset is refused without any of the three, because it would have no
      effect.
    query_seq_lengths, key_value_seq_lengths: (B,) integers, from 0 to T and
      from 0 to S. Tokens beyond a length are not seen and get no gradient; they
      may contain NaN. Other lengths are refused in lists and NumPy arrays, but
      not in jax arrays: reading their numbers would wait for the device.
    query_segment_ids, key_value_segment_ids: (B, T) and (B, S) integers, of
      sequences packed into one row; a query sees the keys of its own id.
    local_window_size: w or (left, right): query i sees i - left to i + right;
      None: all keys on that side.
    implementation: a name of sigattn.attention.implementations(kind); None: the
      fastest one that supports the problem. "triton" with softmax is the decode
      kernel, for at most 16 queries, where a row that sees no key is zero. On a
      GPU, None takes it for at most 16 queries against 128 keys or more.
    return_residual: also returns what the rows were divided by. With softmax
      it is jax.nn's log-sum-exp. With `normalize` it is the sum s of a row's
      weights, by which results for shards of the keys can be joined:
      sum_i s_i out_i / sum_i s_i, where the sum of s_i is not 0. All shards
      need the same n or logit_bias: the default n is the length of the shard.
      docs/operation.md has an example. It is refused without either.

  Returns:
    An array with the shape and dtype of query; with return_residual also
    (B, T, N) or (T, N), float32 with `normalize`. Both have a gradient.

  Raises:
    ValueError: for arguments that make no sense.
    NotImplementedError: if the named implementation cannot compute this.
  """
  normalize, is_causal = flags(normalize=normalize, is_causal=is_causal)
  (return_residual,) = flags(return_residual=return_residual)
  (paired_biases,) = flags(paired_biases=paired_biases)
  if paired_biases and (query_logit_bias is None or key_logit_bias is None):
    raise ValueError(
      f"{paired_biases=}; needs query_logit_bias and key_logit_bias: give "
      "False, or both"
    )
  validate_kind(kind, implementation, normalize)
  if return_residual and kind != "softmax" and not normalize:
    raise ValueError(
      f"{return_residual=}; rows are divided by nothing with {kind=} and "
      f"{normalize=}: give False, or normalize=True"
    )
  depends_on_position(query_offset, is_causal, local_window_size, alibi_slopes)
  query, key = as_array("query", query), as_array("key", key)
  value = as_array("value", value)
  shape = query.shape
  if query.ndim == 3:
    query, key, value = (_unsqueeze(x, 4) for x in (query, key, value))
  if query.ndim != 4 or key.ndim != 4:
    raise ValueError(
      f"query.shape={shape}, key.shape={key.shape}; must be (B, T, N, H) and "
      "(B, S, K, H), or both without B"
    )
  operands = _operands(
    query,
    key,
    bias=bias,
    mask=mask,
    alibi_slopes=alibi_slopes,
    query_logit_bias=query_logit_bias,
    key_logit_bias=key_logit_bias,
    query_seq_lengths=query_seq_lengths,
    key_value_seq_lengths=key_value_seq_lengths,
    query_segment_ids=query_segment_ids,
    key_value_segment_ids=key_value_segment_ids,
  )
  operands, offset = _with_offset(operands, query_offset, query.shape[0])
  query, scale = _with_scale(
    scale, query, keep=kind == "softmax" and implementation in (None, "xla")
  )
  masks = dict(
    is_causal=is_causal,
    local_window_size=local_window_size,
    query_offset=offset,
  )
  if kind == "softmax":
    _refuse_biases(kind, logit_bias, query_logit_bias)
    _length(n, key)  # refuses a bad n; softmax normalises by itself
    problem = problem_of(  # It refuses what makes no sense.
      query, key, value, operands, kind=kind, logit_bias=0.0, normalizer=1.0,
      scale=1.0 if isinstance(scale, jax.core.Tracer) else scale,
      is_causal=is_causal, window=local_window_size, query_offset=offset,
    )  # fmt: skip
    out, residual = _softmax(
      problem, scale, implementation, query, key, value, operands,
      return_residual,
    )  # fmt: skip
  else:
    out, residual = _pointwise(
      query, key, value, operands, kind=kind, logit_bias=logit_bias,
      n=_length(n, key), normalize=normalize, scale=scale,
      implementation=implementation, return_residual=return_residual,
      paired=paired_biases, **masks,
    )  # fmt: skip
  out = out.reshape(shape)
  return (out, residual.reshape(shape[:-1])) if return_residual else out


def saturated(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """x in the dtype of a cache; too large numbers become the largest ones.

  float8_e4m3fn has 4 bits of exponent and 3 of mantissa (2209.05433, Section
  3). It rounds numbers from 2^-6 to 448 with a relative error of at most 2^-4,
  and smaller ones with an error of at most 2^-10. It has no infinity, so that
  astype makes numbers beyond 464 NaN. Here they become 448. NaN stays NaN.
  """
  dtype = jnp.dtype(dtype)
  if dtype == x.dtype:
    return x
  largest = float(jnp.finfo(dtype).max)
  return jnp.clip(x, -largest, largest).astype(dtype)


class Weights(NamedTuple):
  """All that dot_product_attention computes before it uses the values."""

  logits_BNTS: jax.Array  # float32: scale q k^T + bias + alibi + b, all pairs
  weights_BNTS: jax.Array  # float32: phi of them, 0 where not visible
  visible_BNTS: jax.Array  # bool


def attention_weights(
  query: ArrayLike,
  key: ArrayLike,
  *,
  kind: str = "sigmoid",
  logit_bias: ArrayLike | None = None,
  n: float | None = None,
  normalize: bool = False,
  scale: ArrayLike | None = None,
  is_causal: bool = False,
  local_window_size: int | tuple[int | None, int | None] | None = None,
  query_offset: ArrayLike | None = None,
  paired_biases: bool = False,
  **operands: ArrayLike | None,
) -> Weights:
  """The weights A, for inspection: dot_product_attention's output is A v.

  Returns the named tuple (logits_BNTS, weights_BNTS, visible_BNTS), whose
  weights_BNTS is A. All weights are in memory at once. The arguments are those
  of dot_product_attention, with a batch axis; operands: its arrays, from `bias`
  to `key_value_segment_ids`. paired_biases has no effect, because it concerns
  gradients alone.

  Raises:
    TypeError: for an argument of another name.
    ValueError: as dot_product_attention; and for arrays without a batch axis.
  """
  own = inspect.signature(attention_weights).parameters.keys() - {"operands"}
  _refuse_unknown(
    "attention_weights", operands, [*own, *dispatch.Operands._fields]
  )
  normalize, is_causal = flags(normalize=normalize, is_causal=is_causal)
  flags(paired_biases=paired_biases)
  query, key = as_array("query", query), as_array("key", key)
  for name, x in (("query", query), ("key", key)):
    if x.ndim != 4:
      raise ValueError(
        f"{name}.shape={x.shape}; must have four axes: batch, length, heads, "
        f"head width" + f" (give {name}[None])" * (x.ndim == 3)
      )
  depends_on_position(
    query_offset, is_causal, local_window_size,
    operands.get("alibi_slopes"),
  )  # fmt: skip
  _validate_normalize(kind, normalize)
  is_softmax = kind == "softmax"
  query, arrays, numbers = prepare(
    query, key, kind=kind, logit_bias=logit_bias, n=n, scale=scale,
    query_offset=query_offset, **operands,
  )  # fmt: skip
  weights = Weights(
    *dispatch.weights(
      query,
      key,
      arrays,
      kind="sigmoid" if is_softmax else kind,  # the logits are the same
      normalize=normalize,
      is_causal=is_causal,
      local_window_size=local_window_size,
      **numbers,
    )
  )
  if not is_softmax:
    return weights
  weights_BNTS = jax.nn.softmax(weights.logits_BNTS, where=weights.visible_BNTS)
  # jax.nn's weights are NaN in a row that sees nothing.
  weights_BNTS = jnp.where(weights.visible_BNTS, weights_BNTS, 0)
  return weights._replace(weights_BNTS=weights_BNTS)


def prepare(
  query: jax.Array,
  key: Any,
  *,
  kind: str,
  logit_bias: ArrayLike | None,
  n: float | None,
  scale: ArrayLike | None,
  query_offset: ArrayLike | None,
  **operands: ArrayLike | None,
) -> tuple[jax.Array, dispatch.Operands, dict[str, Any]]:
  """Converts dot_product_attention's arguments for the functions of `kernels`.

  Args:
    query: (B, T, N, H).
    key: (B, S, K, H), or anything of that shape.
    kind, logit_bias, n, scale, query_offset, operands: as in
      dot_product_attention.

  Returns:
    (query, Operands, {"scale", "query_offset", "logit_bias", "normalizer"}).
  """
  if kind == "softmax":
    _refuse_biases(kind, logit_bias, operands.get("query_logit_bias"))
    logit_bias = 0.0
  query, scale = _with_scale(scale, query)
  arrays = _operands(query, key, **operands)
  arrays, offset = _with_offset(arrays, query_offset, query.shape[0])
  arrays, numbers = _bias_and_divisor(
    query, arrays, kind, logit_bias, _length(n, key)
  )
  return query, arrays, numbers | dict(scale=scale, query_offset=offset)


def depends_on_position(
  query_offset: ArrayLike | None,
  is_causal: bool,
  local_window_size: Any,
  alibi_slopes: ArrayLike | None,
) -> bool:
  """Whether an argument uses the positions of the queries.

  Raises:
    ValueError: for an offset that would have no effect, and for a window that
      is traced.
  """
  _refuse_traced("local_window_size", local_window_size)
  sides = local_window_size
  sides = sides if isinstance(sides, (tuple, list)) else (sides,)
  if is_causal or alibi_slopes is not None or any(x is not None for x in sides):
    return True
  if query_offset is not None:
    raise ValueError(
      f"{query_offset=}; has no effect without is_causal, "
      "local_window_size or alibi_slopes: a decoding step needs is_causal=True"
    )
  return False


def flags(**arguments: Any) -> list[bool]:
  """The arguments as bools. Raises ValueError for anything else."""
  return [_flag(name, x) for name, x in arguments.items()]


def _flag(name, x):
  _refuse_traced(name, x)
  is_array = isinstance(x, (np.ndarray, jax.Array))
  if is_array and x.dtype == bool and x.shape == ():
    return bool(x)
  if not isinstance(x, (bool, np.bool_)):
    raise ValueError(f"{name}={x!r}; must be True or False")
  return bool(x)


def _refuse_traced(name, x):
  """Refuses what a program is compiled for, if it is not known yet."""
  if any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(x)):
    raise ValueError(
      f"{name}={x}; must be a Python value, not a traced array: bind it with "
      f"functools.partial, or give jax.jit static_argnames={name!r}"
    )


def as_array(name: str, x: ArrayLike) -> jax.Array:
  """jnp.asarray(x). Raises ValueError for what is no array of numbers."""
  try:
    return jnp.asarray(x)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{name}={x!r}; must be an array of numbers") from error


def problem_of(*arrays: Any, kind: str, **options: Any) -> Problem:
  """make_problem, extended to softmax; the result then has kind="softmax"."""
  if kind != "softmax":
    return make_problem(*arrays, kind=kind, **options)
  problem = make_problem(*arrays, kind="sigmoid", **options)
  return dataclasses.replace(problem, kind=kind, normalize=True)


def computed(
  problem: Problem,
  implementation: str | None,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: dispatch.Operands,
) -> jax.Array:
  """dot_product_attention, given what `prepare` and `problem_of` return."""
  arrays = query, key, value, operands
  if problem.kind == "softmax":
    return _softmax(problem, problem.scale, implementation, *arrays)[0]
  out = dispatch.attention(
    *arrays,
    kind=problem.kind,
    scale=problem.scale,
    logit_bias=problem.logit_bias,
    normalizer=problem.normalizer,
    normalize=problem.normalize,
    is_causal=problem.is_causal,
    local_window_size=problem.window,
    query_offset=problem.query_offset,
    implementation=implementation,
  )
  return out[0] if problem.normalize else out


def flax_attention_fn(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  bias: ArrayLike | None = None,
  mask: ArrayLike | None = None,
  *,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  broadcast_dropout: bool = True,
  deterministic: bool = True,
  dtype: DTypeLike | None = None,
  precision: Any = None,
  module: Any = None,
  force_fp32_for_softmax: bool = False,
  input_positions: ArrayLike | None = None,
  qk_attn_weights_einsum: Any = None,
  attn_weights_value_einsum: Any = None,
  **options: Any,
) -> jax.Array:
  """dot_product_attention as `attention_fn` of Flax's own attention layers.

  It serves flax.nnx.MultiHeadAttention and flax.linen's
  MultiHeadDotProductAttention. Bind another kind, or any other option of
  dot_product_attention, with functools.partial:

    functools.partial(sigattn.flax_attention_fn, kind="relu", n=1024)

  Do not bind is_causal for nnx: its layer passes is_causal in every call, False
  by default, and that replaces the bound one. Give it to the call of the layer,
  or bind local_window_size=(None, 0), which hides the same keys.

  With decode=True Flax's layers pass one query, the whole cache, and a mask
  that hides the slots that are not filled yet. That mask is causal already, so
  is_causal must be False there. (nnx of Flax 0.12.12 passes False in a step
  whatever the call says, and that of 0.12.10 passes what the call says.) Bind
  n, because its default is the length of the cache. ALiBi and windows need the
  position of the query, which Flax does not pass: sigattn.SelfAttention with
  its cache does that.

  Args:
    query: (..., T, N, H), with any number of batch axes.
    key, value: (..., S, K, H).
    bias: (..., N, T, S); axes of 1 broadcast.
    mask: the same shapes, of bools, or of zeros and ones in any dtype, as
      Flax's mask functions return it; a key is visible where the mask is not 0.
    dropout_rate, deterministic: attention weights are never dropped here, so a
      rate > 0 needs deterministic=True.
    dtype: query, key and value are cast to it first; None: they are not cast.
    precision: of the products, as jax.default_matmul_precision takes it.
    module: given if Flax asks for the weights (sow_weights=True). They are then
      computed a second time, all at once, and sown as Flax does.
    dropout_rng, broadcast_dropout, force_fp32_for_softmax: have no effect; the
      logits and their activation are always float32.
    input_positions, qk_attn_weights_einsum, attn_weights_value_einsum: must be
      None. Rotate query and key before this function.
    options: of dot_product_attention. A trainable array must belong to a
      module that is given as attention_fn; docs/operation.md has an example.

  Returns:
    An array with the shape of query.

  Raises:
    ValueError: for active dropout; for an argument that must be None and is
      not; for an nnx.Variable, which would not be trained; for a mask with
      other known numbers than 0 and 1; and for one query against a masked
      cache with is_causal, local_window_size or alibi_slopes but without
      query_offset, because jax.nn would put the query at key 0.
    TypeError: for an option that dot_product_attention does not have.
  """
  del dropout_rng, broadcast_dropout, force_fp32_for_softmax
  known = inspect.signature(dot_product_attention).parameters
  _refuse_unknown("flax_attention_fn", options, known)
  if dropout_rate and not deterministic:
    raise ValueError(
      f"{dropout_rate=}; attention weights are not dropped here: give 0, or "
      "deterministic=True"
    )
  if options.get("return_residual"):
    raise ValueError(
      "return_residual=True; Flax's layers take one array: give False"
    )
  unknown = dict(
    input_positions=input_positions,
    qk_attn_weights_einsum=qk_attn_weights_einsum,
    attn_weights_value_einsum=attn_weights_value_einsum,
  )
  for name, argument in unknown.items():
    if argument is not None:
      raise ValueError(f"{name}={argument!r}; must be None")
  _refuse_variables(options)
  query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
  _refuse_unknown_place(query, key, mask, options)
  _refuse_mask_of_numbers(mask)
  shape, lead = query.shape, query.shape[:-3]
  query, key, value = (
    x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)
  )
  bias, mask = (_fold_batch(x, lead) for x in (bias, mask))
  mask = None if mask is None else mask != 0
  with _matmul_precision(precision):
    if module is not None:
      _sow_weights(module, lead, query, key, bias=bias, mask=mask, **options)
    out = dot_product_attention(query, key, value, bias, mask, **options)
  return out.reshape(shape)


def _refuse_unknown(function, options, known):
  """Refuses names that are not known, by the name of the function."""
  for name in options:
    if name not in known:
      close = difflib.get_close_matches(name, known)
      # A whole word that is right says more than a letter: key_seq_lengths.
      word = name.partition("_")[0]
      close.sort(key=lambda x: x.partition("_")[0] != word)
      raise TypeError(
        f"{function}() got an unexpected keyword argument {name!r}"
        + (f": did you mean {close[0]!r}?" if close else "")
      )


def _refuse_unknown_place(query, key, mask, options):
  """Refuses a step of Flax's decoding that needs the position of its query."""
  decodes = mask is not None and query.shape[-3] == 1 < key.shape[-3]
  if not decodes or options.get("query_offset") is not None:
    return
  given = [x for x in ("local_window_size", "alibi_slopes") if x in options]
  given = [x for x in given if options[x] is not None]
  given += ["is_causal"] if options.get("is_causal") else []
  if not given:
    return
  advice = "give is_causal=False in this step, since the mask hides the future"
  if given != ["is_causal"]:
    advice = (
      "give query_offset, the slot of the new token; Flax's layers do not pass "
      "it, but sigattn.SelfAttention with its cache does"
    )
  raise ValueError(
    f"{', '.join(given)} with 1 query, {key.shape[-3]} keys and a mask, as "
    f"Flax's decode=True gives them, whose query is not at key 0: {advice}"
  )


def _refuse_variables(options):
  """Refuses what functools.partial hides from the parameters of a layer."""
  nnx = sys.modules.get("flax.nnx")  # Without it there is no Variable.
  for name, x in options.items():
    if nnx is not None and isinstance(x, nnx.Variable):
      raise ValueError(
        f"{name} is an nnx.{type(x).__name__}; if functools.partial binds it, "
        "it is not trained: give attention_fn an nnx.Module that has it and "
        f"passes {name}=self.{name}[...], as docs/operation.md shows"
      )


def _refuse_mask_of_numbers(mask):
  """Refuses 0 and -1e9, which are numbers to add to the logits."""
  is_known = mask is not None and not isinstance(mask, jax.core.Tracer)
  if not is_known or not getattr(mask, "is_fully_addressable", True):
    return
  numbers = np.asarray(mask)
  wrong = numbers[(numbers != 0) & (numbers != 1)]
  if wrong.size:
    raise ValueError(
      f"mask has the number {wrong.flat[0]}; must be bool, or 0 (hidden) and 1 "
      "(visible): numbers that are added to the logits are a bias"
    )


def _sow_weights(module, lead, query, key, *, implementation=None, **options):
  from flax import nnx  # It is installed, because it called this function.

  del implementation  # The specification computes the weights.
  weights_BNTS = attention_weights(query, key, **options).weights_BNTS
  is_nnx = isinstance(module, nnx.Module)
  module.sow(
    nnx.Intermediate if is_nnx else "intermediates",
    "attention_weights",
    weights_BNTS.reshape(*lead, *weights_BNTS.shape[1:]),
  )


def _fold_batch(x, lead):
  """Turns (..., N, T, S) into (B, N, T, S); fewer axes are left as they are."""
  if x is None:
    return None
  x = jnp.asarray(x)
  if x.ndim <= 3:
    return x
  if all(size == 1 for size in x.shape[:-3]):
    return x.reshape(1, *x.shape[-3:])
  x = jnp.broadcast_to(x, (*lead, *x.shape[-3:]))
  return x.reshape(-1, *x.shape[-3:])


def _matmul_precision(precision):
  if precision is None:
    return contextlib.nullcontext()
  if isinstance(precision, jax.lax.Precision):
    precision = precision.name.lower()
  return jax.default_matmul_precision(precision)


def _refuse_biases(kind, logit_bias, query_logit_bias):
  if logit_bias is not None:
    raise ValueError(
      f"{logit_bias=} with {kind=}: softmax cancels a constant of the row; "
      "give None"
    )
  if query_logit_bias is not None:
    raise ValueError(
      f"query_logit_bias of shape {jnp.shape(query_logit_bias)} with {kind=}: "
      "softmax cancels a constant of the row; give None"
    )


def _with_scale(scale, query, *, keep=False):
  """(query, scale), where scale is a number that kernels are compiled for.

  A traced scale is multiplied into the query, or returned if `keep` is set.
  """
  if not query.shape[3]:
    raise ValueError(f"query.shape={query.shape}; the head width must be > 0")
  usual = 1 / math.sqrt(query.shape[3])
  if scale is None:
    return query, usual
  if not isinstance(scale, jax.core.Tracer):
    return query, _number("scale", scale)
  if scale.shape or not jnp.issubdtype(scale.dtype, jnp.floating):
    raise ValueError(f"scale={scale}; must be a float, or a traced () array")
  if keep:
    return query, scale
  dtype = numerics.wide(query.dtype)
  factor = scale.astype(dtype) * math.sqrt(query.shape[3])
  wide = query.astype(dtype)
  # Hidden queries may be NaN, and the factor's gradient sums over all queries.
  finite = jnp.isfinite(wide)
  scaled = jnp.where(finite, jnp.where(finite, wide, 0) * factor, wide)
  return scaled.astype(query.dtype), usual


def _number(name, x):
  """x as a finite float."""
  try:
    # float() would also take "128" and True.
    number = (
      math.nan if isinstance(x, (str, bytes, bool, np.bool_)) else float(x)
    )
  except (TypeError, ValueError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f"{name}={x!r}; must be a finite number")
  return number


def _length(n, key):
  """n as a float, or a dimension that jax.export leaves open."""
  if n is None and symbolic(key.shape[1]):
    return key.shape[1]
  if n is None:
    return float(key.shape[1] or 1)  # Without keys there is nothing to divide.
  _refuse_traced("n", n)
  number = _number("n", n)
  if not number > 0:
    raise ValueError(f"{n=}; must be > 0")
  return number


def _operands(
  query,
  key,
  *,
  bias=None,
  mask=None,
  alibi_slopes=None,
  query_logit_bias=None,
  key_logit_bias=None,
  **integers,
):
  """dispatch.Operands, made from arrays that may lack leading axes."""
  if isinstance(bias, str):
    raise ValueError(
      f"{bias=}; must be an array. `kind` is a keyword argument: kind={bias!r}"
    )
  heads, length, keys = _heads(query), query.shape[1], key.shape[1]
  logits = *heads, length, keys
  batch = query.shape[0]
  full = {
    "query_seq_lengths": (batch,),
    "key_value_seq_lengths": (batch,),
    "query_segment_ids": (batch, length),
    "key_value_segment_ids": (batch, keys),
  }
  sizes = {"query_seq_lengths": length, "key_value_seq_lengths": keys}
  for name, most in sizes.items():
    _check_lengths(name, integers.get(name), most)
  return dispatch.Operands(
    bias=_fitted("bias", _float("bias", bias), logits),
    mask=_fitted("mask", mask, logits),
    alibi_slopes=_per_head(
      "alibi_slopes", _float("alibi_slopes", alibi_slopes), heads
    ),
    query_logit_bias=_fitted(
      "query_logit_bias",
      _float("query_logit_bias", query_logit_bias),
      (*heads, length),
    ),
    key_logit_bias=_fitted(
      "key_logit_bias", _float("key_logit_bias", key_logit_bias), (*heads, keys)
    ),
    **{
      name: _of_each_row(name, _int32(name, x), full[name])
      for name, x in integers.items()
    },
  )


def _of_each_row(name, x, full):
  """x of the shape `full`, whose first axis it lacks in a call without B."""
  if x is None:
    return None
  shape = (1,) * (len(full) - x.ndim) + x.shape
  if not fits(shape, full, ()):
    raise ValueError(f"{name}.shape={x.shape}; must be {full}")
  return x.reshape(shape)


def _fitted(name, x, full):
  """x with leading axes of 1, so that it broadcasts to `full`."""
  if x is None:
    return None
  x = as_array(name, x)
  shape = (1,) * (len(full) - x.ndim) + x.shape
  if fits(shape, full, getattr(FREE_AXES, name)):
    return x.reshape(shape)
  batch, _, *lengths = full
  # Users often leave out only the axis of the heads, or also the queries'.
  forms = {(batch, lengths[-1]): ":, None, :"}
  if len(lengths) == 2:
    forms = {
      (batch, lengths[1]): ":, None, None, :",
      (batch, *lengths): ":, None",
    }
    # Or they have an axis for the heads, but not for the queries.
    forms[batch, 1, lengths[1]] = ":, :, None"
  form = forms.get(x.shape)
  raise ValueError(
    f"{name}.shape={x.shape}; must broadcast to {full}"
    + (f": give {name}[{form}]" if form else "")
  )


def _check_lengths(name, x, most):
  """Refuses lengths that are known and that no sequence has."""
  unknown = x is None or isinstance(x, jax.Array) or symbolic(most)
  if unknown or not np.size(x):
    return
  x = np.asarray(x)
  if not np.issubdtype(x.dtype, np.integer):
    return  # _int32 refuses them.
  least, longest = np.min(x), np.max(x)
  if not 0 <= least <= longest <= most:
    raise ValueError(
      f"{name} from {least} to {longest}; must be from 0 to {most}"
    )


def _with_offset(operands, offset, batch):
  """(operands, query_offset); an offset that is an array joins the operands."""
  if offset is None or _is_int(offset):
    return operands, None if offset is None else int(offset)
  array = as_array("query_offset", offset)
  if jnp.issubdtype(array.dtype, jnp.integer):
    array = _int32("query_offset", offset)
  if array.shape not in ((), (batch,)) or not jnp.issubdtype(
    array.dtype, jnp.integer
  ):
    raise ValueError(
      f"query_offset={offset!r}; must be an integer, or ({batch},) integers"
    )
  array = jnp.broadcast_to(array, (batch,))
  return operands._replace(query_offset=array), None


def _float(name, x):
  """x as an array; whole numbers become float32."""
  if x is None:
    return None
  x = as_array(name, x)
  return x.astype("float32") if jnp.issubdtype(x.dtype, jnp.integer) else x


def _int32(name, x):
  """x as int32. Raises ValueError if a number would wrap, as 2**32 + 1 to 1."""
  if x is None:
    return None
  known = not isinstance(x, jax.Array)
  x = np.asarray(x) if known else x
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"{name}.dtype={x.dtype.name}; must be an integer")
  limits = jnp.iinfo("int32")
  if known and x.size and not limits.min <= x.min() <= x.max() <= limits.max:
    raise ValueError(
      f"{name} from {x.min()} to {x.max()}; must fit int32, from {limits.min} "
      f"to {limits.max}"
    )
  if not known and not np.can_cast(x.dtype, "int32"):
    raise ValueError(
      f"{name}.dtype={x.dtype.name}; must be int32, which the kernels compare "
      "(astype, where the numbers fit)"
    )
  return jnp.asarray(x, "int32")


def _is_int(x):
  return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _heads(query):
  """(B, N)."""
  return query.shape[0], query.shape[2]


def default_logit_bias(kind: str, n: float) -> float:
  """The default of b: -log n for sigmoid, 0 for other kinds."""
  return -math.log(n) if kind == "sigmoid" else 0.0


def validate_kind(
  kind: str, implementation: str | None, normalize: bool
) -> None:
  """Raises ValueError for unknown names and for senseless combinations."""
  if kind not in KINDS:
    raise ValueError(f"{kind=}; choose from {KINDS}")
  if implementation not in (None, *implementations(kind)):
    why = ", because cuDNN computes softmax only"
    raise ValueError(
      f"{implementation=}; with {kind=} choose from "
      f"{(None, *implementations(kind))}{why * (implementation == 'cudnn')}"
    )
  _validate_normalize(kind, normalize)


def _validate_normalize(kind, normalize):
  if normalize and (why := cannot_normalize(kind)):
    raise ValueError(f"{normalize=} with {kind=}, {why}; give False")


def _pointwise(
  query, key, value, operands, *, kind, logit_bias, n, normalize,
  local_window_size, implementation, return_residual, **options
):  # fmt: skip
  """(out, row sums or None)."""
  operands, numbers = _bias_and_divisor(query, operands, kind, logit_bias, n)
  options |= numbers | dict(kind=kind, normalize=normalize)
  arrays = query, key, value, operands
  if has_8_bits(query, key, value) and not (
    return_residual or _is_split(query)
  ):
    problem = make_problem(*arrays, window=local_window_size, **options)
    if decoding.has_few_queries(problem) and decoding.takes(
      problem, implementation, otherwise="a cast of the keys"
    ):
      portable = functools.partial(computed, problem, None)
      return decoding.attention(problem, portable, *arrays), None
  result = dispatch.attention(
    *arrays, local_window_size=local_window_size,
    implementation=implementation, **options,
  )  # fmt: skip
  return result if normalize else (result, None)


def _is_split(x):
  """Whether the type of an array says that a mesh splits it."""
  return any(jax.typeof(x).sharding.spec)


def _bias_and_divisor(query, operands, kind, logit_bias, n):
  """The bias b, and the divisor of the activation, in the form of `kernels`.

  Returns (operands, {"logit_bias", "normalizer"}).
  """
  if logit_bias is None and kind == "sigmoid" and symbolic(n):
    logit_bias = -jnp.log(jnp.asarray(n).astype("float32"))
  elif logit_bias is None:
    logit_bias = default_logit_bias(kind, n)
  is_number = isinstance(logit_bias, (int, float, np.number))
  if not is_number or isinstance(logit_bias, bool):
    array = _per_head(
      "logit_bias", _float("logit_bias", logit_bias), _heads(query)
    )
    operands, logit_bias = operands._replace(logit_bias=array), None
  normalizer = 1.0 if kind in ("sigmoid", "softmax") else n
  return operands, dict(logit_bias=logit_bias, normalizer=normalizer)


def _softmax(
  problem, scale, implementation, query, key, value, operands,
  return_residual=False,
):  # fmt: skip
  """(out, log-sum-exp or None)."""
  promotion = jax.config.jax_numpy_dtype_promotion
  if promotion == "strict" and problem.dtype == "bfloat16":
    raise ValueError(
      f"jax_numpy_dtype_promotion={promotion.value!r} with "
      "kind='softmax' and query.dtype=bfloat16: jax cannot lower its own "
      "function then; give 'standard', or float16 or float32 arrays"
    )
  arrays = query, key, value, operands
  if implementation == "triton" and return_residual:
    raise NotImplementedError(
      f"attention {problem}: triton: {return_residual=} is not implemented"
    )
  # Only jax.nn takes a traced factor of the logits, and meshes in the types.
  is_plain = not (return_residual or isinstance(scale, jax.core.Tracer))
  is_plain &= not _is_split(query)
  if is_plain and decoding.takes(problem, implementation, otherwise="jax.nn"):
    portable = functools.partial(_by_jax_nn, problem, scale, None, False)
    return decoding.attention(problem, portable, *arrays), None
  try:
    result = _by_jax_nn(
      problem, scale, implementation, return_residual, *arrays
    )
  except RuntimeError as error:
    ran = isinstance(error, jax.errors.JaxRuntimeError)
    if ran or implementation != "cudnn":
      raise
    raise NotImplementedError(
      f"attention {problem}: cudnn: {error} The device is "
      f"{device.current().kind}; {dispatch.ADVICE}"
    ) from error
  return result if return_residual else (result, None)


def _by_jax_nn(
  problem, scale, implementation, return_residual, query, key, value, operands
):
  """out, or (out, log-sum-exp)."""
  key, value = numerics.widened(query, key, value)
  query_offset, is_causal = problem.query_offset, problem.is_causal
  bias, mask = operands.bias, operands.mask
  length, keys = query.shape[1], key.shape[1]
  if problem.is_symbolic and problem.window:
    query_offset = query_offset or 0  # jax.nn's windows need known sizes.
  place_BTS = _distance_to_keys(query_offset, operands, length, keys)
  if operands.alibi_slopes is not None:
    apart = place_BTS
    if apart is None:
      apart = _distance_to_keys(keys - length, operands, length, keys)
    bias = _sum_of(
      bias,
      -operands.alibi_slopes[:, :, None, None].astype("float32")
      * abs(apart)[:, None].astype("float32"),
    )
  if operands.key_logit_bias is not None:
    bias = _sum_of(bias, operands.key_logit_bias[:, :, None])
  if operands.query_segment_ids is not None:
    same = (
      operands.query_segment_ids[:, :, None]
      == operands.key_value_segment_ids[:, None]
    )[:, None]
    mask = same if mask is None else mask & same
  if place_BTS is not None:  # jax.nn has no offset, so masks become an array.
    seen = _seen(place_BTS, is_causal, problem.window)
    if seen is not None:
      mask = seen[:, None] if mask is None else mask & seen[:, None]
    is_causal, window = False, None
  else:
    is_causal, window = _window_of_jax_nn(problem, implementation)
  # jax.nn promotes 16 bits to 32, which strict promotion would refuse.
  with jax.numpy_dtype_promotion("standard"):
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      bias,
      mask,
      scale=scale,
      is_causal=is_causal,
      local_window_size=window,
      query_seq_lengths=operands.query_seq_lengths,
      key_value_seq_lengths=operands.key_value_seq_lengths,
      implementation=implementation,
      return_residual=return_residual,
    )


def _window_of_jax_nn(problem, implementation):
  """(is_causal, local_window_size) as jax.nn takes them."""
  if problem.window is None:
    return problem.is_causal, None
  left, right = problem.window
  if implementation == "cudnn" and (problem.is_causal or right == 0):
    # Without is_causal, jax gives cuDNN only the left bound, so that queries
    # see the future. With is_causal and lengths, cuDNN refuses a right bound
    # that hides nothing.
    return True, None if left is None else (left, 0)
  far = problem.query_len + problem.key_len
  window = tuple(far if x is None else x for x in (left, right))
  return problem.is_causal, window


def _sum_of(bias, part):
  dtype = numerics.wide(part.dtype)
  part = part.astype(dtype)
  return part if bias is None else bias.astype(dtype) + part


def _distance_to_keys(offset, operands, length, keys):
  """i - j for queries that begin at the offset, (B or 1, T, S).

  None if there is no offset.
  """
  if operands.query_offset is not None:
    offset = operands.query_offset[:, None, None]
  if offset is None:
    return None
  i = jnp.arange(length)[None, :, None] + offset
  return i - jnp.arange(keys)[None, None]


def _seen(apart, is_causal, window):
  """True where a causal mask and a window let i see j; None if everywhere.

  apart: i - j.
  """
  left, right = window or (None, None)
  right = 0 if is_causal else right
  parts = [] if left is None else [apart <= left]
  parts += [] if right is None else [-apart <= right]
  return functools.reduce(jnp.logical_and, parts) if parts else None


def _unsqueeze(x, ndim):
  """x with leading axes of 1, so that it has `ndim` axes; None stays None."""
  if x is None:
    return None
  x = jnp.asarray(x)
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _per_head(name, x, heads):
  """Turns (), (N,) or (B, N) into (1 or B, N); heads: (B, N)."""
  if x is None:
    return None
  x = jnp.asarray(x)
  if x.ndim > 2 or x.shape not in ((), heads[1:], heads):
    raise ValueError(f"{name}.shape={x.shape}; must be {heads[1:]} or {heads}")
  return jnp.broadcast_to(x, heads[1:])[None] if x.ndim < 2 else x
