"""Tokenizers convert texts to token ids and back."""

import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np

END = "<|endoftext|>"  # in a tokenizer that is trained here


class Tokenizer(Protocol):
  """What every tokenizer offers. Token ids are 0, 1, ..., size - 1.

  size: the number of token ids.
  end: the id of the token between documents; each document begins and ends
    with it.
  start: the id of the token that precedes a text to continue.
  """

  size: int
  end: int
  start: int

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """The int32 token ids of each text, without `end`."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of the token ids; `end` contributes nothing."""

  def num_bytes(self) -> np.ndarray:
    """The bytes of text in each token, int32 (size,); 0 for `end`."""


class Characters:
  """One number a character of an alphabet, in its order; then `end`."""

  def __init__(self, alphabet: str):
    self._alphabet = alphabet
    self._ids = {character: i for i, character in enumerate(alphabet)}
    self.end = len(alphabet)
    self.size = len(alphabet) + 1
    # A text in one piece has no documents, and so no `end`: but lines.
    self.start = self._ids.get("\n", self.end)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Raises ValueError for a character outside of the alphabet."""
    if unknown := set().union(*texts) - self._ids.keys():
      raise ValueError(
        f"characters {sorted(unknown)}; the tokenizer knows {self._alphabet!r}"
      )
    return [np.array([self._ids[x] for x in t], np.int32) for t in texts]

  def decode(self, ids: Iterable[int]) -> str:
    return "".join(self._alphabet[i] for i in ids if i != self.end)

  def num_bytes(self) -> np.ndarray:
    return np.array([*(len(x.encode()) for x in self._alphabet), 0], np.int32)


class Bytes:
  """One number a byte of UTF-8; `end` is 256."""

  size, end, start = 257, 256, 256

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in ids if i != self.end).decode(errors="replace")

  def num_bytes(self) -> np.ndarray:
    return np.array([1] * 256 + [0], np.int32)


class File:
  """A tokenizer of the tokenizers library; `end` is its end of text."""

  _ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")

  def __init__(self, path: str | os.PathLike[str]):
    """path: of a tokenizer.json. Raises ValueError where it is none."""
    import tokenizers

    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises Exception itself.
      raise ValueError(f"{path}: no tokenizer: {error}") from error
    vocabulary = self._tokenizer.get_vocab()
    ends = [vocabulary[name] for name in self._ENDS if name in vocabulary]
    if not ends:
      raise ValueError(f"{path}: has none of {self._ENDS}, to part documents")
    self.end = self.start = ends[0]
    self.size = max(vocabulary.values()) + 1

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(x.ids, np.int32) for x in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids if i != self.end])

  def num_bytes(self) -> np.ndarray:
    """Exact for a byte-level vocabulary, whose characters are bytes each."""
    count = np.zeros(self.size, np.int32)
    special = set(self._tokenizer.get_added_tokens_decoder())
    for token, i in self._tokenizer.get_vocab().items():
      count[i] = 0 if i in special else len(token)
    return count
