"""Continues texts with a trained language model.

  python -m sigattn generate --workdir=runs/lm_sigmoid/default \\
    --prompt="In the beginning" --temperature=0.7

prints the text while it is generated. With several --prompt flags, the prompts
are continued as one batch and printed at the end. In a notebook:

  generator = Generator.load("runs/lm_sigmoid/default")
  [text] = generator(["In the beginning"], max_tokens=100)

The n of sigmoid attention stays the constant that the layer was built with,
however long the text becomes.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl import logging as absl_logging
from flax import nnx
from ml_collections import ConfigDict

from sigattn import layers
from sigattn.data import text
from sigattn.tasks import lm
from sigattn.training import checkpoint, setup

_CHUNK = 16  # tokens that are generated before a stream yields them


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
    if not 0 <= self.temperature < float("inf"):
      raise ValueError(f"temperature={self.temperature!r}; must be >= 0")
    if self.top_k < 0:
      raise ValueError(f"top_k={self.top_k!r}; must be >= 0")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p!r}; must be > 0 and <= 1")


def sample(
  rng: jax.Array, logits_BV: jax.Array, sampling: Sampling
) -> jax.Array:
  """Draws one token for each row of logits; int32 (B,)."""
  if sampling.temperature == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)
  logits_BV = keep(logits_BV / sampling.temperature, sampling)
  return jax.random.categorical(rng, logits_BV).astype(jnp.int32)


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


class State(NamedTuple):
  """The state of decoding between two tokens."""

  place: jax.Array  # int32 scalar, the cache slot of the next token
  start_B: jax.Array  # the first slot of each row that is not padding
  logits_BV: jax.Array  # logits of the next token
  cache: layers.Cache
  done_B: jax.Array  # bool, whether the row has ended
  rng: jax.Array


def prefill(
  model: lm.LanguageModel,
  token_BT: jax.Array,
  start_B: jax.Array,
  slots: int,
  rng: jax.Array,
) -> State:
  """Reads the prompts and returns the State after them.

  Args:
    model: the language model.
    token_BT: the prompts, padded at the start so that all end at T.
    start_B: the first slot of each row that is not padding.
    slots: the number of tokens that the cache holds, prompt included.
    rng: the key from which tokens will be drawn.
  """
  slot_T = jnp.arange(token_BT.shape[1])[None]
  segment_BT = (slot_T >= start_B[:, None]).astype(jnp.int32)
  logits_BV, cache = model.prefill(token_BT, segment_BT, slots)
  place = jnp.asarray(token_BT.shape[1], jnp.int32)
  done_B = jnp.zeros(token_BT.shape[:1], bool)
  return State(place, start_B, logits_BV, cache, done_B, rng)


def decode(
  model: lm.LanguageModel,
  state: State,
  count: int,
  sampling: Sampling,
  size: int,
  end: int,
) -> tuple[jax.Array, State]:
  """Draws up to `count` tokens per row and stops when all rows have ended.

  Args:
    model: the language model.
    state: the State after the previous token.
    count: the maximum number of tokens.
    sampling: how they are drawn.
    size: the vocabulary of the tokenizer; no index >= size is drawn.
    end: the token that ends a row.

  Returns:
    (tokens (B, count), State). After a row has ended, its tokens are `end`.
  """
  batch, vocabulary = state.logits_BV.shape
  in_vocabulary_V = jnp.arange(vocabulary) < size

  def unfinished(carry):
    i, state, _ = carry
    return (i < count) & ~state.done_B.all()

  def step(carry):
    i, s, token_BT = carry
    rng, key = jax.random.split(s.rng)
    logits_BV = jnp.where(in_vocabulary_V[None], s.logits_BV, -jnp.inf)
    token_B = jnp.where(s.done_B, end, sample(key, logits_BV, sampling))
    token_BT = token_BT.at[:, i].set(token_B)
    logits_BV, cache = model.decode(token_B, s.cache, s.place, s.start_B)
    done_B = s.done_B | (token_B == end)
    state = State(s.place + 1, s.start_B, logits_BV, cache, done_B, rng)
    return i + 1, state, token_BT

  token_BT = jnp.full((batch, count), end, jnp.int32)
  _, state, token_BT = jax.lax.while_loop(
    unfinished, step, (jnp.zeros((), jnp.int32), state, token_BT)
  )
  return token_BT, state


class Generator:
  """A language model with its tokenizer: continues texts."""

  def __init__(self, config: ConfigDict, params: Any) -> None:
    """Raises ValueError if the config is not of the task "lm"."""
    if config.task != "lm":
      raise ValueError(f"config.task={config.task!r}; must be 'lm'")
    self.tokenizer = text.tokenizer(config)
    static = setup.graphdef(config)
    self._params = params
    size, end = self.tokenizer.size, self.tokenizer.end

    @functools.partial(jax.jit, static_argnames="slots")
    def prefill_prompts(params, token_BT, start_B, rng, slots):
      return prefill(nnx.merge(static, params), token_BT, start_B, slots, rng)

    @functools.partial(
      jax.jit, static_argnames=("count", "sampling"), donate_argnames="state"
    )
    def decode_chunk(params, state, count, sampling):
      model = nnx.merge(static, params)
      return decode(model, state, count, sampling, size, end)

    self._prefill, self._decode = prefill_prompts, decode_chunk

  @classmethod
  def load(
    cls, workdir: str | os.PathLike[str], step: int | str | None = None
  ) -> Self:
    """Loads the model of a run.

    workdir, step: as in checkpoint.load, which raises ValueError if there is no
    such run or step.
    """
    config, params, _ = checkpoint.load(workdir, step)
    return cls(config, params)

  def __call__(
    self,
    prompts: Sequence[str],
    *,
    max_tokens: int = 256,
    seed: int = 0,
    **sampling: float,
  ) -> list[str]:
    """Returns the continuation of each prompt, without the prompt.

    Args:
      prompts: texts, which are continued as one batch.
      max_tokens: the maximum number of new tokens per prompt.
      seed: of the random draws.
      **sampling: temperature, top_k and top_p, see Sampling.

    Raises:
      ValueError: for a value out of range, or a prompt that the tokenizer
        cannot encode.
    """
    chunks = self.tokens(prompts, max_tokens, max_tokens, seed, **sampling)
    [token_BT] = [*chunks] or [np.zeros((len(prompts), 0), np.int32)]
    return [self.tokenizer.decode(row) for row in token_BT]

  def stream(
    self,
    prompt: str,
    *,
    max_tokens: int = 256,
    seed: int = 0,
    **sampling: float,
  ) -> Iterator[str]:
    """Yields the continuation of one prompt, piece by piece.

    The arguments and errors are those of __call__.
    """
    ids, yielded = [], 0
    for token_1T in self.tokens([prompt], max_tokens, _CHUNK, seed, **sampling):
      ids += token_1T[0].tolist()
      decoded = self.tokenizer.decode(ids)
      # A character may consist of several tokens. Its first bytes decode to
      # U+FFFD and are held back until the character is complete.
      complete = len(decoded.rstrip("\ufffd"))
      yield decoded[yielded:complete]
      yielded = max(yielded, complete)
    yield self.tokenizer.decode(ids)[yielded:]

  def tokens(
    self,
    prompts: Sequence[str],
    max_tokens: int,
    chunk: int,
    seed: int = 0,
    **sampling: float,
  ) -> Iterator[np.ndarray]:
    """Yields the new tokens as int32 arrays (B, up to `chunk`).

    Up to `max_tokens` tokens per row in all, fewer if every row ends earlier.
    The other arguments and the errors are those of __call__.
    """
    sampling = Sampling(**sampling)
    sampling.validate()
    if max_tokens < 0:
      raise ValueError(f"{max_tokens=}; must be >= 0")
    token_BT, start_B = self._pad_prompts(prompts)
    slots = token_BT.shape[1] + max_tokens
    state = self._prefill(
      self._params, token_BT, start_B, jax.random.key(seed), slots=slots
    )
    for first in range(0, max_tokens, chunk):
      count = min(chunk, max_tokens - first)
      new_BT, state = self._decode(
        self._params, state, count=count, sampling=sampling
      )
      yield np.asarray(new_BT)
      if state.done_B.all():
        return

  def _pad_prompts(self, prompts):
    """Pads the prompts at the start: (tokens (B, T), first real slot (B,))."""
    start = np.array([self.tokenizer.start], np.int32)
    ids = [
      np.concatenate([start, x]) for x in self.tokenizer.encode(list(prompts))
    ]
    # A power of two, so that few lengths are compiled.
    length = 1 << max(4, (max(map(len, ids)) - 1).bit_length())
    token_BT = np.stack([np.pad(x, (length - len(x), 0)) for x in ids])
    return token_BT, np.array([length - len(x) for x in ids], np.int32)


def define_flags() -> None:
  """Defines the flags of `python -m sigattn generate`, except shared ones."""
  flags.DEFINE_multi_string(
    "prompt", [""], "The text to continue; repeat the flag for several texts."
  )
  flags.DEFINE_integer("max_tokens", 256, "Maximum number of new tokens.")
  flags.DEFINE_float("temperature", 0.8, "0: always the most likely token.")
  flags.DEFINE_integer(
    "top_k", 0, "Draw from the k most likely tokens; 0: from all."
  )
  flags.DEFINE_float(
    "top_p",
    1.0,
    "Draw from the most likely tokens with this total probability.",
  )
  flags.DEFINE_integer("seed", 0, "Seed of the random draws.")


def run(flag_values: flags.FlagValues) -> None:
  """Prints the prompts with their continuations."""
  absl_logging.set_verbosity(absl_logging.WARNING)  # print only the text
  names = ("max_tokens", "seed", "temperature", "top_k", "top_p")
  options = {name: flag_values[name].value for name in names}
  prompts = flag_values.prompt
  generator = Generator.load(flag_values.workdir, flag_values.step)
  if len(prompts) > 1:
    texts = generator(prompts, **options)
    for prompt, continuation in zip(prompts, texts, strict=True):
      print(f"{prompt}{continuation}\n", flush=True)
    return
  print(prompts[0], end="", flush=True)
  for piece in generator.stream(prompts[0], **options):
    print(piece, end="", flush=True)
  print()
