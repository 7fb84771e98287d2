"""Tokenizers convert texts to token ids and back."""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np

END = "<|endoftext|>"  # the end token of tokenizers that are trained here


class Tokenizer(Protocol):
  """The interface of every tokenizer. Token ids are 0, 1, ..., size - 1.

  size: the number of token ids.
  end: the id of the token between documents; each document begins and ends
    with it.
  start: the id of the token that precedes a text to continue.
  content: the bytes of a file from which `read` makes the same tokenizer; None
    if it needs no file.
  """

  size: int
  end: int
  start: int
  content: bytes | None

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Returns the int32 token ids of each text, without `end`."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the token ids; `end` adds nothing to it."""

  def num_bytes(self) -> np.ndarray:
    """Returns the bytes of text in each token, int32 (size,); 0 for `end`."""


class Characters:
  """A Tokenizer whose tokens are the characters of an alphabet, then `end`.

  Its file is JSON, {"characters": "\\n !,.abc"}.
  """

  def __init__(self, alphabet: str):
    self.alphabet = alphabet
    self.content = json.dumps({"characters": alphabet}).encode()
    self._ids = {character: i for i, character in enumerate(alphabet)}
    self.end = len(alphabet)
    self.size = len(alphabet) + 1
    # The embedded text is one document, so a model never sees `end`. A newline
    # is a natural start instead.
    self.start = self._ids.get("\n", self.end)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Returns the int32 token ids of each text.

    Raises ValueError for a character outside the alphabet.
    """
    if unknown := set().union(*texts) - self._ids.keys():
      raise ValueError(
        f"characters {sorted(unknown)} are unknown; the tokenizer knows "
        f"{self.alphabet!r}: give texts without the others, or train a model "
        "with --config.data.tokenizer=bytes, which knows all"
      )
    # Arrays are used, because a text may have a gigabyte.
    codes = np.array([ord(x) for x in self.alphabet], np.uint32)
    order = np.argsort(codes)
    encoded = []
    for text in texts:
      code_T = np.frombuffer(text.encode("utf-32-le"), "<u4")
      places = np.searchsorted(codes[order], code_T)
      encoded.append(order[places].astype(np.int32))
    return encoded

  def decode(self, ids: Iterable[int]) -> str:
    return "".join(self.alphabet[i] for i in ids if i != self.end)

  def num_bytes(self) -> np.ndarray:
    return np.array([*(len(x.encode()) for x in self.alphabet), 0], np.int32)


class Bytes:
  """A Tokenizer whose tokens are the 256 bytes of UTF-8; `end` is 256."""

  size, end, start = 257, 256, 256
  content = None

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in ids if i != self.end).decode(errors="replace")

  def num_bytes(self) -> np.ndarray:
    return np.array([1] * 256 + [0], np.int32)


def read(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
  """Reads the file of Characters, or a tokenizer.json as File does."""
  try:
    content = json.loads(pathlib.Path(path).read_bytes())
  except (ValueError, RecursionError):
    content = None  # File says what is wrong with it.
  if not isinstance(content, dict) or content.keys() != {"characters"}:
    return File(path, vocab_size)
  alphabet = content["characters"]
  if not isinstance(alphabet, str) or len(set(alphabet)) != len(alphabet):
    raise ValueError(f'{path}: "characters" must be text, each character once')
  return Characters(alphabet)


class File:
  """A Tokenizer from a file of the tokenizers library."""

  _ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")

  def __init__(self, path: str | os.PathLike[str], vocab_size: int):
    """Reads a tokenizer.json.

    vocab_size: config.data.vocab_size. Raises ValueError if the file is no
    tokenizer, has no end-of-text token, or has an id that is not below
    vocab_size. (Arrays are as large as the largest id, however few ids there
    are.)
    """
    import tokenizers

    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exceptions.
      raise ValueError(f"{path}: is no tokenizer: {error}") from error
    self.content = pathlib.Path(path).read_bytes()
    # A text that spells out a special token is encoded as text.
    self._tokenizer.encode_special_tokens = True
    vocabulary = self._tokenizer.get_vocab()
    ends = [vocabulary[name] for name in self._ENDS if name in vocabulary]
    if not ends:
      raise ValueError(
        f"{path}: the tokenizer needs a token that ends documents, one of "
        f"{self._ENDS}"
      )
    self.end = self.start = ends[0]
    last = max(vocabulary, key=vocabulary.get)
    self.size = vocabulary[last] + 1
    if self.size > vocab_size:
      raise ValueError(
        f"config.data.vocab_size={vocab_size!r}; must be at least {self.size}: "
        f"the token {last!r} of config.data.tokenizer={str(path)!r} has the id "
        f"{self.size - 1}"
      )

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(x.ids, np.int32) for x in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    return self._tokenizer.decode([int(i) for i in ids if i != self.end])

  def num_bytes(self) -> np.ndarray:
    """Returns the bytes of text in each token, int32 (size,).

    The numbers are exact for a byte-level vocabulary, where each character of a
    token stands for one byte.
    """
    count = np.zeros(self.size, np.int32)
    special = set(self._tokenizer.get_added_tokens_decoder())
    for token, i in self._tokenizer.get_vocab().items():
      count[i] = 0 if i in special else len(token)
    return count
