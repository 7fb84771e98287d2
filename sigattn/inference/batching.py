"""Continuous batching: a prompt waits until a row of the cache is free.

A fixed number of rows is decoded together. A row ends with the end token, with
a stop string, or when it has all of its tokens. Then the next prompt is read
into it, and all rows are decoded further. The tokens of a row depend only on
its prompt, the index of the prompt and the options. The other rows can only
change how sums are rounded.

With a `window`, no row ever has more than that many tokens. A text that grows
longer is cut, and its last tokens are read again as a new text that begins at
position 0. This is right for every kind of positions: the model sees what it
saw in training, where documents are cut into rows in the same way. If the cache
only dropped its oldest tokens, sines and row_power would count beyond the
trained length. The deeper layers would also still contain information from the
dropped tokens.
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

_CHUNK = 16  # tokens; after each chunk, rows that have ended are replaced


class New(NamedTuple):
  """The new tokens of a prompt, `ids`, and whether its text has ended."""

  index: int  # of the prompt
  ids: list[int]
  ended: bool


@dataclasses.dataclass
class _Row:
  """A prompt that is being continued."""

  index: int
  prompt_T: np.ndarray
  ids: list[int]  # tokens so far, without the prompt
  room: int = 0  # tokens that may be drawn before the text is read again


def kept(length: int, left: int, window: int | None) -> int:
  """How many of the last tokens of a text are read within a window.

  If all fit, all are read. Otherwise the number leaves room for the tokens that
  are still to be drawn, but it is at least half a window.

  length: of the text. left: the most tokens that are still drawn, >= 1. window:
  the most tokens that are visible at once, None for no limit.
  """
  if window is None or length <= window:
    return length
  return max(window // 2, window + 1 - left, 1)


def slots(
  prompts: Sequence[np.ndarray], max_tokens: int, window: int | None
) -> int:
  """The number of cache slots that a row needs for any of these prompts."""
  longest = max(map(len, prompts))
  if window is not None and longest + max_tokens > window:
    return engine.slots(window, 0)
  return engine.slots(longest, max_tokens)


def _pages(prompts, rows, max_tokens, window):
  """Pages that suffice for any `rows` of these prompts at the same time."""
  lengths = [len(x) + max_tokens for x in prompts]
  # One token of each prompt must be read, even if all have the same one.
  common = min(map(len, prompts)) - 1
  for x in prompts:
    differs = np.flatnonzero(x[:common] != prompts[0][:common])
    common = int(differs[0]) if len(differs) else common
  if window is not None and max(lengths) > window:
    # A text that was cut does not begin with the common tokens any more.
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
  cache_dtype: str | None = None,
  stopped: Callable[[list[int]], bool] = lambda ids: False,
) -> Iterator[New]:
  """Continues each prompt, and yields the new tokens chunk by chunk.

  Args:
    machine: the model.
    prompts: the tokens of each, at least one. They begin in this order.
    rows: how many prompts are continued at the same time.
    max_tokens: the maximum number of new tokens of each, >= 1.
    sampling: how tokens are drawn.
    keys: the key of each prompt, see engine.Prompt.
    end: the token that ends a row; it is not yielded.
    window: the most tokens that a row sees; None for no limit.
    is_paged: whether the cache consists of pages, see pages.py.
    cache_dtype: see lm.LanguageModel.empty_cache.
    stopped: returns whether a row with these new tokens ends early.
  """
  if not prompts:
    return
  rows, chunk = min(rows, len(prompts)), min(_CHUNK, max_tokens)
  pages = _pages(prompts, rows, max_tokens, window) if is_paged else None
  if is_paged:
    state = machine.empty_pages(pages, cache_dtype)
  else:
    count = slots(prompts, max_tokens, window)
    state = machine.empty(rows, count, cache_dtype)
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
  """Reads the prompts into their rows.

  A prompt that shares pages is read in a later wave than the one that fills
  these pages.
  """
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
  """Adds the tokens of a chunk to a row, and returns a New."""
  tokens = tokens[: row.room]
  row.room -= len(tokens)
  has_end = end in tokens
  new = tokens[: tokens.index(end)] if has_end else tokens
  row.ids += new
  is_full = len(row.ids) >= max_tokens
  return New(row.index, new, has_end or is_full or stopped(row.ids))
