"""Transformer blocks: attention, MLP, residual branches, a scanned stack.

Parameters are float32. Their initial values are

  kernel              argument `kernel_init`, over all inputs and all outputs:
                      Xavier uniform, as in ViT, or FAN_IN_INIT
  bias                0, of linear layers and of LayerNorm
  norm's scale        1
  LayerScale's scale  its argument `init`, everywhere
  logit_bias          the default of attention: -log n for sigmoid, else 0
  ForgetGate's bias   FORGET_BIAS

Activations have the constructor's `dtype`. Norms are computed in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import layout
from jax.typing import ArrayLike, DTypeLike

from sigattn import attention, extras, paged, positions

extras.require("layers")

from flax import nnx

NORMS = {"layernorm": nnx.LayerNorm, "rmsnorm": nnx.RMSNorm}
# The defaults. That of rmsnorm is AXLearn's.
EPSILONS = {"layernorm": 1e-6, "rmsnorm": 1e-5}
NORM_PLACES = ("pre", "post", "hybrid")
QK_NORMS = ("none", *NORMS)

# A scan copies slices of the parameters, and activations, at every step. With
# 128 images of 49 tokens at width 96, on two CPU cores, a scanned training step
# takes 1.28 times as long as an unrolled one at depth 3, 1.13 at 6, and 1.05 at
# 12 (2026-11-23). So a small stack is unrolled. The program of an unrolled
# stack grows with the depth.
MAX_UNROLLED = 6

# The results of matrix products and of attention, which a layer may keep for
# the backward pass.
ACTIVATIONS = (
  "query", "key", "value", "attention", "out", "gate", "up", "down",
)  # fmt: skip

KERNEL_INIT = nnx.initializers.xavier_uniform()
FAN_IN_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")

# That of the study in docs/science.md. Gates are then nearly open at the start:
# sigmoid(3) is 0.953, so that the logit of a key loses 1 in about 20 tokens.
FORGET_BIAS = 3.0


def _choose(name, value, choices):
  if value not in choices:
    raise ValueError(f"{name}={value!r}; choose from {sorted(choices)}")


def make_norm(
  kind: str, width: int, rngs: nnx.Rngs, epsilon: float | None = None
) -> nnx.Module:
  """LayerNorm (1607.06450) or RMSNorm (1910.07467), in float32.

  epsilon: is added to the variance or mean square; None: from EPSILONS.
  """
  _choose("norm_kind", kind, NORMS)
  epsilon = EPSILONS[kind] if epsilon is None else epsilon
  return NORMS[kind](width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def normalize(norm: nnx.Module, x: jax.Array) -> jax.Array:
  """norm(x) in x's dtype, computed in float32."""
  return norm(x).astype(x.dtype)


class Cache(NamedTuple):
  """Keys and values of the tokens so far, and the sums of their forget gates.

  They have the dtype of the activations, or are rounded to float8_e4m3fn, see
  attention.saturated. Every query attends to the rounded ones, so that the
  result does not depend on how many tokens are read at a time.

  The token at position s of a row is in slot s of that row. A Cache belongs to
  one SelfAttention. The cache of a Stack is a tuple with one Cache for each
  layer, so that each layer writes its own arrays in place.

  A paged cache has the same arrays with other axes: P pages of L tokens take
  the place of rows and slots. A table (B, M) says which pages a row has.
  """

  key_BSKH: jax.Array
  value_BSKH: jax.Array
  forgotten_BSN: jax.Array | None = None  # float32, see ForgetGate; or no gate


class SelfAttention(nnx.Module):
  """(phi(q k^T / sqrt(H) + b) v) W_out, phi by `kind` (2409.04431, Section 2).

  q = rotate(norm(x W_q)), k = rotate(norm(x W_k)), v = x W_v.

  Args:
    width: D. num_heads: N. num_kv_heads: K, a divisor of N; None: N
      (2305.13245).
    max_length: the n of sigmoid's default bias -log n and of ReLU's 1 / n. It
      is constant, whatever the length of an input.
    kind: one of attention.KINDS.
    logit_bias: b; None: the kind's default. learn_logit_bias: trains one b for
      each head, which starts from that value. Softmax refuses both.
    normalize: divides a row's weights by their sum, see
      attention.dot_product_attention. Softmax refuses it.
    qk_norm: none, layernorm or rmsnorm, of q and k over the head width.
    norm_epsilon: as in make_norm.
    alibi: adds ALiBi's distance penalty (2108.12409) to the logits.
    window: a token sees itself, `window` tokens before it and, unless
      is_causal is set, `window` tokens after it. None: all tokens.
    rotate: a function of x_BTNH that is applied to q and to k, for example
      RoPE. It also gets `positions` if the call has them. None: no function.
    row_power: p of the row scaling i^-p, where i is the number of keys that the
      row sees: an alternative to sigmoid's bias. 0: no scaling. It needs
      is_causal, and `positions` in the call.
    forget_gate: adds c_i - c_j to the logit of query i and key j, see
      ForgetGate. It needs is_causal.
    implementation: as in attention.dot_product_attention.

  Raises:
    ValueError: for an unknown choice; if num_heads does not divide width, or
      num_kv_heads does not divide num_heads; for a logit bias with softmax; for
      row_power without is_causal or with a window; for forget_gate without
      is_causal; for a dtype that is no float; and for a `rotate` that is no
      function.
  """

  def __init__(
    self,
    width: int,
    num_heads: int,
    *,
    max_length: int,
    kind: str = "sigmoid",
    num_kv_heads: int | None = None,
    logit_bias: float | None = None,
    learn_logit_bias: bool = False,
    normalize: bool = False,
    qk_norm: str = "none",
    norm_epsilon: float | None = None,
    alibi: bool = False,
    is_causal: bool = False,
    window: int | None = None,
    use_bias: bool = True,
    kernel_init: nnx.Initializer = KERNEL_INIT,
    rotate: Callable[..., jax.Array] | None = None,
    row_power: float = 0.0,
    forget_gate: bool = False,
    implementation: str | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    _check_heads(width, num_heads, kv_heads)
    _choose("kind", kind, attention.KINDS)
    _choose("qk_norm", qk_norm, QK_NORMS)
    _check_logit_bias(kind, logit_bias, learn_logit_bias)
    _validate_dtype(dtype)
    if rotate is not None and not callable(rotate):
      raise ValueError(
        f"{rotate=}; must be None or a function of x_BTNH, such as "
        "sigattn.positions.rope"
      )
    if kind == "softmax" and normalize:
      raise ValueError(
        f"{normalize=}; must be False where {kind=}: set config.attn.normalize="
        "False"
      )
    if row_power and not is_causal:
      raise ValueError(f"{row_power=}; must be 0 where {is_causal=}")
    if row_power and window is not None:
      raise ValueError(f"{row_power=}; must be 0 where {window=}")
    if forget_gate and not is_causal:
      raise ValueError(f"{forget_gate=}; must be False where {is_causal=}")
    self.kind, self.max_length = kind, max_length
    self.num_heads, self.num_kv_heads = num_heads, kv_heads
    self.head_width = width // num_heads
    self.normalize = normalize
    self.alibi, self.is_causal, self.window = alibi, is_causal, window
    self.rotate, self.row_power = rotate, row_power
    self.implementation = implementation
    # Telemetry replaces this, to record what every layer passes to attention.
    self.attention_fn = attention.dot_product_attention
    head_width = self.head_width
    linear = functools.partial(
      nnx.LinearGeneral,
      kernel_init=kernel_init,
      use_bias=use_bias,
      dtype=dtype,
      rngs=rngs,
    )
    self.query = linear(width, (num_heads, head_width))
    self.key = linear(width, (kv_heads, head_width))
    self.value = linear(width, (kv_heads, head_width))
    self.out = linear((num_heads, head_width), width, axis=(-2, -1))
    if qk_norm != "none":
      self.query_norm = make_norm(qk_norm, head_width, rngs, norm_epsilon)
      self.key_norm = make_norm(qk_norm, head_width, rngs, norm_epsilon)
    self.has_qk_norm = qk_norm != "none"
    self.logit_bias = (
      _trainable_bias(kind, logit_bias, max_length, num_heads)
      if learn_logit_bias
      else logit_bias
    )
    self.has_forget_gate = forget_gate
    if forget_gate:
      self.forget_gate = ForgetGate(
        width, num_heads, kernel_init=kernel_init, dtype=dtype, rngs=rngs
      )

  def __call__(
    self,
    x_BTD: jax.Array,
    *,
    mask: jax.Array | None = None,
    seq_lengths: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: Cache | None = None,
    place: jax.Array | None = None,
    page_table: jax.Array | None = None,
  ) -> jax.Array | tuple[jax.Array, Cache]:
    """(B, T, D) -> (B, T, D), and the filled cache if one is given.

    mask: (B or 1, N or 1, T, T) bool, True where a query sees a key.
    seq_lengths: (B,); the tokens beyond a length are padding. segment_ids:
    (B, T); a token sees the tokens of its own segment. positions: (T,) or
    (B, T), for `rotate` and row_power; 0 is the first token of a row or a
    segment.
    cache: a Cache of S slots. Without `place` the tokens fill its first T slots
    and see only each other. `place` is the slot of the first token, an int32
    scalar, or (B,), one for each row. It needs is_causal. A token then sees the
    slots up to its own, as far as the window reaches, and tokens beyond slot S
    are not kept. mask, seq_lengths and segment_ids are refused with it, because
    they would have no effect.
    page_table: int32 (B, M), for a paged cache: slot s of a row is token s % L
    of the page with the number page_table[row, s // L]. S is M L; tokens beyond
    S are written to the last page of the row's table.

    Raises ValueError for an input of another shape, for arguments that would
    have no effect, and for row_power without `positions`.
    """
    self._validate_input(x_BTD)
    _validate_cache(
      cache,
      place,
      page_table,
      self.has_forget_gate,
      mask=mask,
      seq_lengths=seq_lengths,
      segment_ids=segment_ids,
    )
    q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
    if self.has_qk_norm:
      q_BTNH = normalize(self.query_norm, q_BTNH)
      k_BTKH = normalize(self.key_norm, k_BTKH)
    if self.rotate is not None:
      where = {} if positions is None else {"positions": positions}
      q_BTNH = self.rotate(q_BTNH, **where)
      k_BTKH = self.rotate(k_BTKH, **where)
    c_BTN = None
    if self.has_forget_gate:
      c_BTN = self.forget_gate(x_BTD) + _forgotten_before(
        cache, place, page_table
      )
    if cache is not None:
      dtype = cache.key_BSKH.dtype
      k_BTKH, v_BTKH = (attention.saturated(x, dtype) for x in (k_BTKH, v_BTKH))
      first = 0 if place is None else place
      new = Cache(k_BTKH, v_BTKH, c_BTN)
      cache = _write(cache, new, first, page_table)
    if place is None:
      out_BTNH = self._attend(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=mask,
        query_seq_lengths=seq_lengths,
        key_value_seq_lengths=seq_lengths,
        query_segment_ids=segment_ids,
        key_value_segment_ids=segment_ids,
        **self._decay(c_BTN, c_BTN),
        **self._paired(c_BTN),
      )
    elif page_table is None:
      out_BTNH = self._attend(
        q_BTNH,
        *cache[:2],
        query_offset=place,
        **self._decay(c_BTN, cache.forgotten_BSN),
      )
    else:
      out_BTNH = self._attend_pages(q_BTNH, c_BTN, cache, place, page_table)
    if self.row_power:
      if positions is None:
        raise ValueError(f"{positions=}; needed by row_power={self.row_power}")
      scale_BT = row_scale(positions, self.row_power)
      out_BTNH *= scale_BT[:, :, None, None].astype(out_BTNH.dtype)
    y_BTD = checkpoint_name(self.out(out_BTNH), "out")
    return y_BTD if cache is None else (y_BTD, cache)

  def merge_products(self) -> None:
    """Merges query, key and value into a Product; the output becomes another.

    The parameters get other names, so do not save the model afterwards.
    """
    parts = (self.query, self.key, self.value)
    self.query_key_value = Product(*parts, axis=-2)
    self.out = Product(self.out)
    del self.query, self.key, self.value

  def _validate_input(self, x_BTD):
    width, shape = self.num_heads * self.head_width, jnp.shape(x_BTD)
    if len(shape) != 3 or shape[2] != width:
      raise ValueError(
        f"x_BTD.shape={shape}; must be (B, T, {width})"
        + " (give x_BTD[None])" * (len(shape) == 2 and shape[1] == width)
      )

  def _project(self, x_BTD):
    """(query, key, value), before norms and rotation."""
    if hasattr(self, "query_key_value"):
      heads = self.query_key_value(x_BTD)
      ends = self.num_heads, self.num_heads + self.num_kv_heads
      parts = jnp.split(heads, ends, axis=2)
    elif self.query.bias is not None:
      parts = self._biased_product(x_BTD)
    else:
      parts = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
    names = ("query", "key", "value")
    return tuple(map(checkpoint_name, parts, names))

  def _biased_product(self, x_BTD):
    """[query(x), key(x), value(x)], computed by one matrix product.

    One wide product is faster than three, and so are the two products of its
    gradient. Its result must then be split into three arrays. The addition of
    the biases reads and writes all of it anyway, so the split is free there;
    without biases it would be an extra copy.

    The columns are in groups. A group has the query heads that share a key
    head, that key head, and its value head. On a mesh that splits the heads
    over devices, each device then has whole groups.
    """
    linears = self.query, self.key, self.value
    dtype, groups = self.query.dtype, self.num_kv_heads
    size = self.num_heads // groups

    def joined(parameters):
      """(..., heads, H) each -> (..., heads of all and H)."""
      parts = [
        x.astype(dtype).reshape(*x.shape[:-2], groups, -1, self.head_width)
        for x in parameters
      ]
      return jnp.concatenate(parts, -2).reshape(*parts[0].shape[:-3], -1)

    y = x_BTD.astype(dtype) @ joined([x.kernel[...] for x in linears])
    y += joined([x.bias[...] for x in linears])[None, None]
    shape = *x_BTD.shape[:2], groups, size + 2, self.head_width
    return [
      part.reshape(*x_BTD.shape[:2], -1, self.head_width)
      for part in jnp.split(y.reshape(shape), (size, size + 1), axis=3)
    ]

  def _attend(self, q_BTNH, k_BSKH, v_BSKH, **options):
    return self.attention_fn(
      q_BTNH, k_BSKH, v_BSKH, **self.options(), **options
    )

  def _attend_pages(self, q_BTNH, c_BTN, cache, place, page_table):
    batch, length = q_BTNH.shape[:2]
    c_BSN = None
    if c_BTN is not None:  # They are small beside the keys, so they are copied.
      c_BMLN = jnp.take(cache.forgotten_BSN, page_table, axis=0, mode="clip")
      c_BSN = c_BMLN.reshape(batch, -1, self.num_heads)
    slots = page_table.shape[1] * cache.key_BSKH.shape[1]
    place_B = jnp.broadcast_to(jnp.asarray(place, jnp.int32), (batch,))
    return paged.paged_attention(
      q_BTNH,
      *cache[:2],
      page_table,
      jnp.minimum(place_B + length, slots),
      query_offset=place_B,
      **self._decay(c_BTN, c_BSN),
      **self.options(),
    )

  def _decay(self, c_BTN, c_BSN):
    """The logit vectors c_i and -c_j of the forget gate, if there is one."""
    if c_BTN is None:
      return {}
    vectors = {"key_logit_bias": -c_BSN.swapaxes(1, 2)}
    if self.kind != "softmax":  # It cancels what all keys of a row share.
      vectors["query_logit_bias"] = c_BTN.swapaxes(1, 2)
    return vectors

  def _paired(self, c_BTN):
    """The option with which the gradient of the gate is exact."""
    is_paired = c_BTN is not None and self.kind != "softmax"
    return {"paired_biases": True} if is_paired else {}

  def options(self) -> dict[str, Any]:
    """The options of every call of dot_product_attention."""
    bias, window = self.logit_bias, self.window
    if window is not None:
      window = window, 0 if self.is_causal else window
    return dict(
      kind=self.kind,
      logit_bias=bias[...] if isinstance(bias, nnx.Param) else bias,
      n=self.max_length,
      normalize=self.normalize,
      alibi_slopes=(
        positions.alibi_slopes(self.num_heads) if self.alibi else None
      ),
      is_causal=self.is_causal,
      local_window_size=window,
      implementation=self.implementation,
    )


def row_scale(positions: ArrayLike, power: float) -> jax.Array:
  """(positions + 1)^-power; a causal row sees positions + 1 keys.

  positions: (T,) or (B, T). Returns float32, (1 or B, T).
  """
  seen_BT = jnp.atleast_2d(jnp.asarray(positions, jnp.float32)) + 1
  return seen_BT**-power


class ForgetGate(nnx.Module):
  """c_i = log f_1 + ... + log f_i, f_t = sigmoid(x_t W + b) (2503.02130).

  Each head has its own f_t. The logit of query i and key j gets c_i - c_j, the
  sum of log f_t over the tokens t after the key, up to the query.

  c is float32 and falls with the position, while a logit needs its difference
  between two tokens. With the initial gates, logits above -20 are wrong by at
  most 2e-4 in a row of 8,192 tokens, and by 2e-3 in one of 65,536. If c falls
  by 0.8 a token, it is 1e-3 and 1e-2. Where tokens are added one by one, as in
  decoding, the error is 2 to 6 times as large.

  W: (D, N), by kernel_init. b: (N,), at first FORGET_BIAS. dtype: of the
  product's factors; its result is float32.
  """

  def __init__(
    self,
    width: int,
    num_heads: int,
    *,
    kernel_init: nnx.Initializer = KERNEL_INIT,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    self.dtype = dtype
    self.kernel = nnx.Param(
      kernel_init(rngs.params(), (width, num_heads), jnp.float32)
    )
    self.bias = nnx.Param(jnp.full((num_heads,), FORGET_BIAS, jnp.float32))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """(B, T, D) -> c, float32 (B, T, N)."""
    gate_BTN = jnp.einsum(
      "BTD,DN->BTN",
      x_BTD.astype(self.dtype),
      self.kernel[...].astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    gate_BTN += self.bias[...][None, None]
    return jax.nn.log_sigmoid(gate_BTN).cumsum(1)


def _forgotten_before(cache, place, page_table):
  """c of the token before the slot `place`, (B, 1, N); 0 if there is none."""
  if place is None:
    return 0.0
  c_SN = cache.forgotten_BSN  # of rows, or of pages
  batch = len(c_SN if page_table is None else page_table)
  before_B1 = jnp.broadcast_to(jnp.asarray(place), (batch,))[:, None] - 1
  row_B1, slot_B1 = jnp.arange(batch)[:, None], before_B1
  if page_table is not None:
    row_B1, slot_B1 = _in_pages(page_table, before_B1, c_SN.shape[1])
  c_B1N = c_SN.at[row_B1, slot_B1].get(mode="clip")
  return jnp.where(before_B1[..., None] >= 0, c_B1N, 0)


def _write(cache, new, place, page_table):
  """Writes a Cache of new tokens to the slots from `place` on, () or (B,).

  XLA writes in place if nothing uses the cache's old array afterwards.
  """

  def write(slots, new):
    if page_table is not None:
      return _write_pages(slots, new, place, page_table)
    if jnp.ndim(place) == 0 or len(new) == 1:
      first = jnp.reshape(place, ())
      return jax.lax.dynamic_update_slice_in_dim(slots, new, first, axis=1)
    row_B1 = jnp.arange(len(new))[:, None]
    slot_BT = place[:, None] + jnp.arange(new.shape[1])[None]
    return slots.at[row_B1, slot_BT].set(
      new, mode="drop", unique_indices=True, indices_are_sorted=True
    )

  return jax.tree.map(write, cache, new)


def _write_pages(pages_PLKH, new_BTKH, place, page_table):
  batch, length = new_BTKH.shape[:2]
  first_B1 = jnp.broadcast_to(jnp.asarray(place, jnp.int32), (batch,))[:, None]
  slot_BT = first_B1 + jnp.arange(length, dtype=jnp.int32)[None]
  places = _in_pages(page_table, slot_BT, pages_PLKH.shape[1])
  return pages_PLKH.at[places].set(new_BTKH, mode="drop")


def _in_pages(page_table, slot_BT, page):
  """The page of each slot, and the slot's place in it, both (B, T)."""
  page_BT = jnp.take_along_axis(
    page_table, slot_BT // page, axis=1, mode="clip"
  )
  return page_BT, slot_BT % page


class Product(nnx.Module):
  """x W^T + b for one or more linear layers side by side, for decoding.

  With few tokens a product takes as long as reading its matrix. One large
  matrix is read faster than several small ones, and a matrix is read fastest if
  the weights of an output are contiguous. So W has the shape (*outputs,
  *inputs), while the kernel of nnx.Linear has (*inputs, *outputs). XLA then
  computes the product with one token in one kernel. With the other layout it
  would write each weight times its input to memory, and add them up in a second
  kernel.

  linears: nnx.Linear or nnx.LinearGeneral layers of the same input. axis: a
  negative axis of their outputs, along which they are joined.
  """

  def __init__(self, *linears: nnx.Module, axis: int = -1) -> None:
    def joined(arrays):
      return jnp.concatenate([x[...] for x in arrays], axis)

    kernel = joined([x.kernel for x in linears])
    contracted = getattr(linears[0], "axis", (-1,))
    self.num_inputs, self.dtype = len(contracted), linears[0].dtype
    inputs = range(self.num_inputs)
    self.kernel = nnx.Param(
      jnp.moveaxis(kernel, inputs, [-x - 1 for x in inputs][::-1])
    )
    has_bias = linears[0].bias is not None
    self.bias = (
      nnx.Param(joined([x.bias for x in linears])) if has_bias else None
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., *inputs) -> (..., *outputs)."""
    last = range(-self.num_inputs, 0)
    kernel = self.kernel[...].astype(self.dtype)
    axes = [[ndim + i for i in last] for ndim in (x.ndim, kernel.ndim)]
    y = jax.lax.dot_general(x.astype(self.dtype), kernel, (axes, ((), ())))
    if self.bias is None:
      return y
    bias = self.bias[...].astype(self.dtype)
    return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _check_heads(width, num_heads, num_kv_heads):
  if width % num_heads:
    raise ValueError(f"{num_heads=}; must divide {width=}")
  if num_heads % num_kv_heads:
    raise ValueError(f"{num_kv_heads=}; must divide {num_heads=}")


def _validate_dtype(dtype):
  try:
    is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    is_float = False
  if not is_float:
    raise ValueError(f"{dtype=}; must be a float, such as 'bfloat16'")


def _validate_cache(cache, place, page_table, forget_gate, **masks):
  """Refuses what would have no effect without a cache, or with `place`.

  Also refuses a cache that lacks the sums of the layer's forget gate.
  """
  if cache is not None and (cache.forgotten_BSN is not None) != forget_gate:
    raise ValueError(
      f"cache.forgotten_BSN={cache.forgotten_BSN}; must be "
      + ("zeros of float32 (B, S, N)" if forget_gate else "None")
      + f" where {forget_gate=}"
    )
  for name, x in (("place", place), ("page_table", page_table)):
    if cache is None and x is not None:
      raise ValueError(f"{name}={x}; must be None without a cache")
  for name, x in masks.items():
    if place is not None and x is not None:
      raise ValueError(
        f"{name} of shape {jnp.shape(x)} with `place`; must be None, because a "
        "token then sees every slot of the cache up to its own"
      )


def _check_logit_bias(kind, logit_bias, learn_logit_bias):
  if kind == "softmax" and logit_bias is not None:
    raise ValueError(f"{logit_bias=}; softmax does not change with it")
  if kind == "softmax" and learn_logit_bias:
    raise ValueError(f"{learn_logit_bias=}; softmax does not change with it")


def _trainable_bias(kind, logit_bias, max_length, num_heads):
  if logit_bias is None:
    logit_bias = attention.default_logit_bias(kind, max_length)
  return nnx.Param(jnp.full((num_heads,), logit_bias, jnp.float32))


class Mlp(nnx.Module):
  """gelu: W_down gelu(W_up x). swiglu: W_down (silu(W_gate x) * W_up x).

  gelu is the tanh form of 1606.08415, as in jax.nn and in ViT. With it, a step
  of configs/vit.py takes 0.8 of the time that the exact form takes. gelu_exact
  is the exact form, x Phi(x) with the normal distribution function Phi. swiglu
  is from 2002.05202. hidden: F.
  """

  def __init__(
    self,
    width: int,
    hidden: int,
    kind: str = "gelu",
    *,
    use_bias: bool = True,
    kernel_init: nnx.Initializer = KERNEL_INIT,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    _choose("kind", kind, MLPS)
    _validate_dtype(dtype)
    self.kind = kind
    linear = functools.partial(
      nnx.Linear,
      kernel_init=kernel_init,
      use_bias=use_bias,
      dtype=dtype,
      rngs=rngs,
    )
    if kind == "swiglu":
      self.gate = linear(width, hidden)
    self.up = linear(width, hidden)
    self.down = linear(hidden, width)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """(B, T, D) -> (B, T, D)."""
    return checkpoint_name(self.down(MLPS[self.kind](self, x_BTD)), "down")

  def merge_products(self) -> None:
    """Merges gate and up into one Product, as in SelfAttention."""
    self.down = Product(self.down)
    if self.kind == "swiglu":
      self.gate_up = Product(self.gate, self.up)
      del self.gate, self.up
    else:
      self.up = Product(self.up)


def _swiglu(mlp, x_BTD):
  if hasattr(mlp, "gate_up"):
    gate_BTF, up_BTF = jnp.split(mlp.gate_up(x_BTD), 2, axis=-1)
  else:
    gate_BTF, up_BTF = mlp.gate(x_BTD), mlp.up(x_BTD)
  gate_BTF = checkpoint_name(gate_BTF, "gate")
  return jax.nn.silu(gate_BTF) * checkpoint_name(up_BTF, "up")


def _gelu(mlp, x_BTD, approximate):
  up = mlp.up
  if isinstance(up, Product) or jnp.dtype(up.dtype).itemsize > 2:
    up_BTF = checkpoint_name(up(x_BTD), "up")
    return jax.nn.gelu(up_BTF, approximate=approximate)
  # Only the product is kept for the backward pass. The sum with the bias and
  # the derivative would be two more arrays of F numbers a token. A GPU
  # recomputes them in less time than it takes to write and read those arrays.
  product_BTF = x_BTD.astype(up.dtype) @ up.kernel[...].astype(up.dtype)
  product_BTF = checkpoint_name(product_BTF, "up")
  gelu = _gelu_tanh if approximate else _gelu_erf
  if up.bias is None:
    return jax.checkpoint(gelu)(product_BTF)
  bias_11F = up.bias[...].astype(up.dtype)[None, None]
  return jax.checkpoint(lambda x, bias: gelu(x + bias))(product_BTF, bias_11F)


def _gelu_erf(x):
  return jax.nn.gelu(x, approximate=False)


_GELU_DOUBLE, _GELU_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


@jax.custom_jvp
def _gelu_tanh(x):
  """x s(u), u = 2 c (x + a x^3), with the logistic function s.

  c = sqrt(2 / pi) and a = 0.044715. It is x (1 + tanh(u / 2)) / 2, as in
  jax.nn, but a GPU computes s in fewer instructions than tanh. In 16 bits,
  jax.nn's form and the derivative that JAX finds are rounded after each
  operation. This one is computed in float32 and rounded once.
  """
  y = _at_least_float32(x)
  return (y * _gelu_gate(y)).astype(x.dtype)


def _at_least_float32(x):
  return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _gelu_gate(y):
  return jax.nn.sigmoid(_GELU_DOUBLE * y * (1 + _GELU_CUBIC * y * y))


@_gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
  """The derivative of x s(u) is s + x s (1 - s) u'."""
  (x,), (dx,) = primals, tangents
  y = _at_least_float32(x)
  gate = _gelu_gate(y)
  slope = _GELU_DOUBLE * (1 + 3 * _GELU_CUBIC * y * y)
  derivative = gate * (1 + y * (1 - gate) * slope)
  return _gelu_tanh(x), dx * derivative.astype(x.dtype)


MLPS = {
  "gelu": functools.partial(_gelu, approximate=True),
  "gelu_exact": functools.partial(_gelu, approximate=False),
  "swiglu": _swiglu,
}


class LayerScale(nnx.Module):
  """scale * x with one trainable factor for each channel (2103.17239).

  init: the initial value. The paper's code uses 1e-4 on both branches of every
  block (2409.04431).
  """

  def __init__(self, width: int, init: float) -> None:
    self.scale = nnx.Param(jnp.full((width,), init, jnp.float32))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """(B, T, D) -> (B, T, D)."""
    return x_BTD * self.scale[...].astype(x_BTD.dtype)[None, None, :]


def drop_path(x_BTD: jax.Array, rng: jax.Array, rate: ArrayLike) -> jax.Array:
  """Stochastic depth (1603.09382): sets examples to 0 with probability `rate`.

  The other examples are divided by 1 - rate, so that the expectation is x.
  rate: 0 <= rate < 1, a number or an array.
  """
  keep = jax.random.bernoulli(rng, 1 - rate, (x_BTD.shape[0], 1, 1))
  factor = jnp.where(keep, 1 / (1 - rate), 0).astype(x_BTD.dtype)
  return x_BTD * factor


class Residual(nnx.Module):
  """A branch f around the residual stream, with its norms.

  pre:    x + f(norm_in(x))                (2002.04745)
  post:   norm_out(x + f(x))               (1706.03762)
  hybrid: x + norm_out(f(norm_in(x)))      (2409.04431: needed at 1B, n = 4096)

  layer_scale: the `init` of LayerScale; None: no factor. The factor, dropout
  (of single numbers, at the rate `dropout`) and drop_path (of whole examples)
  act on what is added to x. norm_epsilon: as in make_norm.
  """

  def __init__(
    self,
    width: int,
    norm: str,
    norm_kind: str,
    layer_scale: float | None,
    dropout: float = 0.0,
    *,
    norm_epsilon: float | None = None,
    rngs: nnx.Rngs,
  ) -> None:
    _choose("norm", norm, NORM_PLACES)
    self.norm = norm
    self.dropout = nnx.Dropout(dropout, deterministic=False)
    if norm in ("pre", "hybrid"):
      self.norm_in = make_norm(norm_kind, width, rngs, norm_epsilon)
    if norm in ("post", "hybrid"):
      self.norm_out = make_norm(norm_kind, width, rngs, norm_epsilon)
    self.has_layer_scale = layer_scale is not None
    if self.has_layer_scale:
      self.layer_scale = LayerScale(width, layer_scale)

  def __call__(
    self,
    x_BTD: jax.Array,
    branch: Callable[[jax.Array], jax.Array],
    rng: jax.Array | None = None,
    rate: ArrayLike | None = None,
  ) -> jax.Array:
    """branch: f. rng: None drops nothing. rate: of drop_path; None: 0."""
    y_BTD = x_BTD + self.added(x_BTD, branch, rng, rate)
    return normalize(self.norm_out, y_BTD) if self.norm == "post" else y_BTD

  def added(
    self,
    x_BTD: jax.Array,
    branch: Callable[[jax.Array], jax.Array],
    rng: jax.Array | None = None,
    rate: ArrayLike | None = None,
  ) -> jax.Array:
    """What is added to x_BTD; the arguments are those of the call."""
    y_BTD = x_BTD
    if self.norm in ("pre", "hybrid"):
      y_BTD = normalize(self.norm_in, y_BTD)
    y_BTD = branch(y_BTD)
    if self.norm == "hybrid":
      y_BTD = normalize(self.norm_out, y_BTD)
    if self.has_layer_scale:
      y_BTD = self.layer_scale(y_BTD)
    if rng is not None:
      y_BTD = self.dropout(y_BTD, rngs=jax.random.fold_in(rng, 0))
    if rng is not None and rate is not None:
      y_BTD = drop_path(y_BTD, rng, rate)
    return y_BTD


class Block(nnx.Module):
  """Self-attention, then an MLP, each in a Residual.

  attn, mlp: a SelfAttention and an Mlp of this width. parallel: whether the MLP
  reads the input of the block, as attention does, instead of the result of
  attention (GPT-J and 2204.06745): x + attn(norm(x)) + mlp(norm(x)). The other
  arguments are those of Residual. Raises ValueError for parallel branches if
  the norm is not "pre".
  """

  def __init__(
    self,
    width: int,
    attn: SelfAttention,
    mlp: Mlp,
    *,
    norm: str = "pre",
    norm_kind: str = "layernorm",
    norm_epsilon: float | None = None,
    layer_scale: float | None = None,
    dropout: float = 0.0,
    parallel: bool = False,
    rngs: nnx.Rngs,
  ) -> None:
    if parallel and norm != "pre":
      raise ValueError(f"{norm=}; must be 'pre' with {parallel=}")
    self.attn, self.mlp, self.parallel = attn, mlp, parallel
    residual = functools.partial(
      Residual,
      width,
      norm,
      norm_kind,
      layer_scale,
      dropout,
      norm_epsilon=norm_epsilon,
      rngs=rngs,
    )
    self.attn_residual, self.mlp_residual = residual(), residual()

  def __call__(
    self,
    x_BTD: jax.Array,
    rng: jax.Array | None = None,
    rate: ArrayLike | None = None,
    *,
    cache: Cache | None = None,
    **attn_args: Any,
  ) -> jax.Array | tuple[jax.Array, Cache]:
    """(B, T, D) -> (B, T, D), and the filled cache if one is given.

    rng: for dropout, and for drop_path if `rate` is not None; None drops
    nothing. cache, attn_args: as in SelfAttention.
    """
    rngs = (None, None) if rng is None else jax.random.split(rng)

    def attn(x_BTD):
      nonlocal cache
      if cache is None:
        return self.attn(x_BTD, **attn_args)
      y_BTD, cache = self.attn(x_BTD, cache=cache, **attn_args)
      return y_BTD

    if self.parallel:
      attn_BTD = self.attn_residual.added(x_BTD, attn, rngs[0], rate)
      mlp_BTD = self.mlp_residual.added(x_BTD, self.mlp, rngs[1], rate)
      x_BTD = x_BTD + attn_BTD + mlp_BTD
    else:
      x_BTD = self.attn_residual(x_BTD, attn, rngs[0], rate)
      x_BTD = self.mlp_residual(x_BTD, self.mlp, rngs[1], rate)
    return x_BTD if cache is None else (x_BTD, cache)


def _is_softmax(primitive, *_, **__):
  """Whether jax.nn computes attention and its row statistics by `primitive`."""
  return primitive.name.startswith("dot_product_attention_fwd")


def _keep(*names):
  """The policy that keeps named activations for the backward pass.

  The kernels themselves name their output, and the sums of normalised rows,
  "attention". For softmax by cuDNN, the output and the statistics that its
  primitive returns are kept. Softmax in plain JAX is computed again.
  """
  policies = jax.checkpoint_policies
  policy = policies.save_only_these_names(*names)
  if "attention" in names:
    policy = policies.save_from_both_policies(policy, _is_softmax)
  return policy


# Policies of jax.checkpoint: what a layer keeps besides its input.
REMAT = {
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    _keep("attention"),
  ),
  "all": jax.checkpoint_policies.nothing_saveable,
}


def remat_policy(remat: str) -> Callable[..., Any] | None:
  """The policy of jax.checkpoint that `remat` names; None for "none".

  remat: in the backward pass, none recomputes nothing; all recomputes a layer
  from its input (1604.06174); dots recomputes everything except matrix products
  and attention. Names of ACTIVATIONS, joined by "+", recompute everything
  except these.

  Raises ValueError for another string.
  """
  if remat == "none":
    return None
  if remat in REMAT:
    return REMAT[remat]
  names = remat.split("+")
  if not set(names) <= set(ACTIVATIONS):
    raise ValueError(
      f"{remat=}; must be none, {', '.join(REMAT)}, or some of "
      f"{', '.join(ACTIVATIONS)}, joined by +"
    )
  return _keep(*names)


class Stack(nnx.Module):
  """`depth` equal blocks, whose parameters are stacked along a leading axis.

  They run in a scan, so that the time to compile does not grow with the depth.
  A stack of at most `max_unrolled` layers is unrolled for speed.

  make_block: a function of an nnx.Rngs that makes one layer.
  drop_path: the rate of the last layer's branches. Layer i of L, counted from
    0, has the rate drop_path * i / (L - 1); a single layer has drop_path.
  remat: what the backward pass recomputes, see remat_policy.
  """

  def __init__(
    self,
    depth: int,
    make_block: Callable[[nnx.Rngs], nnx.Module],
    *,
    drop_path: float = 0.0,
    remat: str = "none",
    max_unrolled: int = MAX_UNROLLED,
    rngs: nnx.Rngs,
  ) -> None:
    self.depth, self.drop_path, self.remat = depth, drop_path, remat
    self.is_unrolled = depth <= max_unrolled
    self.is_split = False
    remat_policy(remat)  # raises ValueError for a wrong string

    def state(key):
      return nnx.state(make_block(nnx.Rngs(key)))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_block(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), depth)
    self.blocks = nnx.merge(graphdef, jax.vmap(state)(keys))

  def __call__(
    self,
    x_BTD: jax.Array,
    rng: jax.Array | None = None,
    *,
    cache: tuple[Cache, ...] | None = None,
    **attn_args: Any,
  ) -> jax.Array | tuple[jax.Array, tuple[Cache, ...]]:
    """The arguments are those of Block; rng None drops nothing.

    cache: one for each layer. With a cache nothing is dropped, and the loop
    over the layers is unrolled, because a scan would copy the whole cache at
    every token.

    Raises ValueError for an rng with a cache, or after split_layers.
    """
    if rng is not None and (cache is not None or self.is_split):
      raise ValueError(f"{rng=}; must be None where tokens are generated")
    if cache is not None:
      filled = []
      for block, one in zip(self.each(), cache, strict=True):
        x_BTD, one = block(x_BTD, cache=one, **attn_args)
        filled.append(one)
      return x_BTD, tuple(filled)
    if self.is_split:
      for block in self.blocks:
        x_BTD = block(x_BTD, **attn_args)
      return x_BTD
    graphdef, states = nnx.split(self.blocks)

    def layer(x_BTD, slices):
      state, rng, rate = slices
      return nnx.merge(graphdef, state)(x_BTD, rng, rate, **attn_args), None

    policy = remat_policy(self.remat)
    if policy is not None:
      # A scan's loop already keeps the two passes apart.
      layer = jax.checkpoint(layer, prevent_cse=self.is_unrolled, policy=policy)
    rngs = None if rng is None else jax.random.split(rng, self.depth)
    xs = (states, rngs, self._rates())
    # Without this, XLA may give all layers the layout that suits the gradient
    # of a table of positions, which has the batch last. It would then transpose
    # around every matrix product.
    x_BTD = layout.with_layout_constraint(x_BTD, layout.Layout((0, 1, 2)))
    x_BTD, _ = jax.lax.scan(layer, x_BTD, xs, unroll=self.is_unrolled)
    return x_BTD

  def each(self) -> list[Block]:
    """The blocks one by one, each with its own part of the parameters."""
    if self.is_split:
      return list(self.blocks)
    graphdef, states = nnx.split(self.blocks)
    return [
      nnx.merge(graphdef, jax.tree.map(lambda x: x[i], states))  # noqa: B023
      for i in range(self.depth)
    ]

  def split_layers(self) -> None:
    """Gives each layer arrays of its own, and merges matrix products.

    This is for decoding; see SelfAttention.merge_products.
    """
    blocks = self.each()
    for block in blocks:
      block.attn.merge_products()
      block.mlp.merge_products()
    self.blocks, self.is_split = nnx.List(blocks), True

  def empty_cache(
    self, batch: int, slots: int, dtype: DTypeLike
  ) -> tuple[Cache, ...]:
    """Caches of `slots` tokens for each of `batch` rows, one for each layer.

    dtype: that of the activations, or float8_e4m3fn.
    """
    attn = self.blocks[0].attn if self.is_split else self.blocks.attn
    shape = batch, slots, attn.num_kv_heads, attn.head_width

    def empty():
      forgotten = None
      if attn.has_forget_gate:
        forgotten = jnp.zeros((batch, slots, attn.num_heads), jnp.float32)
      return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), forgotten)

    return tuple(empty() for _ in range(self.depth))

  def _rates(self):
    if not self.drop_path:
      return None
    if self.depth == 1:
      return jnp.full((1,), self.drop_path)
    return jnp.linspace(0.0, self.drop_path, self.depth)
