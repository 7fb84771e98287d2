"""Tokenizers: text to numbers and back. A tokenizer has

size           how many numbers there are
end            the number between documents: each begins and ends with it
start          what a text to continue begins with
encode(texts)  a list of texts to a list of int32 arrays, without `end`
decode(ids)    text; `end` is nothing
num_bytes()    int32 (size,): bytes of text in each; 0 for `end`
"""

import numpy as np

END = "<|endoftext|>"  # in a tokenizer that is trained here


class Characters:
  """One number a character of an alphabet, in its order; then `end`."""

  def __init__(self, alphabet):
    self._alphabet = alphabet
    self._ids = {character: i for i, character in enumerate(alphabet)}
    self.end = len(alphabet)
    self.size = len(alphabet) + 1
    # A text in one piece has no documents, and so no `end`: but lines.
    self.start = self._ids.get("\n", self.end)

  def encode(self, texts):
    """Raises ValueError for a character outside of the alphabet."""
    if unknown := set().union(*texts) - self._ids.keys():
      raise ValueError(
        f"characters {sorted(unknown)}; the tokenizer knows {self._alphabet!r}"
      )
    return [np.array([self._ids[x] for x in t], np.int32) for t in texts]

  def decode(self, ids):
    return "".join(self._alphabet[i] for i in ids if i != self.end)

  def num_bytes(self):
    return np.array([*(len(x.encode()) for x in self._alphabet), 0], np.int32)


class Bytes:
  """One number a byte of UTF-8; `end` is 256."""

  size, end, start = 257, 256, 256

  def encode(self, texts):
    return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) for t in texts]

  def decode(self, ids):
    return bytes(i for i in ids if i != self.end).decode(errors="replace")

  def num_bytes(self):
    return np.array([1] * 256 + [0], np.int32)


class File:
  """A tokenizer of the tokenizers library; `end` is its end of text."""

  _ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")

  def __init__(self, path):
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

  def encode(self, texts):
    found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(x.ids, np.int32) for x in found]

  def decode(self, ids):
    return self._tokenizer.decode([int(i) for i in ids if i != self.end])

  def num_bytes(self):
    """Exact for a byte-level vocabulary, whose characters are bytes each."""
    count = np.zeros(self.size, np.int32)
    special = set(self._tokenizer.get_added_tokens_decoder())
    for token, i in self._tokenizer.get_vocab().items():
      count[i] = 0 if i in special else len(token)
    return count
