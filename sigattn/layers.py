"""Transformer blocks: attention, MLP, residual branches, a scanned stack.

Parameters are float32 and start from

  kernel              argument `kernel_init`, over all inputs and all outputs;
                      Xavier uniform, as in ViT, or FAN_IN_INIT
  bias                0, of linear layers and of LayerNorm
  norm's scale        1
  LayerScale's scale  its argument `init`, everywhere
  logit_bias          attention's own: -log n for sigmoid, 0 for others

Activations have the constructor's `dtype`; norms compute in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import layout
from jax.typing import ArrayLike, DTypeLike

from sigattn import attention, extras, positions

extras.require("layers")

from flax import nnx

NORMS = {"layernorm": nnx.LayerNorm, "rmsnorm": nnx.RMSNorm}
# By default; AXLearn's of rmsnorm.
EPSILONS = {"layernorm": 1e-6, "rmsnorm": 1e-5}
NORM_PLACES = ("pre", "post", "hybrid")
QK_NORMS = ("none", *NORMS)

# A scan copies its parameters' slices and activations at every step. With 128
# images of 49 tokens at width 96, a scanned training step takes 1.28 times as
# long as an unrolled one at depth 3 on two CPU cores, 1.13 at 6, 1.05 at 12
# (2026-11-23). So a small stack is unrolled; its program grows with the depth.
MAX_UNROLLED = 6

# What a layer computes by a product of matrices or by attention, and may keep
# for the backward pass.
ACTIVATIONS = (
  "query", "key", "value", "attention", "out", "gate", "up", "down",
)  # fmt: skip

KERNEL_INIT = nnx.initializers.xavier_uniform()
FAN_IN_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


def _choose(name, value, choices):
  if value not in choices:
    raise ValueError(f"{name}={value!r}; choose from {sorted(choices)}")


def make_norm(
  kind: str, width: int, rngs: nnx.Rngs, epsilon: float | None = None
) -> nnx.Module:
  """LayerNorm (1607.06450) or RMSNorm (1910.07467), in float32.

  epsilon: is added to the variance or mean square; None: that of EPSILONS.
  """
  _choose("norm_kind", kind, NORMS)
  epsilon = EPSILONS[kind] if epsilon is None else epsilon
  return NORMS[kind](width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def normalize(norm: nnx.Module, x: jax.Array) -> jax.Array:
  """norm(x) in x's dtype, computed in float32."""
  return norm(x).astype(x.dtype)


class Cache(NamedTuple):
  """Keys and values of the tokens so far, in the dtype of the activations.

  A SelfAttention's cache has these axes; a Stack's has an axis of layers in
  front of them.
  """

  key_BSKH: jax.Array
  value_BSKH: jax.Array


class SelfAttention(nnx.Module):
  """(phi(q k^T / sqrt(H) + b) v) W_out, phi by `kind` (2409.04431, Section 2).

  q = rotate(norm(x W_q)), k = rotate(norm(x W_k)), v = x W_v.

  Args:
    width: D. num_heads: N. num_kv_heads: K, a divisor of N; None: N
      (2305.13245).
    max_length: the n of sigmoid's default bias -log n and of ReLU's 1 / n. It
      is one constant, whatever the length of an input.
    kind: one of attention.KINDS.
    logit_bias: b; None: the kind's default. learn_logit_bias: b is trained, one
      for each head, and starts from that value. Softmax refuses both.
    normalize: divides a row's weights by their sum, see
      attention.dot_product_attention. Softmax refuses it.
    qk_norm: none, layernorm or rmsnorm, of q and k over the head width.
    norm_epsilon: as in make_norm.
    alibi: adds ALiBi's distance penalty (2108.12409) to the logits.
    window: a token sees so many tokens before it, and so many behind it unless
      is_causal, besides itself. None: all.
    rotate: a function of x_BTNH that is applied to q and to k, RoPE for
      example; it also gets `positions` where the call has them. None: nothing.
    row_power: p of the row scaling i^-p, where i is the number of keys that the
      row sees: an alternative to sigmoid's bias. 0: no scaling. It needs
      is_causal, and `positions` in the call.
    implementation: as in attention.dot_product_attention.

  Raises:
    ValueError: for an unknown choice, head counts that do not divide, a logit
      bias with softmax, or row_power without is_causal or with a window.
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
    implementation: str | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ) -> None:
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    _check_heads(width, num_heads, kv_heads)
    _choose("kind", kind, attention.KINDS)
    _choose("qk_norm", qk_norm, QK_NORMS)
    _check_logit_bias(kind, logit_bias, learn_logit_bias)
    if kind == "softmax" and normalize:
      raise ValueError(f"{normalize=}; must be False where {kind=}")
    if row_power and not is_causal:
      raise ValueError(f"{row_power=}; must be 0 where {is_causal=}")
    if row_power and window is not None:
      raise ValueError(f"{row_power=}; must be 0 where {window=}")
    self.kind, self.max_length = kind, max_length
    self.normalize = normalize
    self.alibi, self.is_causal, self.window = alibi, is_causal, window
    self.rotate, self.row_power = rotate, row_power
    self.implementation = implementation
    # Telemetry replaces it, to record what every layer passes to attention.
    self.attention_fn = attention.dot_product_attention
    head_width = width // num_heads
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
  ) -> jax.Array | tuple[jax.Array, Cache]:
    """(B, T, D) -> (B, T, D), and the filled cache where one is given.

    mask: (B or 1, N or 1, T, T) bool, True where a query sees a key.
    seq_lengths: (B,), the tokens beyond are padding. segment_ids: (B, T), a
    token sees the tokens of its own segment. positions: (T,) or (B, T), for
    `rotate` and row_power; 0 is the first token of a row or segment.
    cache: a Cache of S slots. Without `place` the tokens fill its first T slots
    and see only each other. `place` is an int32 scalar, the slot of the first
    token; it then sees the slots up to its own, as far as is_causal and the
    window go, and as `mask`, (B or 1, N or 1, T or 1, S), allows. seq_lengths
    and segment_ids then have no effect.
    """
    q_BTNH = checkpoint_name(self.query(x_BTD), "query")
    k_BTKH = checkpoint_name(self.key(x_BTD), "key")
    if self.has_qk_norm:
      q_BTNH = normalize(self.query_norm, q_BTNH)
      k_BTKH = normalize(self.key_norm, k_BTKH)
    if self.rotate is not None:
      where = {} if positions is None else {"positions": positions}
      q_BTNH = self.rotate(q_BTNH, **where)
      k_BTKH = self.rotate(k_BTKH, **where)
    v_BTKH = checkpoint_name(self.value(x_BTD), "value")
    if cache is not None:
      cache = _write(cache, k_BTKH, v_BTKH, 0 if place is None else place)
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
      )
    else:
      out_BTNH = self._attend(q_BTNH, *cache, mask=mask, query_offset=place)
    if self.row_power:
      if positions is None:
        raise ValueError(f"{positions=}; needed by row_power={self.row_power}")
      scale_BT = row_scale(positions, self.row_power)
      out_BTNH *= scale_BT[:, :, None, None].astype(out_BTNH.dtype)
    y_BTD = checkpoint_name(self.out(out_BTNH), "out")
    return y_BTD if cache is None else (y_BTD, cache)

  def _attend(self, q_BTNH, k_BSKH, v_BSKH, **options):
    bias, window = self.logit_bias, self.window
    if window is not None:
      window = window, 0 if self.is_causal else window
    return self.attention_fn(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      kind=self.kind,
      logit_bias=bias[...] if isinstance(bias, nnx.Param) else bias,
      n=self.max_length,
      normalize=self.normalize,
      alibi_slopes=(
        positions.alibi_slopes(q_BTNH.shape[2]) if self.alibi else None
      ),
      is_causal=self.is_causal,
      local_window_size=window,
      implementation=self.implementation,
      **options,
    )


def row_scale(positions: ArrayLike, power: float) -> jax.Array:
  """(positions + 1)^-power: a causal row sees itself and the rows before it.

  positions: (T,) or (B, T). Returns float32, (1 or B, T).
  """
  seen_BT = jnp.atleast_2d(jnp.asarray(positions, jnp.float32)) + 1
  return seen_BT**-power


def _write(cache, k_BTKH, v_BTKH, place):
  """The cache with these in its slots from `place` on."""
  return Cache(
    *(
      jax.lax.dynamic_update_slice_in_dim(
        slots, new.astype(slots.dtype), place, axis=1
      )
      for slots, new in zip(cache, (k_BTKH, v_BTKH), strict=True)
    )
  )


def _check_heads(width, num_heads, num_kv_heads):
  if width % num_heads:
    raise ValueError(f"{num_heads=}; must divide {width=}")
  if num_heads % num_kv_heads:
    raise ValueError(f"{num_kv_heads=}; must divide {num_heads=}")


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

  gelu is the tanh form of 1606.08415, as in jax.nn and in ViT: with it, a step
  of configs/vit.py takes 0.8 of the time that it takes with the exact form.
  gelu_exact is that, x Phi(x) with the normal distribution function Phi.
  swiglu: 2002.05202. hidden: F.
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


def _swiglu(mlp, x_BTD):
  gate_BTF = checkpoint_name(mlp.gate(x_BTD), "gate")
  return jax.nn.silu(gate_BTF) * checkpoint_name(mlp.up(x_BTD), "up")


def _gelu(mlp, x_BTD, approximate):
  activation = functools.partial(jax.nn.gelu, approximate=approximate)
  up_BTF = checkpoint_name(mlp.up(x_BTD), "up")
  if up_BTF.dtype.itemsize == 2:
    # A GPU computes the derivative again in less time than it takes to write
    # and read an array of F numbers a token that the derivative would need.
    activation = jax.checkpoint(activation)
  return activation(up_BTF)


MLPS = {
  "gelu": functools.partial(_gelu, approximate=True),
  "gelu_exact": functools.partial(_gelu, approximate=False),
  "swiglu": _swiglu,
}


class LayerScale(nnx.Module):
  """scale * x, one trainable factor a channel (2103.17239), from `init`.

  The paper's code takes 1e-4 on both branches of every block (2409.04431).
  """

  def __init__(self, width: int, init: float) -> None:
    self.scale = nnx.Param(jnp.full((width,), init, jnp.float32))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """(B, T, D) -> (B, T, D)."""
    return x_BTD * self.scale[...].astype(x_BTD.dtype)[None, None, :]


def drop_path(x_BTD: jax.Array, rng: jax.Array, rate: ArrayLike) -> jax.Array:
  """Stochastic depth (1603.09382): 0 for an example with probability `rate`.

  The examples kept are divided by 1 - rate, so that the expectation is x.
  rate: 0 <= rate < 1, an array too.
  """
  keep = jax.random.bernoulli(rng, 1 - rate, (x_BTD.shape[0], 1, 1))
  factor = jnp.where(keep, 1 / (1 - rate), 0).astype(x_BTD.dtype)
  return x_BTD * factor


class Residual(nnx.Module):
  """A branch f around the residual stream, with its norms.

  pre:    x + f(norm_in(x))                (2002.04745)
  post:   norm_out(x + f(x))               (1706.03762)
  hybrid: x + norm_out(f(norm_in(x)))      (2409.04431: needed at 1B, n = 4096)

  layer_scale: LayerScale's init, None for no factor. The factor, dropout (of
  single numbers, at rate `dropout`) and drop_path (of whole examples) act on
  what is added to x. norm_epsilon: as in make_norm.
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
    """branch: f. rng: None drops nothing. rate: drop_path's; None: none."""
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
  reads the block's input, as attention does, instead of its result (GPT-J and
  2204.06745): x + attn(norm(x)) + mlp(norm(x)). The other arguments are those
  of Residual. Raises ValueError for parallel branches with another norm than
  "pre".
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
    """(B, T, D) -> (B, T, D), and the filled cache where one is given.

    rng: for dropout, and for drop_path with `rate` unless that is None; None
    drops nothing. cache, attn_args: as in SelfAttention.
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
  """Whether jax.nn computes attention and its row statistics by it."""
  return primitive.name.startswith("dot_product_attention_fwd")


def _keep(*names):
  """The policy that keeps named activations for the backward pass.

  The kernels themselves name their output "attention", with the sums of
  normalised rows. Of softmax by cuDNN the output and the statistics are kept
  that its primitive returns; softmax in plain JAX is computed again.
  """
  policies = jax.checkpoint_policies
  policy = policies.save_only_these_names(*names)
  if "attention" in names:
    policy = policies.save_from_both_policies(policy, _is_softmax)
  return policy


# What is kept of a layer, besides its input: a policy of jax.checkpoint.
REMAT = {
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    _keep("attention"),
  ),
  "all": jax.checkpoint_policies.nothing_saveable,
}


def remat_policy(remat: str) -> Callable[..., Any] | None:
  """The policy of jax.checkpoint that `remat` names; None for "none".

  remat: none recomputes nothing in the backward pass; all recomputes a layer
  from its input (1604.06174); dots all but the products of matrices and
  attention. Names of ACTIVATIONS, joined by "+", recompute all but those.

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
  A stack of up to `max_unrolled` layers is unrolled for speed.

  make_block: a function of an nnx.Rngs that makes one layer.
  drop_path: rate of the last layer's branches; layer i of L, counted from 0,
    drops at the rate drop_path * i / (L - 1), a single layer at drop_path.
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
    remat_policy(remat)  # raises for a string that names none

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
    cache: Cache | None = None,
    **attn_args: Any,
  ) -> jax.Array | tuple[jax.Array, Cache]:
    """The arguments are those of Block; rng None drops nothing."""
    graphdef, states = nnx.split(self.blocks)

    def layer(x_BTD, slices):
      state, rng, rate, cache = slices
      block = nnx.merge(graphdef, state)
      if cache is None:
        return block(x_BTD, rng, rate, **attn_args), None
      return block(x_BTD, rng, rate, cache=cache, **attn_args)

    policy = remat_policy(self.remat)
    if policy is not None:
      # A scan's loop already keeps the two passes apart.
      layer = jax.checkpoint(layer, prevent_cse=self.is_unrolled, policy=policy)
    rngs = None if rng is None else jax.random.split(rng, self.depth)
    xs = (states, rngs, self._rates(), cache)
    # Without this, XLA may give all layers the layout that suits the gradient
    # of a table of positions, with the batch last, and transpose between it and
    # every product of matrices.
    x_BTD = layout.with_layout_constraint(x_BTD, layout.Layout((0, 1, 2)))
    x_BTD, cache = jax.lax.scan(layer, x_BTD, xs, unroll=self.is_unrolled)
    return x_BTD if cache is None else (x_BTD, cache)

  def _rates(self):
    if not self.drop_path:
      return None
    if self.depth == 1:
      return jnp.full((1,), self.drop_path)
    return jnp.linspace(0.0, self.drop_path, self.depth)
