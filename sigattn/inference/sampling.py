"""How the next token is drawn from the logits."""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
  """How the next token is drawn: from softmax(logits / temperature).

  temperature: 0 always takes the most likely token.
  top_k: only the k most likely tokens can be drawn; 0 allows all.
  top_p: only the smallest set of most likely tokens whose probabilities add up
    to at least top_p can be drawn (nucleus sampling, 1904.09751); 1 allows all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def validate(self) -> None:
    """Raises ValueError for a value out of range."""
    x = self.temperature
    if not isinstance(x, numbers.Real) or not 0 <= x < float("inf"):
      raise ValueError(f"temperature={x!r}; must be a number >= 0")
    if not isinstance(self.top_k, numbers.Integral) or self.top_k < 0:
      raise ValueError(f"top_k={self.top_k!r}; must be a whole number >= 0")
    if not isinstance(self.top_p, numbers.Real) or not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p!r}; must be a number > 0 and <= 1")


def sample(
  key_B: jax.Array | None, logits_BV: jax.Array, sampling: Sampling
) -> jax.Array:
  """Draws one token for each row of logits, with its own key; int32 (B,).

  key_B may be None where the temperature is 0.
  """
  if sampling.temperature == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)
  logits_BV = keep(logits_BV / sampling.temperature, sampling)
  return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def keep(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """The logits of the tokens that top_k and top_p allow, -inf for others."""
  if sampling.top_k and sampling.top_k < logits_BV.shape[1]:
    least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
    share_BV = jax.nn.softmax(sorted_BV)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
    needed_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
    least_B1 = needed_BV.min(-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return logits_BV
