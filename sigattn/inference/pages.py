"""Which page of a cache holds which tokens: bookkeeping on the host.

A page holds the keys and values of PAGE tokens. A row has the pages that its
prompt and its new tokens need, and no others, so that a long prompt costs the
other rows nothing. Rows whose prompts begin alike share the pages that those
tokens fill, which are then read once (vLLM, 2309.06180). Page 0 belongs to
nobody: what is written for padding, and for rows that have ended, goes there.
"""

from collections.abc import Sequence

import numpy as np

PAGE = 64  # tokens


def pages_for(tokens: int) -> int:
  """The pages that so many tokens lie in."""
  return -(-tokens // PAGE)


class Pages:
  """The pages of some rows.

  count: of all pages, with page 0.
  table_BM: int32, the pages of each row in the order of its tokens; 0 where it
  has none. The last column is always 0.
  """

  def __init__(self, count: int, rows: int, most: int) -> None:
    """count: of all pages, with page 0. most: that a row may need."""
    self.count = count
    self.table_BM = np.zeros((rows, most + 1), np.int32)
    self._free = list(range(count - 1, 0, -1))
    self._uses = np.zeros(count, np.int32)
    # A page that prompts may share, by (the page before, its tokens), and the
    # reverse. A page is there as long as those after it are, so that this says
    # all that comes before.
    self._shared, self._name = {}, {}
    self._wave = {}  # of pages that are not read yet

  @classmethod
  def for_prompts(
    cls, lengths: Sequence[int], common: int, rows: int
  ) -> "Pages":
    """Enough for any `rows` of these texts at the same time.

    lengths: the tokens that each may come to have. common: how many tokens all
    of them begin with, and keep.
    """
    shared = common // PAGE
    needs = sorted(map(pages_for, lengths))
    own = sum(need - shared for need in needs[-rows:])
    return cls(1 + shared + own, min(rows, len(needs)), needs[-1])

  def take(
    self, row: int, prompt_T: np.ndarray, length: int
  ) -> tuple[int, int]:
    """Gives a row without pages those for a text that may grow to `length`.

    Returns:
      (known, wave). The keys and values of the first `known` tokens of the
      prompt are there once the prompts of the waves before, which are counted
      from 0, have been read. At least one token remains to be read.
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
    """Says that the prompts of all waves have been read."""
    self._wave.clear()

  def release(self, row: int) -> None:
    """Takes the pages of a row from it."""
    for page in self.table_BM[row][self.table_BM[row] > 0].tolist():
      self._uses[page] -= 1
      if not self._uses[page]:
        self._free.append(page)
        if page in self._name:
          del self._shared[self._name.pop(page)]
    self.table_BM[row] = 0
