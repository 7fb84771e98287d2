"""Continuous batching: prompts wait until a row of the cache is free.

A fixed number of rows is decoded together. When one ends, by the end token, a
stop string or its number of tokens, the next prompt is read into it, and the
other rows go on after that. A row's tokens follow from its prompt, its number
and the options alone; what runs beside it can only change how sums are rounded.

With a `window`, no row ever holds more than that many tokens. A text that grows
past it is cut, and what is left of it is read again as a new text, from
position 0 on. That is right for every scheme of positions: the model sees what
it saw in training, where documents are cut into rows in the same way. A cache
that only forgot its oldest tokens would let sines and row_power count on past
the trained length, and its deeper layers would still hold what the forgotten
tokens said.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sigattn.inference import engine
from sigattn.inference.pages import Pages
from sigattn.inference.sampling import Sampling

_CHUNK = 16  # tokens between two looks at whether rows have ended


class New(NamedTuple):
  """What a row has got: `ids` after those before, and whether it has ended."""

  index: int  # of the prompt
  ids: list[int]
  ended: bool


@dataclasses.dataclass
class _Row:
  """A prompt that is being continued."""

  index: int
  prompt_T: np.ndarray
  ids: list[int]  # tokens so far, without the prompt
  room: int = 0  # tokens that may be drawn before something is read again


def kept(length: int, left: int, window: int | None) -> int:
  """How many tokens of a text, its last ones, are read within a window.

  All, if they fit. Else so many that all tokens which are left to draw fit too,
  or half a window if that is more.

  length: of the text. left: the most tokens that are still drawn, >= 1. window:
  the most tokens that are visible at once, None for no limit.
  """
  if window is None or length <= window:
    return length
  return max(window // 2, window + 1 - left, 1)


def slots(
  prompts: Sequence[np.ndarray], max_tokens: int, window: int | None
) -> int:
  """The slots of a row's cache that these prompts need."""
  longest = max(map(len, prompts))
  if window is not None and longest + max_tokens > window:
    return engine.slots(window, 0)
  return engine.slots(longest, max_tokens)


def _pages(prompts, rows, max_tokens, window):
  """Pages for these prompts, of which any `rows` may run at the same time."""
  lengths = [len(x) + max_tokens for x in prompts]
  # One token of each must be read, even where others have the same.
  common = min(map(len, prompts)) - 1
  for x in prompts:
    differs = np.flatnonzero(x[:common] != prompts[0][:common])
    common = int(differs[0]) if len(differs) else common
  if window is not None and max(lengths) > window:
    # Texts that are cut begin with other tokens.
    lengths, common = [min(x, window + 1) for x in lengths], 0
  return Pages.for_prompts(lengths, common, rows)


def continued(
  machine: engine.Engine,
  prompts: Sequence[np.ndarray],
  *,
  rows: int,
  max_tokens: int,
  sampling: Sampling,
  keys: np.ndarray,
  end: int,
  window: int | None = None,
  is_paged: bool = False,
  stopped: Callable[[list[int]], bool] = lambda ids: False,
) -> Iterator[New]:
  """Continues each prompt; yields what is new, chunk by chunk.

  Args:
    machine: the model.
    prompts: tokens of each, at least one. They begin in this order.
    rows: how many are continued at the same time.
    max_tokens: the maximum number of new tokens of each, >= 1.
    sampling: how they are drawn.
    keys: of each prompt, see engine.Prompt.
    end: the token that ends a row; it is not part of what is yielded.
    window: the most tokens that a row sees; None for no limit.
    is_paged: whether the cache lies in pages, see pages.py.
    stopped: whether a row with these new tokens ends before max_tokens.
  """
  if not prompts:
    return
  rows, chunk = min(rows, len(prompts)), min(_CHUNK, max_tokens)
  pages = _pages(prompts, rows, max_tokens, window) if is_paged else None
  if is_paged:
    state = machine.empty_pages(pages)
  else:
    state = machine.empty(rows, slots(prompts, max_tokens, window))
  waiting = collections.deque(
    _Row(i, prompt_T, []) for i, prompt_T in enumerate(prompts)
  )
  active = [None] * rows
  while waiting or any(active):
    begun = []
    for i in range(rows):
      if active[i] is None and waiting:
        active[i] = waiting.popleft()
      if active[i] is not None and not active[i].room:
        begun.append(_begin(i, active[i], max_tokens, window, keys))
    state = _fill(machine, state, begun, pages)
    # All chunks are equally long, so that one program is compiled.
    token_BT, state = machine.decode(state, chunk, sampling)
    for i, token_T in enumerate(jax.device_get(token_BT)):
      if active[i] is not None:
        new = _take(active[i], token_T.tolist(), max_tokens, end, stopped)
        active[i] = None if new.ended else active[i]
        if pages is not None and not (active[i] and active[i].room):
          pages.release(i)
        yield new


def _begin(number, row, max_tokens, window, keys):
  """The Prompt of a row that begins, or that has filled its window."""
  text_T = np.concatenate([row.prompt_T, np.array(row.ids, np.int32)])
  left = max_tokens - len(row.ids)
  text_T = text_T[-kept(len(text_T), left, window) :]
  # The last token that is drawn need not be put into the cache.
  row.room = left if window is None else min(left, window + 1 - len(text_T))
  return engine.Prompt(number, text_T, row.room, keys[row.index], len(row.ids))


def _fill(machine, state, begun, pages):
  """Reads the prompts; in waves, where some have pages that others fill."""
  if pages is None:
    return machine.fill(state, begun)
  waves = collections.defaultdict(list)
  for x in begun:
    known, wave = pages.take(x.row, x.token_T, len(x.token_T) + x.left)
    waves[wave].append(x._replace(known=known))
  pages.have_been_read()
  state = state._replace(table_BM=jax.numpy.asarray(pages.table_BM))
  for _, wave in sorted(waves.items()):
    state = machine.fill(state, wave)
  return state


def _take(row, tokens, max_tokens, end, stopped):
  """Gives a row the tokens of a chunk that are its own."""
  tokens = tokens[: row.room]
  row.room -= len(tokens)
  has_end = end in tokens
  new = tokens[: tokens.index(end)] if has_end else tokens
  row.ids += new
  is_full = len(row.ids) >= max_tokens
  return New(row.index, new, has_end or is_full or stopped(row.ids))
