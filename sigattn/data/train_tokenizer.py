"""Trains a byte-level BPE tokenizer on the texts of a source, and saves it.

  python -m sigattn train_tokenizer --source=/data/books --size=32768 \\
    --out=bpe.json

--source takes the same values as config.data.source of a language model. Train
the model with --config.data.tokenizer=bpe.json to use the tokenizer.
"""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from absl import flags

from sigattn.data import text
from sigattn.data.tokenizers import END


def train(texts: Iterable[str], size: int) -> Any:
  """Trains a byte-level BPE (1508.07909, on bytes as in GPT-2).

  size: the number of tokens, including the end of text. Returns a
  tokenizers.Tokenizer.
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


def define_flags() -> None:
  """Defines the flags of `python -m sigattn train_tokenizer`."""
  flags.DEFINE_string("source", None, "The source, as in config.data.source.")
  flags.DEFINE_string("split", "train", "The split of the source.")
  flags.DEFINE_string(
    "column", "text", "The column with the text, as in config.data.text_column."
  )
  flags.DEFINE_bool(
    "lines", False, "Whether each line of a .txt is a document of its own."
  )
  flags.DEFINE_integer(
    "size", 32768, "The number of tokens, including the end of text."
  )
  flags.DEFINE_integer(
    "documents", 1_000_000, "The largest number of documents to read."
  )
  flags.DEFINE_float(
    "max_corrupt_share",
    0.0,
    "The share of documents that may be no text, and are skipped.",
    0.0,
    1.0,
  )
  flags.DEFINE_string("out", None, "The file to write, for example bpe.json.")
  flags.mark_flags_as_required(["source", "out"])


def run(options: flags.FlagValues) -> None:
  """Trains and saves the tokenizer that the flags describe."""
  if options.size < 257:
    raise ValueError(
      f"--size={options.size}; must be >= 257: 256 bytes and the end of text"
    )
  _validate_out(options.out)
  with _naming_flags():
    texts = text.documents(
      options.source, options.split, options.column, options.lines,
      options.max_corrupt_share, options.documents,
    )  # fmt: skip
    tokenizer = train(itertools.islice(texts, options.documents), options.size)
  tokenizer.save(options.out)
  count = tokenizer.get_vocab_size()
  print(
    f"{options.out}: {count:,} tokens; train with --config.data.tokenizer="
    f"{options.out}"
  )
  if count < options.size:
    print(
      f"--size={options.size} is not reached, because the texts have no more "
      "pairs of tokens that occur twice; if the config sets a vocab_size, add "
      f"--config.data.vocab_size={count}"
    )


# The flags here, by the names that they have in a model's config.
_FLAGS = {
  "config.data.source": "--source",
  "config.data.text_column": "--column",
  "config.data.max_corrupt_share": "--max_corrupt_share",
}


@contextlib.contextmanager
def _naming_flags():
  """Lets an error about the texts name the flags in place of config.data."""
  try:
    yield
  except ValueError as error:
    message = str(error)
    for path, flag in _FLAGS.items():
      message = message.replace(f"--{path}", flag).replace(path, flag)
    raise ValueError(message) from error


def _validate_out(out):
  """Raises ValueError for a file that exists or cannot be written."""
  path = pathlib.Path(out)
  if path.exists():
    raise ValueError(f"--out={out}: exists; delete it or name another file")
  if not path.parent.is_dir():
    raise ValueError(f"--out={out}: there is no folder {path.parent}")
  if not os.access(path.parent, os.W_OK):
    raise ValueError(f"--out={out}: the folder {path.parent} is not writable")
