"""Decoder-only language model and its task: predicting the next token.

`check`, `build`, `loss`, `evaluate`, UNIT and METRICS are what sigattn.tasks
wants of a task.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sigattn import blocks, layers, positions
from sigattn import check as checks

UNIT = "rows"
METRICS = ("loss", "accuracy", "bits_per_byte", "perplexity")
POSITIONS = ("rope", "none")


class LanguageModel(nnx.Module):
  """Tokens -> embedding -> causal stack -> norm -> logits by the embedding.

  No biases; input and output share the embedding (1608.05859).

  Initialisation, as of the published models (2409.04431, AXLearn's gala):
    embed    normal, variance 1 / width: logits of a normed x have variance 1
    kernels  normal, variance 1 / inputs
  """

  def __init__(
    self, stack, *, vocab_size, width, norm, has_positions, dtype, rngs
  ):
    self.stack, self.dtype = stack, dtype
    self.has_positions = has_positions
    normal = nnx.initializers.normal(width**-0.5)
    self.embed = nnx.Param(normal(rngs.params(), (vocab_size, width)))
    self.has_norm = norm is not None
    if self.has_norm:
      self.norm = layers.make_norm(norm, width, rngs)

  def __call__(self, token_BT, rng=None, *, segment_ids=None):
    """Logits (B, T, V) of the token after each, float32.

    token_BT: integers; -1 is padding, at the end of a row or hidden by its
    segment. rng: of what drops at random; None: nothing does. segment_ids:
    (B, T), tokens see those of their own segment.
    """
    attn_args = {"segment_ids": segment_ids}
    if self.has_positions:
      attn_args["positions"] = offsets(token_BT, segment_ids)
    x_BTD = self.embed[...][token_BT].astype(self.dtype)
    x_BTD = self.stack(x_BTD, rng, **attn_args)
    if self.has_norm:
      x_BTD = layers.normalize(self.norm, x_BTD)
    return jnp.einsum(
      "BTD,VD->BTV",
      x_BTD,
      self.embed[...].astype(self.dtype),
      preferred_element_type=jnp.float32,
    )


def offsets(token_BT, segment_ids):
  """How many tokens of its own segment stand before each token, (B, T)."""
  place_T = jnp.arange(token_BT.shape[1])[None]
  if segment_ids is None:
    return place_T
  before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  first_BT = jnp.where(segment_ids != before, place_T, 0)
  return place_T - jax.lax.cummax(first_BT, axis=1)


def check(config):
  blocks.check(config)
  checks.choice(config, "model.positions", POSITIONS)
  checks.number(config, "data.vocab_size", low=1)


def build(config, rngs):
  """The LanguageModel of a config, its sigmoid's n the training length."""
  model = config.model
  stack = blocks.make(
    config,
    max_length=config.data.length,
    is_causal=True,
    use_bias=False,
    kernel_init=layers.FAN_IN_INIT,
    rotate=positions.rope if model.positions == "rope" else None,
    rngs=rngs,
  )
  return LanguageModel(
    stack,
    vocab_size=config.data.vocab_size,
    width=model.width,
    norm=None if model.norm == "post" else model.norm_kind,
    has_positions=model.positions == "rope",
    dtype=jnp.dtype(config.dtype),
    rngs=rngs,
  )


def loss(config, model, batch, rng):
  """Mean cross-entropy of the tokens that have one before them.

  Returns (loss, {"loss", "accuracy"}).
  """
  nats_BT, right_BT, real_BT = _predict(model, batch, rng)
  count = jnp.maximum(real_BT.sum(), 1)
  value = nats_BT.sum() / count
  return value, {"loss": value, "accuracy": right_BT.sum() / count}


def _predict(model, batch, rng=None):
  """Nats and 1 where right, both 0 where there is nothing to predict."""
  token, segment = batch["token"], batch.get("segment")
  target_BT, real_BT = token[:, 1:], token[:, 1:] >= 0
  if segment is not None:
    real_BT &= segment[:, 1:] == segment[:, :-1]
    segment = segment[:, :-1]
  logits_BTV = model(token[:, :-1], rng, segment_ids=segment)
  nats_BT = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV, jnp.maximum(target_BT, 0)
  )
  right_BT = logits_BTV.argmax(-1) == target_BT
  return nats_BT * real_BT, right_BT & real_BT, real_BT


def evaluate(config, model, batch):
  nats_BT, right_BT, real_BT = _predict(model, batch)
  weight_B = batch["weight"]
  values = {"loss": nats_BT, "accuracy": right_BT, "weight": real_BT}
  sums = {name: jnp.vdot(weight_B, x.sum(1)) for name, x in values.items()}
  return sums
