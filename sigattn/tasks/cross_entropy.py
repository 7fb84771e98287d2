"""The cross-entropy of logits x embed^T, without holding all logits at once.

The float32 logits of 32,768 tokens and as many symbols take 4 GiB, and so does
their gradient. Here they are computed for some tokens at a time. The gradients
of both factors are computed together with the loss, because the logits of a
token determine its gradient, up to the cotangent of the loss. Liger
(2410.10989) does the same for PyTorch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scored(NamedTuple):
  """The result of `linear_cross_entropy`.

  total: the sum of weight_BT * nats_BT, float32; only this is differentiable.
  nats_BT: -log softmax(logits)[target], float32.
  correct_BT: whether the target is the first of the largest logits.
  """

  total: jax.Array
  nats_BT: jax.Array
  correct_BT: jax.Array


def linear_cross_entropy(
  x_BTD: jax.Array,
  embed_VD: jax.Array,
  target_BT: jax.Array,
  weight_BT: jax.Array,
  chunks: int = 1,
  logit_cap: float | None = None,
) -> Scored:
  """Scores the logits x embed^T, which are float32, against the targets.

  With p = softmax(logits) and weights w the gradient of the total is

    dlogits = w (p - onehot(target))    dx = dlogits embed
    dembed = dlogits^T x                dw = nats

  With a cap c, p is softmax(capped) for capped = cap(logits, c), and dlogits
  has the factor 1 - (capped / c)^2.

  Products are computed in x's dtype, to which the embedding and dlogits are
  rounded. Sums are float32, including the sum of dembed over the chunks.

  Args:
    x_BTD: in float32, bfloat16 or float16. embed_VD: in any of them.
    target_BT: int, from 0 to V - 1.
    weight_BT: of each token in the total, 0 for those that do not count.
    chunks: the number of parts, along T, that are computed one after another.
      The logits of one part need B T V / chunks floats of memory.
    logit_cap: c of `cap`, None for none.

  Raises:
    ValueError: if `chunks` does not divide T.
  """
  length = x_BTD.shape[1]
  if chunks < 1 or length % chunks:
    raise ValueError(f"{chunks=}; must divide the {length} tokens of a row")
  weight_BT = weight_BT.astype(jnp.float32)
  scored = _scored(chunks, logit_cap, x_BTD, embed_VD, target_BT, weight_BT)
  # stop_gradient makes explicit that only the total has a gradient. Autodiff
  # would take the other gradients for zero without an error.
  return scored._replace(nats_BT=jax.lax.stop_gradient(scored.nats_BT))


def cap(logits: jax.Array, logit_cap: float | None) -> jax.Array:
  """c tanh(logits / c) for logit_cap=c (2408.00118); the logits for None."""
  return (
    logits if logit_cap is None else logit_cap * jnp.tanh(logits / logit_cap)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scored(chunks, logit_cap, x_BTD, embed_VD, target_BT, weight_BT):
  embed_VD = embed_VD.astype(x_BTD.dtype)

  def score(_, part):
    x_BTD, target_BT, weight_BT = part
    logits_BTV = cap(_logits(x_BTD, embed_VD), logit_cap)
    nats_BT = _log_sum(logits_BTV) - _at(logits_BTV, target_BT)
    return None, (nats_BT, logits_BTV.argmax(-1) == target_BT)

  parts = x_BTD, target_BT, weight_BT
  nats_BT, correct_BT = _over_chunks(score, None, parts, chunks)[1]
  return Scored(jnp.vdot(weight_BT, nats_BT), nats_BT, correct_BT)


def _with_gradients(chunks, logit_cap, x_BTD, embed_VD, target_BT, weight_BT):
  embed_dtype, embed_VD = embed_VD.dtype, embed_VD.astype(x_BTD.dtype)

  def score(d_embed_VD, part):
    x_BTD, target_BT, weight_BT = part
    logits_BTV = cap(_logits(x_BTD, embed_VD), logit_cap)
    log_sum_BT = _log_sum(logits_BTV)
    nats_BT = log_sum_BT - _at(logits_BTV, target_BT)
    correct_BT = logits_BTV.argmax(-1) == target_BT
    p_BTV = jnp.exp(logits_BTV - log_sum_BT[..., None])
    symbol_BTV = jax.lax.broadcasted_iota(jnp.int32, p_BTV.shape, 2)
    is_target_BTV = symbol_BTV == target_BT[..., None]
    d_logits_BTV = weight_BT[..., None] * (p_BTV - is_target_BTV)
    if logit_cap is not None:
      d_logits_BTV *= 1 - jnp.square(logits_BTV / logit_cap)
    d_logits_BTV = d_logits_BTV.astype(x_BTD.dtype)
    d_x_BTD = jnp.einsum("BTV,VD->BTD", d_logits_BTV, embed_VD)
    d_embed_VD += jnp.einsum(
      "BTV,BTD->VD", d_logits_BTV, x_BTD, preferred_element_type=jnp.float32
    )
    return d_embed_VD, (nats_BT, correct_BT, d_x_BTD)

  zeros_VD = jnp.zeros(embed_VD.shape, jnp.float32)
  parts = x_BTD, target_BT, weight_BT
  d_embed_VD, outs = _over_chunks(score, zeros_VD, parts, chunks)
  nats_BT, correct_BT, d_x_BTD = outs
  scored = Scored(jnp.vdot(weight_BT, nats_BT), nats_BT, correct_BT)
  return scored, (d_x_BTD, d_embed_VD.astype(embed_dtype), nats_BT)


def _scale_gradients(chunks, logit_cap, saved, cotangents):
  del chunks, logit_cap
  d_x_BTD, d_embed_VD, d_weight_BT = (
    (cotangents.total * x).astype(x.dtype) for x in saved
  )
  return d_x_BTD, d_embed_VD, None, d_weight_BT


_scored.defvjp(_with_gradients, _scale_gradients)


def _logits(x_BTD, embed_VD):
  return jnp.einsum(
    "BTD,VD->BTV", x_BTD, embed_VD, preferred_element_type=jnp.float32
  )


def _log_sum(logits_BTV):
  return jax.nn.logsumexp(logits_BTV, axis=-1)


def _at(logits_BTV, target_BT):
  return jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]


def _over_chunks(function, carry, parts, chunks):
  """Calls function(carry, parts) -> (carry, outs) for each chunk along T.

  A chunk has every chunks-th token of each row, so that each device of a mesh
  that splits the batch or the rows has its own part of every chunk.
  """
  if chunks == 1:
    return function(carry, parts)

  def cut(x):
    shape = x.shape[0], x.shape[1] // chunks, chunks, *x.shape[2:]
    return jnp.moveaxis(x.reshape(shape), 2, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  carry, outs = jax.lax.scan(function, carry, jax.tree.map(cut, parts))
  return carry, jax.tree.map(join, outs)
