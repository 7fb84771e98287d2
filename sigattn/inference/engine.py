"""Decoding with a language model: the cache, reading prompts, and the loop.

A row's token at position s is in slot s of its cache, whatever the lengths of
the other rows. So the number of a row's tokens determines what is visible. To
compute a token, each matrix and each visible key and value must be read once.
This module avoids all other work:

  parameters  are cast to the dtype of the activations, and split into layers,
              before the first token
  cache       has two arrays a layer, of rows or of pages, written in place,
              which may be in 8 bits
  loop        runs on the device, several tokens at a time

The rows of a State are independent. Each has its own length, its own key and
its own number of tokens to draw. `fill` reads another prompt into a row that
has ended (continuous batching, see batching.py).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from sigattn import layers
from sigattn.inference.pages import PAGE, Pages
from sigattn.inference.sampling import Sampling, sample
from sigattn.tasks import lm
from sigattn.training import setup

# The number of slots is a multiple of it, so that few sizes are compiled.
_SLOTS = 128
# The most tokens, of all rows together, that are read in one step. It bounds
# the memory of the activations.
_PART = 2**16
_LONGEST_PART, _SHORTEST_PART = 2048, 16  # tokens of a row in a step
_LOGITS = 2**30  # bytes of logits that exist at once when texts are scored


class State(NamedTuple):
  """The state of decoding between two tokens, of B rows.

  A row has ended when it has no token left to draw.
  """

  length_B: jax.Array  # int32, the number of tokens in the cache
  left_B: jax.Array  # int32, how many tokens may still be drawn
  drawn_B: jax.Array  # int32, how many were drawn for the prompt
  key_B: jax.Array  # the key with which the prompt's tokens are drawn
  logits_BV: jax.Array  # logits of the next token
  cache: tuple[layers.Cache, ...]
  table_BM: jax.Array | None = None  # the pages of each row, see pages.py


class Prompt(NamedTuple):
  """A prompt that `Engine.fill` reads into a row.

  row: the number of the row. token_T: the tokens to read, at least one. left:
  the most tokens to draw. key: for the draws, as jax.random.key_data returns
  it. drawn: how many tokens were drawn with this key before. known: how many of
  the first tokens have their keys and values in the row's pages already.
  """

  row: int
  token_T: np.ndarray
  left: int
  key: np.ndarray
  drawn: int = 0
  known: int = 0


def decode(
  model: lm.LanguageModel,
  state: State,
  count: int,
  sampling: Sampling,
  size: int,
  end: int,
) -> tuple[jax.Array, State]:
  """Draws `count` tokens for each row.

  The i-th token of a prompt is drawn with fold_in(key, i), whatever the other
  rows are.

  Args:
    model: the language model.
    state: the State after the previous token.
    count: the number of tokens.
    sampling: how tokens are drawn.
    size: of the tokenizer's vocabulary; no index >= size is drawn.
    end: the token that ends a row.

  Returns:
    (tokens (B, count), State). After a row has ended, its tokens are `end`.
  """
  in_vocabulary_1V = (jnp.arange(state.logits_BV.shape[1]) < size)[None]

  def step(s, _):
    logits_BV = jnp.where(in_vocabulary_1V, s.logits_BV, -jnp.inf)
    key_B = None
    if sampling.temperature:
      key_B = jax.vmap(jax.random.fold_in)(s.key_B, s.drawn_B)
    goes_on_B = s.left_B > 0
    token_B = jnp.where(goes_on_B, sample(key_B, logits_BV, sampling), end)
    logits_BV, cache = model.decode(token_B, s.cache, s.length_B, s.table_BM)
    state = s._replace(
      # A row that has ended writes to one slot, which nothing reads.
      length_B=s.length_B + goes_on_B,
      left_B=jnp.where(token_B == end, 0, s.left_B - 1),
      drawn_B=s.drawn_B + goes_on_B,
      logits_BV=logits_BV,
      cache=cache,
    )
    return state, token_B

  # The number of steps is fixed, so that the device does not wait after each
  # token until the host has decided whether there is another one.
  state, token_TB = jax.lax.scan(step, state, length=count)
  return token_TB.T, state


def slots(longest: int, max_tokens: int) -> int:
  """The slots of a row that reads up to `longest` tokens and draws more."""
  part = _part(longest)
  needed = max(-(-longest // part) * part, longest + max_tokens)
  return -(-needed // _SLOTS) * _SLOTS


def _part(longest):
  """How many tokens of a row a step reads, if the longest has `longest`."""
  part = 1 << (longest - 1).bit_length()
  return min(max(part, _SHORTEST_PART), _LONGEST_PART)


def prepared(
  config: ConfigDict, params: dict[str, Any], release: bool = False
) -> tuple[nnx.GraphDef, Any]:
  """Prepares the model of a config to generate; returns it split by nnx.

  See lm.LanguageModel.prepare_to_generate. release: whether `params` is
  emptied. Each float32 matrix is then freed before the next one is cast, so
  that a 16-bit model is prepared in little more memory than its float32
  parameters take.
  """
  graphdef, _ = shapes(config)
  prepare = jax.jit(lambda x: nnx.state(_prepare(config)(x)))
  if not release:
    return graphdef, prepare(params)
  _cast_matrices(params, jnp.dtype(config.dtype))
  state = prepare(params)
  params.clear()
  return graphdef, state


def _cast_matrices(tree, dtype, axes=0):
  """Casts the matrices of a nested dict in place, one by one.

  axes: the number of leading axes along which layers are stacked.
  """
  for name, x in tree.items():
    if isinstance(x, dict):
      _cast_matrices(x, dtype, axes + (name == "blocks"))
    elif x.ndim - axes > 1:
      tree[name] = x.astype(dtype).block_until_ready()


def shapes(config: ConfigDict) -> tuple[nnx.GraphDef, Any]:
  """As `prepared`, with the shapes and dtypes of the parameters only."""
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

    def program(function, *static, donate=None):
      return jax.jit(
        functools.partial(function, graphdef),
        static_argnames=static,
        donate_argnames=donate,
      )

    def decode_chunk(graphdef, params, state, count, sampling):
      model = nnx.merge(graphdef, params)
      return decode(model, state, count, sampling, size, end)

    self._empty = program(_empty, "batch", "shape", "dtype")
    self._read = program(_read, "whole", donate="state")
    self._decode = program(decode_chunk, "count", "sampling", donate="state")
    self._score = program(_score)

  def empty(self, batch: int, slots: int, dtype: str | None = None) -> State:
    """A State whose rows have ended, each with at least `slots` slots.

    dtype: of the cache, see lm.LanguageModel.empty_cache.
    """
    shape = batch, -(-slots // _SLOTS) * _SLOTS
    return self._empty(self.params, batch=batch, shape=shape, dtype=dtype)

  def empty_pages(self, pages: Pages, dtype: str | None = None) -> State:
    """As `empty`, with a paged cache."""
    batch, shape = len(pages.table_BM), (pages.count, PAGE)
    state = self._empty(self.params, batch=batch, shape=shape, dtype=dtype)
    return state._replace(table_BM=jnp.asarray(pages.table_BM))

  def fill(self, state: State, prompts: Sequence[Prompt]) -> State:
    """Reads each prompt into its row. The other rows do not change.

    The arrays of the given State are donated. Each row must have the `slots` or
    the pages that its prompt needs.
    """
    if not prompts:
      return state
    # Prompts of similar length are read together, so that there is little
    # padding. Their number is a power of two, so that few shapes are compiled.
    waiting = sorted(prompts, key=_unknown)
    while waiting:
      part = _part(_unknown(waiting[-1]))
      most = 1 << min(len(waiting), _PART // part).bit_length() - 1
      batch = len(state.length_B)
      # If each row gets a prompt, all are read at once where memory allows.
      together = batch if len(waiting) == batch <= _PART // part else most
      group, waiting = waiting[-together:], waiting[:-together]
      state = self._fill(state, sorted(group, key=lambda x: x.row), part)
    return _begin(state, *_columns(prompts, len(state.length_B)))

  def _fill(self, state, group, part):
    length_R = np.array([_unknown(x) for x in group], np.int32)
    padded = -(-length_R.max() // part) * part
    token_RT = np.stack(
      [np.pad(x.token_T[x.known :], (0, padded - _unknown(x))) for x in group]
    ).astype(np.int32)
    rows = np.array([x.row for x in group], np.int32)
    known_R = np.array([x.known for x in group], np.int32)
    if len(rows) == len(state.length_B):
      rows = None
    for first in range(0, padded, part):
      state = self._read(
        self.params,
        state,
        rows,
        token_RT[:, first : first + part],
        first + known_R if known_R.any() else first,
        length_R - 1 - first,
        whole=padded == part and not known_R.any(),
      )
    return state

  def decode(
    self, state: State, count: int, sampling: Sampling
  ) -> tuple[jax.Array, State]:
    """`decode` on the device. The arrays of the given State are donated."""
    return self._decode(self.params, state, count=count, sampling=sampling)

  def score(self, token_BT: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Scores each token but the first, given the tokens before it.

    token_BT: int32, padded at the end; T - 1 should be a power of two.
    Returns (float32 (B, T - 1), bool (B, T - 1)): the log-probability of the
    token, in nats, and whether it is the most likely one.
    """
    return self._score(self.params, token_BT)

  def lower_decode(
    self, state: State, count: int, sampling: Sampling
  ) -> jax.stages.Lowered:
    """The lowered program of `decode`, for inspection."""
    return self._decode.lower(
      self.params, state, count=count, sampling=sampling
    )


def _unknown(prompt):
  """The number of tokens that must be read."""
  return len(prompt.token_T) - prompt.known


def _empty(graphdef, params, batch, shape, dtype):
  model = nnx.merge(graphdef, params)
  none_B = jnp.zeros((batch,), jnp.int32)
  return State(
    length_B=none_B,
    left_B=none_B,
    drawn_B=none_B,
    key_B=jnp.broadcast_to(jax.random.key(0), (batch,)),
    logits_BV=jnp.zeros((batch, model.embed.shape[0]), jnp.float32),
    cache=model.empty_cache(*shape, dtype),
  )


def _read(graphdef, params, state, rows, token_RT, first, last_R, whole):
  """Reads a part of R prompts into rows of the state.

  rows: the numbers of the rows; None for all. first: the position of the part's
  first token, one number for all rows or one for each. last_R: the index of
  each prompt's last token in the part; it may lie outside of the part. whole:
  whether the part is the whole prompts, and the cache has nothing before them.
  """
  model = nnx.merge(graphdef, params)
  length = token_RT.shape[1]
  is_paged = state.table_BM is not None
  logits_RV, table_RM = _rows_of((state.logits_BV, state.table_BM), rows)
  # Pages belong to all rows together. Slots belong to one row each.
  cache = state.cache if is_paged else _rows_of(state.cache, rows)
  if whole and rows is not None and not is_paged:
    dtype = state.cache[0].key_BSKH.dtype
    cache = model.empty_cache(*token_RT.shape, dtype)
  new_RV, cache = model.extend(
    token_RT,
    cache,
    None if whole else first,
    jnp.clip(last_R, 0, length - 1),
    table_RM,
  )
  is_here_R1 = ((last_R >= 0) & (last_R < length))[:, None]
  logits_RV = jnp.where(is_here_R1, new_RV, logits_RV)
  if not is_paged:
    cache = _put(state.cache, rows, cache)
  logits_BV = _put(state.logits_BV, rows, logits_RV)
  return state._replace(cache=cache, logits_BV=logits_BV)


def _score(graphdef, params, token_BT):
  model = nnx.merge(graphdef, params)
  target_BT = jnp.maximum(token_BT[:, 1:], 0)
  batch, length = target_BT.shape
  logits = 4 * batch * length * model.embed.shape[0]
  scored = model.score(
    token_BT[:, :-1],
    target_BT,
    jnp.ones((batch, length), jnp.float32),
    chunks=math.gcd(length, 1 << (logits // _LOGITS).bit_length()),
  )
  return -scored.nats_BT, scored.correct_BT


def _rows_of(tree, rows):
  return tree if rows is None else jax.tree.map(lambda x: x[rows], tree)


def _put(tree, rows, new):
  """Replaces rows of the arrays, in place if nothing else reads these."""
  if rows is None:
    return new
  return jax.tree.map(lambda x, y: x.at[rows, : y.shape[1]].set(y), tree, new)


def _columns(prompts, batch):
  """The new prompts as arrays by row: (is_new, length, left, drawn, key)."""
  numbers_B4 = np.zeros((batch, 4), np.int32)
  key_B2 = np.zeros((batch, *prompts[0].key.shape), np.uint32)
  for x in prompts:
    numbers_B4[x.row] = 1, len(x.token_T), x.left, x.drawn
    key_B2[x.row] = x.key
  return *numbers_B4.T, key_B2


@functools.partial(jax.jit, donate_argnums=0)
def _begin(state, begins_B, length_B, left_B, drawn_B, key_B2):
  def chosen(new, old):
    return jnp.where(begins_B > 0, new, old)

  return state._replace(
    length_B=chosen(length_B, state.length_B),
    left_B=chosen(left_B, state.left_B),
    drawn_B=chosen(drawn_B, state.drawn_B),
    key_B=chosen(jax.random.wrap_key_data(key_B2), state.key_B),
  )
