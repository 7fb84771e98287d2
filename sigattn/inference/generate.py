"""Continues texts with a trained language model.

  python -m sigattn generate --workdir=runs/lm_sigmoid/default \\
    --prompt="In the beginning" --temperature=0.7

prints the text as it comes; several --prompt are continued as one batch and
printed when they are done. In a notebook:

  generator = Generator.load("runs/lm_sigmoid/default")
  [text] = generator(["In the beginning"], max_tokens=100)

Sigmoid's n stays the layer's constant, however long the text has become.
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

_CHUNK = 16  # tokens between two prints of a stream


class Sampling(NamedTuple):
  """How a token is drawn: softmax(logits / temperature) of the ones left.

  top_k: the k likeliest are left; 0: all. top_p: of those, the fewest likeliest
  that have this share of the probability together (1904.09751); 1: all.
  temperature 0: the likeliest.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def validate(self) -> None:
    """ValueError for a value that makes no sense."""
    if not 0 <= self.temperature < float("inf"):
      raise ValueError(f"temperature={self.temperature!r}; must be >= 0")
    if self.top_k < 0:
      raise ValueError(f"top_k={self.top_k!r}; must be >= 0")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p!r}; must be > 0 and <= 1")


def sample(
  rng: jax.Array, logits_BV: jax.Array, sampling: Sampling
) -> jax.Array:
  """int32 (B,): one draw a row."""
  if sampling.temperature == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)
  logits_BV = keep(logits_BV / sampling.temperature, sampling)
  return jax.random.categorical(rng, logits_BV).astype(jnp.int32)


def keep(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
  """The logits that top_k and top_p leave, and -inf for the others."""
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
  """Between two tokens."""

  place: jax.Array  # int32 scalar: the slot of the next token
  start_B: jax.Array  # each row's first slot that is no padding
  logits_BV: jax.Array  # of the next token
  cache: layers.Cache
  done_B: jax.Array  # whether the row has ended
  rng: jax.Array


def prefill(
  model: lm.LanguageModel,
  token_BT: jax.Array,
  start_B: jax.Array,
  slots: int,
  rng: jax.Array,
) -> State:
  """The State after the prompts, which end together at T."""
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
  """(token (B, count), State): up to `count` tokens, while a row goes on.

  What comes after a row's `end` is `end`. size: of the tokenizer, beyond which
  nothing is drawn.
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
  """A language model and its tokenizer: texts in, texts out."""

  def __init__(self, config: ConfigDict, params: Any):
    """Raises ValueError for another task's config."""
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
    """Of a run; step: a number, "best", or None for the newest."""
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
    """The continuation of each prompt, without it.

    sampling: temperature, top_k, top_p. Raises ValueError for a bad value, or
    a prompt that the tokenizer does not know.
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
    """The continuation of one prompt, in pieces as they are made."""
    ids, yielded = [], 0
    for token_1T in self.tokens([prompt], max_tokens, _CHUNK, seed, **sampling):
      ids += token_1T[0].tolist()
      decoded = self.tokenizer.decode(ids)
      # A character may be more than one token: its first bytes have to wait.
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
    """int32 (B, up to `chunk`) arrays, `max_tokens` of them together."""
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
    """Prompts that end together, and where each begins."""
    start = np.array([self.tokenizer.start], np.int32)
    ids = [
      np.concatenate([start, x]) for x in self.tokenizer.encode(list(prompts))
    ]
    # A power of two: few lengths to compile for.
    length = 1 << max(4, (max(map(len, ids)) - 1).bit_length())
    token_BT = np.stack([np.pad(x, (length - len(x), 0)) for x in ids])
    return token_BT, np.array([length - len(x) for x in ids], np.int32)


def define_flags() -> None:
  """The flags of `python -m sigattn generate`, besides the shared ones."""
  flags.DEFINE_multi_string("prompt", [""], "Repeat it for a batch.")
  flags.DEFINE_integer("max_tokens", 256, "At most so many new ones a prompt.")
  flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token.")
  flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest; 0: from all.")
  flags.DEFINE_float("top_p", 1.0, "Draw from this share of the probability.")
  flags.DEFINE_integer("seed", 0, "Another seed, another text.")


def run(flag_values: flags.FlagValues) -> None:
  """Prints the prompts and their continuations."""
  absl_logging.set_verbosity(absl_logging.WARNING)  # the text alone
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
