"""Tokenizers: text to numbers and back.

  python -m sigattn.data.tokens --source=/data/books --size=32768 --out=bpe.json

trains a byte-level BPE on the texts of a source (whatever config.data.source
may be) and saves it; --config.data.tokenizer=bpe.json uses it. A tokenizer has

  size           how many numbers there are
  end            the number between documents: each begins and ends with it
  start          what a text to continue begins with
  encode(texts)  a list of texts to a list of int32 arrays, without `end`
  decode(ids)    text; `end` is nothing
  num_bytes()    int32 (size,): bytes of text in each; 0 for `end`
"""

import itertools
import sys

import numpy as np
from absl import app, flags

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


def train(texts, size):
  """A byte-level BPE (1508.07909, on bytes as in GPT-2) of `size` tokens.

  texts: an iterable of strings. Returns a tokenizers.Tokenizer.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[END],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def _main(argv):
  if argv[1:]:
    raise app.UsageError(f"not understood: {argv[1:]}")
  from sigattn.data import text

  found = flags.FLAGS
  try:
    if found.size < 257:
      raise ValueError(f"--size={found.size}; must be >= 257: bytes and an end")
    texts = text.documents(found.source, found.split, found.column)
    tokenizer = train(itertools.islice(texts, found.documents), found.size)
  except ValueError as error:
    sys.exit(f"sigattn.data.tokens: {error}")
  tokenizer.save(found.out)
  print(f"{found.out}: {tokenizer.get_vocab_size():,} tokens")


if __name__ == "__main__":
  flags.DEFINE_string("source", None, "As config.data.source.")
  flags.DEFINE_string("split", "train", "Of the source.")
  flags.DEFINE_string("column", "text", "As config.data.text_column.")
  flags.DEFINE_integer("size", 32768, "Tokens, the end of text among them.")
  flags.DEFINE_integer("documents", 1_000_000, "Read at most so many.")
  flags.DEFINE_string("out", None, "The file to write: bpe.json, say.")
  flags.mark_flags_as_required(["source", "out"])
  app.run(_main)
