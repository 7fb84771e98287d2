"""Reads texts that are already tokens, from a folder with their tokenizer.

  tokenizer.json   the tokenizer that made the tokens
  SPLIT.npy.xz     the tokens of a split: a NumPy array, uint16 or uint32 (S,),
                   compressed by xz. The documents of the split follow one
                   another, and each begins with the tokenizer's `end`.

`python -m benchmarks.corpus` makes such a folder.
"""

import functools
import lzma
import pathlib

import numpy as np

from sigattn.data import hub

TOKENIZER = "tokenizer.json"
_SUFFIX = ".npy.xz"
_DTYPES = ("uint16", "uint32")


def is_folder(source: str) -> bool:
  """Whether a source is a folder of tokens."""
  return (hub.local(source) / TOKENIZER).is_file() and bool(splits(source))


def splits(source: str) -> list[str]:
  """The names of the splits that a folder holds, sorted."""
  paths = hub.local(source).glob(f"*{_SUFFIX}")
  return sorted(path.name.removesuffix(_SUFFIX) for path in paths)


def files(source: str) -> list[pathlib.Path]:
  """The files that a folder consists of: its tokenizer and its splits."""
  folder = hub.local(source).resolve()
  paths = [folder / f"{split}{_SUFFIX}" for split in splits(source)]
  return [folder / TOKENIZER, *paths]


@functools.lru_cache(maxsize=3)
def read(source: str, split: str, size: int) -> np.ndarray:
  """Returns the tokens (S,) of a split.

  size: the size of the tokenizer. Raises ValueError for a file that is damaged,
  or that is no array of 2 or more tokens below `size`.
  """
  path = hub.local(source) / f"{split}{_SUFFIX}"
  try:
    with lzma.open(path) as file:
      token_S = np.load(file)
  except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
    raise ValueError(
      f"config.data.source={source!r}: {path.name} cannot be read: {error}"
    ) from error
  if token_S.ndim != 1 or str(token_S.dtype) not in _DTYPES:
    raise ValueError(
      f"config.data.source={source!r}: {path.name} holds {token_S.dtype} "
      f"{token_S.shape}; must hold one row of {' or '.join(_DTYPES)}"
    )
  if len(token_S) < 2 or token_S.max() >= size:
    raise ValueError(
      f"config.data.source={source!r}: {path.name} holds {len(token_S)} tokens"
      f" up to {token_S.max(initial=0)}; must hold at least 2, and only those "
      f"below {size}, the size of its tokenizer"
    )
  return token_S
