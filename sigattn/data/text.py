"""Texts: where they come from, and how they become rows of tokens.

A row has config.data.length + 1 tokens, for a model sees all but the last and
predicts all but the first:

  token    int32 (B, L + 1); -1 is padding
"""

import functools
import lzma
import pathlib

import numpy as np

from sigattn import check as checks
from sigattn.data import tokens

_FOLDER = pathlib.Path(__file__).parent / "embedded"
# The King James Bible, a verse a line; its licence lies beside it.
EMBEDDED = {"kjv": _FOLDER / "kjv.txt.xz"}
_HELD_OUT = 0.05  # the end of an embedded text is its split test


def check(config):
  checks.number(config, "data.length", low=1)
  checks.number(config, "eval.length", low=1, optional=True)
  checks.choice(config, "data.source", EMBEDDED)
  checks.choice(config, "data.train_split", ("train", "test"))
  checks.choice(config, "data.eval_split", ("train", "test"))


@functools.lru_cache(maxsize=1)
def _embedded(source):
  with lzma.open(EMBEDDED[source], "rt", encoding="utf-8") as file:
    return file.read()


def tokenizer(config):
  return tokens.Characters("".join(sorted(set(_embedded(config.data.source)))))


def open_source(config, split):
  return _Embedded(config, split)


class _Embedded:
  """Rows cut from one long text."""

  in_memory = True

  def __init__(self, config, split):
    text = _embedded(config.data.source)
    cut = len(text) - int(_HELD_OUT * len(text))
    text = text[:cut] if split == "train" else text[cut:]
    self._tokenizer = tokenizer(config)
    self._tokens = self._tokenizer.encode(text)
    self._length = config.data.length
    self._eval_length = config.eval.length or config.data.length

  def __len__(self):
    return -(-(len(self._tokens) - 1) // self._length)

  def train(self, indices_B, rng):
    last = len(self._tokens) - self._length - 1
    start_B = indices_B * self._length + rng.integers(
      self._length, size=len(indices_B)
    )
    return {"token": self._rows(np.minimum(start_B, last), self._length)}

  def evaluate(self, indices_B):
    return {"token": self._rows(indices_B * self._length, self._length)}

  def _rows(self, start_B, length):
    place_BT = start_B[:, None] + np.arange(length + 1)
    real = place_BT < len(self._tokens)
    return np.where(
      real, self._tokens[np.where(real, place_BT, 0)], -1
    ).astype(np.int32)
