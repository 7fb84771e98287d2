"""The forms of attention that benchmarks/science.py compares.

A form is a set of changes of config.attn. The controls also have a function
that replaces sigattn.dot_product_attention, because no kernel computes them.
Two controls are computed from the output of a kernel and from the divisor of
each row, which return_residual returns:

  softmax1      e^z / (1 + sum e^z), the softmax with a key of logit 0 and value
                0: softmax's output times sigmoid(log-sum-exp)
  capped rows   A / max(1, sum A): the normalised output times min(sum A, 1)

The others take the logits from sigattn.attention_weights, and store all of them
in memory.

The forms with a forget gate (2503.02130) set config.attn.forget_gate.

A form may also change the layers, which then have additional parameters:

  output gate   the output of a head is multiplied by sigmoid(W x) (2505.06708)
  alternating   every other layer sees only the last 128 keys, with RoPE; the
                other layers see all keys, without positions
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sigattn import attention, layers


class Form(NamedTuple):
  """A form of attention.

  changes: {path in the config: its new value}. attend: the function that
  replaces dot_product_attention, or None. layer: the subclass of
  layers.SelfAttention that replaces the class of the layers, or None.
  """

  changes: Mapping[str, Any]
  attend: Callable[..., jax.Array] | None = None
  layer: type[layers.SelfAttention] | None = None


def softmax1(query, key, value, **options):
  """Softmax with one added to the denominator."""
  out, lse_BTN = attention.dot_product_attention(
    query, key, value, return_residual=True, **options
  )
  return out * jax.nn.sigmoid(lse_BTN)[..., None].astype(out.dtype)


def capped_rows(query, key, value, **options):
  """A v / max(1, sum A): rows are divided by their sum where it exceeds 1."""
  out, sum_BTN = attention.dot_product_attention(
    query, key, value, return_residual=True, **options
  )
  return out * jnp.minimum(sum_BTN, 1)[..., None].astype(out.dtype)


def soft_capped(query, key, value, *, implementation=None, **options):
  """softmax(c tanh(z / c)) v with c = log n, where sigmoid's b is -c."""
  del implementation
  logits, _, visible = attention.attention_weights(query, key, **options)
  cap = jnp.log(options["n"])
  weights = jax.nn.softmax(cap * jnp.tanh(logits / cap), where=visible)
  return _apply(weights, value)


def softplus(query, key, value, *, implementation=None, **options):
  """softplus(z) / sum softplus(z) (2501.13428, without its scale by length)."""
  del implementation
  logits, _, visible = attention.attention_weights(query, key, **options)
  weights = jnp.where(visible, jax.nn.softplus(logits), 0)
  return _apply(weights / weights.sum(-1, keepdims=True), value)


def _apply(weights_BNTS, value):
  out = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, value)
  return out.astype(value.dtype)


def half_of_the_slopes(query, key, value, *, alibi_slopes, **options):
  """ALiBi in every other head, no positions in the others (2502.18845)."""
  is_kept = jnp.arange(len(alibi_slopes)) % 2 == 0
  return attention.dot_product_attention(
    query, key, value, alibi_slopes=alibi_slopes * is_kept, **options
  )


class _Changed(layers.SelfAttention):
  """A layer whose attention_fn is replaced during a call.

  `extend` adds the parameters that the form needs to the stacked layers of a
  built model.
  """

  def __call__(self, x_BTD, **options):
    before = self.attention_fn, self.rotate
    self.change(x_BTD)
    try:
      return super().__call__(x_BTD, **options)
    finally:
      self.attention_fn, self.rotate = before


class OutputGate(_Changed):
  """Multiplies a head's output by a gate."""

  def extend(self, rngs: nnx.Rngs) -> None:
    depth, width, num_heads, _ = self.query.kernel.shape
    normal = nnx.initializers.normal(width**-0.5)
    self.gate_kernel = nnx.Param(
      normal(rngs.params(), (depth, width, num_heads))
    )
    # Gates are nearly open at the start.
    self.gate_bias = nnx.Param(jnp.full((depth, num_heads), 3.0))

  def change(self, x_BTD):
    product_BTN = x_BTD @ self.gate_kernel[...].astype(x_BTD.dtype)
    logit_BTN = product_BTN.astype(jnp.float32) + self.gate_bias[...]
    gate_BTN, attend = jax.nn.sigmoid(logit_BTN), self.attention_fn

    def gated(*arrays, **options):
      out_BTNH = attend(*arrays, **options)
      return out_BTNH * gate_BTN[..., None].astype(out_BTNH.dtype)

    self.attention_fn = gated


class Alternating(_Changed):
  """Alternates layers with a window and RoPE, and layers with neither."""

  WINDOW = 128

  def extend(self, rngs: nnx.Rngs) -> None:
    del rngs
    # It is never updated, because it has no gradient.
    depth = len(self.query.kernel[...])
    self.is_global = nnx.Param((jnp.arange(depth) % 2).astype(jnp.float32))

  def change(self, x_BTD):
    attend, rotate = self.attention_fn, self.rotate
    is_global = jax.lax.stop_gradient(self.is_global[...]) > 0.5
    place = jnp.arange(x_BTD.shape[1])
    is_near_TS = place[:, None] - place < self.WINDOW
    seen = (is_near_TS | is_global)[None, None]

    def masked(*arrays, mask, **options):
      del mask  # A language model on one text passes none.
      return attend(*arrays, mask=seen, **options)

    self.attention_fn = masked
    self.rotate = lambda x, **where: jnp.where(is_global, x, rotate(x, **where))


def extend(model: nnx.Module, form: Form, rngs: nnx.Rngs) -> nnx.Module:
  """Replaces the attention layers of a built model by those of the form."""
  if form.layer is not None:
    attn = model.stack.blocks.attn
    attn.__class__ = form.layer
    attn.extend(rngs)
  return model


def _normalized(**changes):
  return {"attn.kind": "sigmoid", "attn.normalize": True} | {
    f"attn.{name}": value for name, value in changes.items()
  }


_SOFTMAX = {"attn.kind": "softmax"}

FORMS = {
  "softmax": Form(_SOFTMAX),
  "sigmoid": Form({"attn.kind": "sigmoid"}),
  "normalised, b = -log n": Form(_normalized()),
  "normalised, b = 0": Form(_normalized(logit_bias=0.0)),
  "normalised, b = -10": Form(_normalized(logit_bias=-10.0)),
  "normalised, b = -14": Form(_normalized(logit_bias=-14.0)),
  "capped rows, b = -log n": Form(_normalized(), capped_rows),
  "capped rows, b = 0": Form(_normalized(logit_bias=0.0), capped_rows),
  "softmax1": Form(_SOFTMAX, softmax1),
  "softmax, logits capped at log n": Form(_SOFTMAX, soft_capped),
  "softplus, normalised": Form(_SOFTMAX, softplus),
  "ReLU, normalised": Form({"attn.kind": "relu", "attn.normalize": True}),
}

# Forms that also change the layers or the slopes, for each of three kinds.
_KINDS = {
  "softmax": _SOFTMAX,
  "sigmoid": {"attn.kind": "sigmoid"},
  "normalised": _normalized(),
}
_LAYERS = {"output gate": OutputGate, "alternating": Alternating}
LAYER_FORMS = {
  f"{kind}, forget gate": Form(changes | {"attn.forget_gate": True})
  for kind, changes in _KINDS.items()
} | {
  f"{kind}, {name}": Form(changes, layer=layer)
  for name, layer in _LAYERS.items()
  for kind, changes in _KINDS.items()
}
SLOPE_FORMS = {kind: Form(changes) for kind, changes in _KINDS.items()} | {
  f"{kind}, half of the slopes": Form(changes, half_of_the_slopes)
  for kind, changes in _KINDS.items()
}
FORMS |= SLOPE_FORMS | LAYER_FORMS
