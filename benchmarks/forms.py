"""The forms of attention that benchmarks/science.py compares.

A form is a set of changes of config.attn, and for the controls also a function
that takes the place of sigattn.dot_product_attention. No kernel has the
controls. Two of them need none, because they follow from what a row is divided
by, which return_residual returns:

  softmax1      e^z / (1 + sum e^z), the softmax with a key of logit 0 and value
                0: softmax's output times sigmoid(log-sum-exp)
  capped rows   A / max(1, sum A): the normalised output times min(sum A, 1)

The others take the logits from sigattn.attention_weights and hold all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sigattn import attention


class Form(NamedTuple):
  """changes: of the config, by path. attend: None, or what attends instead."""

  changes: Mapping[str, Any]
  attend: Callable[..., jax.Array] | None = None


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
