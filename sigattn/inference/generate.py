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

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from sigattn.data import text
from sigattn.inference import engine
from sigattn.inference.sampling import Sampling
from sigattn.training import checkpoint

_CHUNK = 16  # tokens between two looks at whether all rows have ended


class Generator:
  """A language model with its tokenizer: continues texts."""

  def __init__(self, config: ConfigDict, params: Any) -> None:
    """Raises ValueError if the config is not of the task "lm"."""
    if config.task != "lm":
      raise ValueError(f"config.task={config.task!r}; must be 'lm'")
    self.tokenizer = text.tokenizer(config)
    self._engine = engine.Engine(
      *engine.prepared(config, params),
      self.tokenizer.size,
      self.tokenizer.end,
    )

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
    chunks = [np.zeros((len(prompts), 0), np.int32)]
    chunks += self.tokens(prompts, max_tokens, _CHUNK, seed, **sampling)
    token_BT = np.concatenate(chunks, axis=1)
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
    prompts = self._encoded(prompts)
    if not max_tokens:
      return
    state = self._engine.prefill(prompts, max_tokens, jax.random.key(seed))
    done_B = np.zeros(len(prompts), bool)
    for first in range(0, max_tokens, chunk):
      # All chunks are equally long, so that one program is compiled.
      new_BT, state = self._engine.decode(state, chunk, sampling)
      new_BT = np.asarray(new_BT)[:, : max_tokens - first]
      yield new_BT
      done_B |= (new_BT == self.tokenizer.end).any(1)
      if done_B.all():
        return

  def _encoded(self, prompts):
    start = np.array([self.tokenizer.start], np.int32)
    return [
      np.concatenate([start, x]) for x in self.tokenizer.encode(list(prompts))
    ]


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
