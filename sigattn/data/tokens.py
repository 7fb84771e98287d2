"""Tokenizers: text to numbers and back.

A tokenizer has
  size             how many numbers there are
  end              the number between documents: each begins and ends with it
  encode(text)     int32 (T,), without `end`
  decode(ids)      text; `end` is nothing
  num_bytes()      int32 (size,): bytes of text in each; 0 for `end`
"""

import functools
import pathlib

import numpy as np

END = "<|end|>"  # of a document, in a tokenizer that is trained here


class Characters:
  """One number a character of an alphabet, in its order; `end` is the last."""

  def __init__(self, alphabet):
    self._alphabet = alphabet
    self._ids = {character: i for i, character in enumerate(alphabet)}
    self.end = len(alphabet)
    self.size = len(alphabet) + 1

  def encode(self, text):
    """Raises ValueError for a character outside of the alphabet."""
    if unknown := set(text) - self._ids.keys():
      raise ValueError(
        f"characters {sorted(unknown)} are not among {self._alphabet!r}"
      )
    return np.array([self._ids[x] for x in text], np.int32)

  def decode(self, ids):
    return "".join(self._alphabet[i] for i in ids if i != self.end)

  def num_bytes(self):
    return np.array([*(len(x.encode()) for x in self._alphabet), 0], np.int32)


class Bytes:
  """One number a byte of UTF-8; `end` is 256."""

  size, end = 257, 256

  def encode(self, text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids):
    return bytes(i for i in ids if i != self.end).decode(errors="replace")

  def num_bytes(self):
    return np.array([1] * 256 + [0], np.int32)
