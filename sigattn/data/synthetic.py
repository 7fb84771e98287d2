"""Sequences made on the fly, of which attention alone sees the rule.

  summation    numbers x_1..x_m, then a mask of k ones: the sum of the masked
  pair_repeat  whether the first two symbols stand side by side once more
  recall       keys with their values, then keys alone: the value of each
               (multi-query associative recall, 2312.04927)
  copy         a string, a separator, the string again (2402.01032)

The first two are of 2409.04431, Appendix G. Every example of training is new;
the held-out ones are a fixed set, drawn from other seeds.
"""

import numpy as np
from ml_collections import ConfigDict

from sigattn.data import loader
from sigattn.validate import choice, whole

EPOCH = 2**20  # examples an epoch: what their order is drawn over, not stored


class Source(loader.ExampleSource):
  """A split: examples drawn when asked for, or the fixed held-out ones."""

  in_memory = True

  def __init__(self, config: ConfigDict, split: str):
    self._data = config.data.copy_and_resolve_references()
    self._draw = TASKS[self._data.name][0]
    self._held_out = None
    if split == self._data.eval_split:
      rng = np.random.default_rng((1, config.seed, self._data.length))
      self._held_out = self._draw(rng, self._data.eval_examples, self._data)

  def __len__(self) -> int:
    return EPOCH if self._held_out is None else self._data.eval_examples

  def train(
    self, indices_B: np.ndarray, rng: np.random.Generator
  ) -> loader.Batch:
    """`input` (B, T), `target` (B, T) and `scored` (B, T): where it counts."""
    return self._draw(rng, len(indices_B), self._data)

  def evaluate(self, indices_B: np.ndarray) -> loader.Batch:
    """The same of the held-out examples."""
    return {name: x[indices_B] for name, x in self._held_out.items()}


def open_source(config: ConfigDict, split: str) -> Source:
  """The Source of a split. ValueError where there is no such split."""
  if split not in (config.data.train_split, config.data.eval_split):
    raise ValueError(f"{split=}; choose from ['test', 'train']")
  return Source(config, split)


def num_tokens(data: ConfigDict) -> int:
  """Tokens of an example, T."""
  return {
    "summation": 2 * data.length,
    "pair_repeat": data.length + 1,
    "recall": 2 * data.length + data.size,
    "copy": 2 * data.length,
  }[data.name]


def summation(
  rng: np.random.Generator, count: int, data: ConfigDict
) -> loader.Batch:
  """length numbers N(0, 1), then the mask of size ones among them."""
  m, k = data.length, data.size
  number_BT = rng.standard_normal((count, m), np.float32)
  chosen_BT = rng.random((count, m)).argsort(axis=1) < k
  total_B = (number_BT * chosen_BT).sum(1)
  input_BT = np.concatenate([number_BT, chosen_BT], axis=1, dtype=np.float32)
  target_BT, scored_BT = np.zeros_like(input_BT), np.zeros(input_BT.shape, bool)
  target_BT[:, -1], scored_BT[:, -1] = total_B, True
  return {"input": input_BT, "target": target_BT, "scored": scored_BT}


def pair_repeat(
  rng: np.random.Generator, count: int, data: ConfigDict
) -> loader.Batch:
  """A begin (symbol 0), then length symbols from 1 on; the target is there.

  Half of the examples repeat the first pair, at a random place. In the others
  both of its symbols come again, but never side by side in this order.
  """
  n, symbols = data.length, data.vocab_size - 1
  token_BT = rng.integers(1, symbols + 1, (count, n), np.int32)
  first_B, second_B = token_BT[:, 0], token_BT[:, 1]
  # Put both symbols at places of their own, so that to find them is no help.
  rows = np.arange(count)
  positions = np.sort(2 + rng.random((count, n - 2)).argsort(1)[:, :2], axis=1)
  token_BT[rows, positions[:, 0]] = second_B
  token_BT[rows, positions[:, 1]] = first_B
  repeat_B = rng.random(count) < 0.5
  # No accidental pair: its second symbol becomes another one.
  for position in range(2, n):
    pair_B = (token_BT[:, position - 1] == first_B) & (
      token_BT[:, position] == second_B
    )
    other_B = (second_B - 1 + rng.integers(1, symbols, count)) % symbols + 1
    token_BT[:, position] = np.where(pair_B, other_B, token_BT[:, position])
  position_B = rng.integers(2, n - 1, count)
  token_BT[rows[repeat_B], position_B[repeat_B]] = first_B[repeat_B]
  token_BT[rows[repeat_B], position_B[repeat_B] + 1] = second_B[repeat_B]
  input_BT = np.pad(token_BT, ((0, 0), (1, 0)))
  target_BT, scored_BT = np.zeros_like(input_BT), np.zeros(input_BT.shape, bool)
  target_BT[:, 0], scored_BT[:, 0] = repeat_B, True
  return {"input": input_BT, "target": target_BT, "scored": scored_BT}


def recall(
  rng: np.random.Generator, count: int, data: ConfigDict
) -> loader.Batch:
  """length pairs of key and value, then size of the keys, in another order.

  Keys are the lower half of the vocabulary, each at most once; values the
  upper half. The target of a key that is asked for is its value.
  """
  pairs, queries, half = data.length, data.size, data.vocab_size // 2
  key_BP = rng.random((count, half)).argsort(axis=1)[:, :pairs]
  value_BP = half + rng.integers(0, data.vocab_size - half, (count, pairs))
  asked_BQ = rng.random((count, pairs)).argsort(axis=1)[:, :queries]
  shown_BT = np.stack([key_BP, value_BP], axis=-1).reshape(count, 2 * pairs)
  query_BQ = np.take_along_axis(key_BP, asked_BQ, axis=1)
  answer_BQ = np.take_along_axis(value_BP, asked_BQ, axis=1)
  input_BT = np.concatenate([shown_BT, query_BQ], axis=1).astype(np.int32)
  target_BT, scored_BT = np.zeros_like(input_BT), np.zeros(input_BT.shape, bool)
  target_BT[:, 2 * pairs :], scored_BT[:, 2 * pairs :] = answer_BQ, True
  return {"input": input_BT, "target": target_BT, "scored": scored_BT}


def copy(
  rng: np.random.Generator, count: int, data: ConfigDict
) -> loader.Batch:
  """length symbols from 1 on, the separator 0, and the string but its last.

  From the separator on, the target is the string's next symbol.
  """
  n = data.length
  string_BT = rng.integers(1, data.vocab_size, (count, n), np.int32)
  input_BT = np.concatenate(
    [string_BT, np.zeros((count, 1), np.int32), string_BT[:, :-1]], axis=1
  )
  target_BT = np.concatenate([np.zeros_like(string_BT), string_BT], axis=1)
  scored_BT = np.broadcast_to(np.arange(2 * n) >= n, input_BT.shape)
  return {"input": input_BT, "target": target_BT, "scored": scored_BT.copy()}


TASKS = {  # name: its examples, and what they need
  "summation": (
    summation,
    lambda d: [("size <= length", d.size <= d.length)],
  ),
  "pair_repeat": (
    pair_repeat,
    lambda d: [("length >= 6", d.length >= 6)],
  ),
  "recall": (
    recall,
    lambda d: [
      ("size <= length", d.size <= d.length),
      ("length <= vocab_size / 2", d.length <= d.vocab_size // 2),
    ],
  ),
  "copy": (copy, lambda d: []),
}


def _sizes_fit_the_task(config):
  data = config.data
  _, needs = TASKS[data.name]
  for condition, holds in needs(data):
    if not holds:
      raise ValueError(
        f"config.data.length={data.length}, config.data.size={data.size}, "
        f"config.data.vocab_size={data.vocab_size}; {data.name} needs "
        f"{condition}"
      )


FIELDS = {
  "data.name": choice(TASKS),
  "data.length": whole(low=1),
  "data.size": whole(low=1),
  "data.vocab_size": whole(low=3),
  "data.eval_examples": whole(low=1),
  "data.train_split": choice(("train",)),
  "data.eval_split": choice(("test",)),
}
RULES = (_sizes_fit_the_task,)
