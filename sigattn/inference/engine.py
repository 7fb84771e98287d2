"""Tokens after tokens: the cache, reading prompts, and the decoding loop.

A row's token at position s lies in slot s of its cache, whatever the lengths of
the other rows, so that the number of its tokens says all about what is visible.
Every token reads each matrix and each visible key and value once, which is the
least time that it can take; the rest of this module avoids other work:

  parameters  in the dtype of the activations and layer by layer, from the start
  cache       two arrays a layer, written in place
  loop        on the device, several tokens at a time
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from sigattn import layers
from sigattn.inference.sampling import Sampling, sample
from sigattn.tasks import lm
from sigattn.training import setup

# Slots come in multiples of it, so that few sizes are compiled.
_SLOTS = 128
# Tokens of all rows together that a step of reading prompts takes: it bounds
# the memory of the activations.
_PART = 2**16
_LONGEST_PART, _SHORTEST_PART = 2048, 64  # tokens of one row


class State(NamedTuple):
  """The state of decoding between two tokens."""

  length_B: jax.Array  # int32, the tokens that the cache holds
  logits_BV: jax.Array  # logits of the next token
  cache: tuple[layers.Cache, ...]
  done_B: jax.Array  # bool, whether the row has ended
  rng: jax.Array


def decode(
  model: lm.LanguageModel,
  state: State,
  count: int,
  sampling: Sampling,
  size: int,
  end: int,
) -> tuple[jax.Array, State]:
  """Draws `count` tokens for each row.

  Args:
    model: the language model.
    state: the State after the previous token.
    count: the number of tokens.
    sampling: how they are drawn.
    size: the vocabulary of the tokenizer; no index >= size is drawn.
    end: the token that ends a row.

  Returns:
    (tokens (B, count), State). After a row has ended, its tokens are `end`.
  """
  in_vocabulary_1V = (jnp.arange(state.logits_BV.shape[1]) < size)[None]

  def step(s, _):
    rng, key = s.rng, None
    if sampling.temperature:
      rng, key = jax.random.split(rng)
    logits_BV = jnp.where(in_vocabulary_1V, s.logits_BV, -jnp.inf)
    token_B = jnp.where(s.done_B, end, sample(key, logits_BV, sampling))
    done_B = s.done_B | (token_B == end)
    logits_BV, cache = model.decode(token_B, s.cache, s.length_B)
    # A row that has ended stays in its place, where nothing reads it.
    length_B = s.length_B + ~s.done_B
    return State(length_B, logits_BV, cache, done_B, rng), token_B

  # The number of tokens is known, and so the device does not wait for the host
  # to decide after each token whether there is another one.
  state, token_TB = jax.lax.scan(step, state, length=count)
  return token_TB.T, state


def prepared(config: ConfigDict, params: Any) -> tuple[nnx.GraphDef, Any]:
  """The model of a config in the form that it generates with, split by nnx.

  See lm.LanguageModel.prepare_to_generate.
  """
  prepare = _prepare(config)
  graphdef, _ = shapes(config)
  return graphdef, jax.jit(lambda x: nnx.state(prepare(x)))(params)


def shapes(config: ConfigDict) -> tuple[nnx.GraphDef, Any]:
  """`prepared` with the shapes and dtypes of the parameters alone."""
  params = setup.shapes(config)
  return nnx.split(nnx.eval_shape(_prepare(config), params))


def _prepare(config):
  static = setup.graphdef(config)

  def prepare(params):
    model = nnx.merge(static, params)
    model.prepare_to_generate()
    return model

  return prepare


class Engine:
  """A language model that reads prompts and continues them, token by token."""

  def __init__(
    self, graphdef: nnx.GraphDef, params: Any, size: int, end: int
  ) -> None:
    """graphdef, params: what `prepared` returns. size, end: as in `decode`."""
    self.params = params

    @functools.partial(jax.jit, static_argnames=("batch", "slots"))
    def empty(params, rng, batch, slots):
      model = nnx.merge(graphdef, params)
      return State(
        length_B=jnp.zeros((batch,), jnp.int32),
        logits_BV=jnp.zeros((batch, model.embed.shape[0]), jnp.float32),
        cache=model.empty_cache(batch, slots),
        done_B=jnp.zeros((batch,), bool),
        rng=rng,
      )

    @functools.partial(
      jax.jit, static_argnames="whole", donate_argnames="state"
    )
    def read(params, state, token_BT, first, length_B, whole):
      """`first`: the position of the tokens. `whole`: whether it is 0."""
      model = nnx.merge(graphdef, params)
      last_B = length_B - 1 - first
      parts = token_BT.shape[1]
      logits_BV, cache = model.extend(
        token_BT,
        state.cache,
        None if whole else first,
        jnp.clip(last_B, 0, parts - 1),
      )
      is_here_B1 = ((last_B >= 0) & (last_B < parts))[:, None]
      logits_BV = jnp.where(is_here_B1, logits_BV, state.logits_BV)
      return state._replace(logits_BV=logits_BV, cache=cache, length_B=length_B)

    @functools.partial(
      jax.jit, static_argnames=("count", "sampling"), donate_argnames="state"
    )
    def decode_chunk(params, state, count, sampling):
      model = nnx.merge(graphdef, params)
      return decode(model, state, count, sampling, size, end)

    self._empty, self._read, self._decode = empty, read, decode_chunk

  def empty(self, batch: int, slots: int, rng: jax.Array) -> State:
    """The State before the first token, with room for `slots` tokens a row."""
    slots = -(-slots // _SLOTS) * _SLOTS
    return self._empty(self.params, rng, batch=batch, slots=slots)

  def prefill(
    self, prompts: Sequence[np.ndarray], max_tokens: int, rng: jax.Array
  ) -> State:
    """Reads the prompts, part by part, and returns the State after them.

    Args:
      prompts: the tokens of each, at least one.
      max_tokens: the number of tokens that the cache has room for after them.
      rng: the key from which tokens will be drawn.
    """
    batch, longest = len(prompts), max(map(len, prompts))
    part = 1 << max(4, (longest - 1).bit_length())
    most = 1 << (_PART // batch).bit_length() - 1
    part = min(part, max(_SHORTEST_PART, min(most, _LONGEST_PART)))
    padded = -(-longest // part) * part
    token_BT = np.stack([np.pad(x, (0, padded - len(x))) for x in prompts])
    length_B = np.array([len(x) for x in prompts], np.int32)
    state = self.empty(batch, max(padded, longest + max_tokens), rng)
    for first in range(0, padded, part):
      token_BC = token_BT[:, first : first + part].astype(np.int32)
      state = self._read(
        self.params, state, token_BC, first, length_B, whole=padded == part
      )
    return state

  def decode(
    self, state: State, count: int, sampling: Sampling
  ) -> tuple[jax.Array, State]:
    """`decode` on the device; the given State is used up."""
    return self._decode(self.params, state, count=count, sampling=sampling)

  def lower_decode(
    self, state: State, count: int, sampling: Sampling
  ) -> jax.stages.Lowered:
    """The program of `decode`, to be compiled and looked at."""
    return self._decode.lower(
      self.params, state, count=count, sampling=sampling
    )
