"""Generates the sequences of six tasks that only attention can solve.

  summation       add up the numbers among x_1..x_m that a mask of k ones
                  selects
  pair_repeat     tell whether the first two symbols occur side by side again
  recall          give the value of each queried key, after a list of pairs of a
                  key and a value (multi-query associative recall, 2312.04927)
  noisy_recall    the same, with a distractor for each pair (2403.17844)
  copy            repeat a string after a separator (2402.01032)
  selective_copy  repeat the symbols of a string that has blanks between them
                  (2312.00752)

summation and pair_repeat are from 2409.04431, Appendix G. Every training
example is new. The held-out examples are two fixed sets, drawn with other
seeds: settings are chosen by "validation", and results are reported on "test".
"""

import numpy as np
from ml_collections import ConfigDict

from sigattn.data import loader
from sigattn.validate import choice, whole

# Training examples per epoch. They are drawn when they are needed, but grain
# needs a finite number to order them.
EPOCH = 2**20

SPLITS = ("train", "validation", "test")
# The first number of the seed of each split of held-out examples.
_SEEDS = {"test": 1, "validation": 2}


class Source(loader.ExampleSource):
  """A split: new examples in each batch, or the fixed held-out examples."""

  in_memory = True

  def __init__(self, config: ConfigDict, split: str):
    self._data = config.data.copy_and_resolve_references()
    self._draw = TASKS[self._data.name][0]
    self._held_out = None
    if split in _SEEDS:
      seed = _SEEDS[split], config.seed, self._data.length
      rng = np.random.default_rng(seed)
      self._held_out = self._draw(rng, self._data.eval_examples, self._data)

  def __len__(self) -> int:
    return EPOCH if self._held_out is None else self._data.eval_examples

  def train(
    self, indices_B: np.ndarray, rng: np.random.Generator
  ) -> loader.Batch:
    """Returns a batch of new examples.

    {"input": (B, T), "target": (B, T), "scored": bool (B, T)}, where scored
    marks the tokens whose target counts. Numbers are float32, symbols int32.
    """
    return self._draw(rng, len(indices_B), self._data)

  def evaluate(self, indices_B: np.ndarray) -> loader.Batch:
    """Returns a batch, like that of `train`, of held-out examples."""
    return {name: x[indices_B] for name, x in self._held_out.items()}


def open_source(config: ConfigDict, split: str) -> Source:
  """Opens a split; raises ValueError unless it is one of SPLITS."""
  if split not in SPLITS:
    raise ValueError(f"{split=}; choose from {sorted(SPLITS)}")
  return Source(config, split)


def num_tokens(data: ConfigDict) -> int:
  """Returns T, the number of tokens of an example. data: config.data."""
  return {
    "summation": 2 * data.length,
    "pair_repeat": data.length + 1,
    "recall": 2 * data.length + data.size,
    "noisy_recall": 3 * data.length + data.size,
    "copy": 2 * data.length,
    "selective_copy": data.length + data.size,
  }[data.name]


def summation(
  rng: np.random.Generator, count: int, data: ConfigDict
) -> loader.Batch:
  """Draws `length` numbers from N(0, 1), then a mask that selects `size` ones.

  data: config.data, here and below. The target of the last token is the sum of
  the selected numbers; only that token is scored.
  """
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
  """Draws a start symbol 0, then `length` symbols from 1 to vocab_size - 1.

  The start symbol's target is 1 if the first two symbols occur side by side
  again, in the same order, and 0 otherwise; only that token is scored. Half of
  the examples repeat the pair, at a random position. In the others both symbols
  occur again, but never side by side in this order.
  """
  n, symbols = data.length, data.vocab_size - 1
  token_BT = rng.integers(1, symbols + 1, (count, n), np.int32)
  first_B, second_B = token_BT[:, 0], token_BT[:, 1]
  # Both symbols occur again in every example, so that their presence alone does
  # not tell the answer.
  rows = np.arange(count)
  positions = np.sort(2 + rng.random((count, n - 2)).argsort(1)[:, :2], axis=1)
  token_BT[rows, positions[:, 0]] = second_B
  token_BT[rows, positions[:, 1]] = first_B
  repeat_B = rng.random(count) < 0.5
  # Where the pair occurs by chance, replace its second symbol by another one.
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
  """Draws `length` pairs of key and value, then `size` of the keys as queries.

  Keys are different symbols of the lower half of the vocabulary, values are
  from the upper half. The queries have a random order. The target of a query is
  the value of its key; only queries are scored.
  """
  shown_BT, query_BQ, answer_BQ = _pairs(rng, count, data, data.vocab_size)
  return _queried(shown_BT, query_BQ, answer_BQ)


def noisy_recall(
  rng: np.random.Generator, count: int, data: ConfigDict
) -> loader.Batch:
  """Draws an example of `recall`, with `length` distractors among the pairs.

  A distractor is one token at a random place between two pairs, before the
  first or after the last. Distractors are from the last third of the
  vocabulary, and keys and values from the halves of the rest.
  """
  pairs, clean = data.length, data.vocab_size * 2 // 3
  shown_BT, query_BQ, answer_BQ = _pairs(rng, count, data, clean)
  noise_BL = rng.integers(clean, data.vocab_size, (count, pairs))
  # A random half of the 2 `length` items are pairs; each pair has two tokens.
  is_pair_BI = rng.random((count, 2 * pairs)).argsort(axis=1) < pairs
  width_BI = 1 + is_pair_BI
  start_BI = width_BI.cumsum(axis=1) - width_BI
  rows_B1 = np.arange(count)[:, None]
  noisy_BT = np.empty((count, 3 * pairs), shown_BT.dtype)
  first_BL = start_BI[is_pair_BI].reshape(count, pairs)
  noisy_BT[rows_B1, first_BL] = shown_BT[:, 0::2]
  noisy_BT[rows_B1, first_BL + 1] = shown_BT[:, 1::2]
  noisy_BT[rows_B1, start_BI[~is_pair_BI].reshape(count, pairs)] = noise_BL
  return _queried(noisy_BT, query_BQ, answer_BQ)


def _pairs(rng, count, data, vocab_size):
  """(keys and values in turn, queried keys, their values) of recall."""
  pairs, queries, half = data.length, data.size, vocab_size // 2
  key_BP = rng.random((count, half)).argsort(axis=1)[:, :pairs]
  value_BP = half + rng.integers(0, vocab_size - half, (count, pairs))
  asked_BQ = rng.random((count, pairs)).argsort(axis=1)[:, :queries]
  shown_BT = np.stack([key_BP, value_BP], axis=-1).reshape(count, 2 * pairs)
  query_BQ = np.take_along_axis(key_BP, asked_BQ, axis=1)
  answer_BQ = np.take_along_axis(value_BP, asked_BQ, axis=1)
  return shown_BT, query_BQ, answer_BQ


def _queried(shown_BT, query_BQ, answer_BQ):
  """A batch of shown tokens, followed by queries; only queries are scored."""
  shown = shown_BT.shape[1]
  input_BT = np.concatenate([shown_BT, query_BQ], axis=1).astype(np.int32)
  target_BT, scored_BT = np.zeros_like(input_BT), np.zeros(input_BT.shape, bool)
  target_BT[:, shown:], scored_BT[:, shown:] = answer_BQ, True
  return {"input": input_BT, "target": target_BT, "scored": scored_BT}


def copy(
  rng: np.random.Generator, count: int, data: ConfigDict
) -> loader.Batch:
  """Draws `length` symbols >= 1, then the separator 0, then the symbols again.

  The repetition lacks the last symbol. From the separator on, each target is
  the next symbol of the string; only these tokens are scored.
  """
  n = data.length
  string_BT = rng.integers(1, data.vocab_size, (count, n), np.int32)
  input_BT = np.concatenate(
    [string_BT, np.zeros((count, 1), np.int32), string_BT[:, :-1]], axis=1
  )
  target_BT = np.concatenate([np.zeros_like(string_BT), string_BT], axis=1)
  scored_BT = np.broadcast_to(np.arange(2 * n) >= n, input_BT.shape)
  return {"input": input_BT, "target": target_BT, "scored": scored_BT.copy()}


def selective_copy(
  rng: np.random.Generator, count: int, data: ConfigDict
) -> loader.Batch:
  """Draws `size` symbols >= 2 among blanks, then the separator 0, then them.

  The string has `length` tokens; those that are not symbols are the blank 1.
  The repetition has the symbols in their order and lacks the last one. From the
  separator on, each target is the next symbol; only these tokens are scored.
  """
  n, size = data.length, data.size
  symbol_BK = rng.integers(2, data.vocab_size, (count, size), np.int32)
  string_BT = np.ones((count, n), np.int32)
  is_symbol_BT = rng.random((count, n)).argsort(axis=1) < size
  string_BT[is_symbol_BT] = symbol_BK.ravel()
  separator_B1 = np.zeros((count, 1), np.int32)
  input_BT = np.concatenate(
    [string_BT, separator_B1, symbol_BK[:, :-1]], axis=1
  )
  target_BT = np.concatenate([np.zeros_like(string_BT), symbol_BK], axis=1)
  scored_BT = np.broadcast_to(np.arange(n + size) >= n, input_BT.shape)
  return {"input": input_BT, "target": target_BT, "scored": scored_BT.copy()}


# {name: (function that draws examples, function that lists the conditions on
# config.data with whether they hold)}
TASKS = {
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
  "noisy_recall": (
    noisy_recall,
    lambda d: [
      ("size <= length", d.size <= d.length),
      ("length <= vocab_size / 3", d.length <= d.vocab_size // 3),
    ],
  ),
  "copy": (copy, lambda d: []),
  "selective_copy": (
    selective_copy,
    lambda d: [("size <= length", d.size <= d.length)],
  ),
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
  "data.length": whole(low=1, high=2**16),
  "data.size": whole(low=1, high=2**16),
  "data.vocab_size": whole(low=3, high=2**20),
  "data.eval_examples": whole(low=1, high=2**20),
  "data.train_split": choice(("train",)),
  "data.eval_split": choice(("validation", "test")),
}
RULES = (_sizes_fit_the_task,)
