"""Keeps account, on the host, of which page of a cache holds which tokens.

A page holds the keys and values of PAGE tokens. A row has only the pages that
its prompt and its new tokens need, so that a long prompt costs the other rows
nothing. If prompts begin with the same tokens, their rows share the pages that
these tokens fill, and the tokens are read only once (vLLM, 2309.06180). Page 0
belongs to no row. Padding, and rows that have ended, are written there.
"""

from collections.abc import Sequence

import numpy as np

PAGE = 64  # tokens


def pages_for(tokens: int) -> int:
  """The number of pages that so many tokens need."""
  return -(-tokens // PAGE)


class Pages:
  """The pages of some rows.

  count: the number of all pages, page 0 included.
  table_BM: int32, the pages of each row in the order of its tokens, and 0 where
  the row has no page. The last column is always 0.
  """

  def __init__(self, count: int, rows: int, most: int) -> None:
    """count: of all pages, page 0 included. most: pages that a row may need."""
    self.count = count
    self.table_BM = np.zeros((rows, most + 1), np.int32)
    self._free = list(range(count - 1, 0, -1))
    self._uses = np.zeros(count, np.int32)
    # The pages that prompts may share, by (the page before, the tokens), and
    # the reverse. A page stays as long as the pages after it, so that the page
    # before determines all tokens before.
    self._shared, self._name = {}, {}
    self._wave = {}  # the wave that fills each page that is not filled yet

  @classmethod
  def for_prompts(
    cls, lengths: Sequence[int], common: int, rows: int
  ) -> "Pages":
    """Enough pages for any `rows` of these texts at the same time.

    lengths: the most tokens that each text may reach. common: the number of
    tokens that all texts begin with, and that are never cut off.
    """
    shared = common // PAGE
    needs = sorted(map(pages_for, lengths))
    own = sum(need - shared for need in needs[-rows:])
    return cls(1 + shared + own, min(rows, len(needs)), needs[-1])

  def take(
    self, row: int, prompt_T: np.ndarray, length: int
  ) -> tuple[int, int]:
    """Gives a row its pages, for a text that may grow to `length` tokens.

    The row must not have pages yet.

    Returns:
      (known, wave). The prompt is to be read in this wave, counted from 0. When
      the waves before it have been read, the keys and values of the first
      `known` tokens are in the pages. At least one token remains to be read.
    """
    known, wave, before = 0, 0, 0
    is_known = True
    for i in range(pages_for(length)):
      tokens = prompt_T[i * PAGE : (i + 1) * PAGE]
      name = before, tokens.tobytes()
      is_known &= name in self._shared and (i + 1) * PAGE < len(prompt_T)
      if is_known:
        page, known = self._shared[name], known + PAGE
        wave = max(wave, self._wave.get(page, -1) + 1)
      else:
        page = self._free.pop()
        if len(tokens) == PAGE and name not in self._shared:
          self._shared[name], self._name[page] = page, name
          self._wave[page] = wave
      self._uses[page] += 1
      self.table_BM[row, i] = before = page
    return known, wave

  def have_been_read(self) -> None:
    """Records that the prompts of all waves have been read."""
    self._wave.clear()

  def release(self, row: int) -> None:
    """Frees the pages of a row, except those that other rows share."""
    for page in self.table_BM[row][self.table_BM[row] > 0].tolist():
      self._uses[page] -= 1
      if not self._uses[page]:
        self._free.append(page)
        if page in self._name:
          del self._shared[self._name.pop(page)]
    self.table_BM[row] = 0
