"""Attention that only the decode kernel computes: pages, softmax, and 8 bits.

The kernel has no backward pass. If something is differentiated, a portable form
computes the result and its derivatives.

A table (B, M) names the pages of each row of the batch: page number
table[row, p] holds the keys p L .. p L + L - 1 of the row. Rows may share
pages.

Shapes: P pages of L keys, M pages for a row, S = M L. The other letters are
those of the module `problem`.
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sigattn.kernels import (
  batching_and_sharding,
  device,
  dispatch,
  triton,
  vectors,
)
from sigattn.kernels.problem import Operands, Problem
from sigattn.kernels.triton import decode

_logger = logging.getLogger(__name__)


def takes(
  problem: Problem, implementation: str | None, *, otherwise: str
) -> bool:
  """Whether `attention` is to compute a problem.

  problem: of the gathered keys. implementation: "triton" asks for `attention`,
  and the other names do not. None chooses `attention` if it is the fastest.
  otherwise: what computes the problem if `attention` does not, for the log.

  Raises:
    NotImplementedError: with the reason, if it is named and cannot compute the
      problem.
  """
  if implementation not in (None, "triton"):
    return False
  reason = _reason(problem, implementation, otherwise, device.current())
  if reason and implementation:
    raise NotImplementedError(
      f"attention {problem}: triton: {reason}; {dispatch.ADVICE}"
    )
  return not reason


def has_few_queries(problem: Problem) -> bool:
  """Whether a problem has few enough queries, as far as is known."""
  return problem.is_symbolic or problem.query_len <= decode.MOST_QUERIES


# Cached, so that each problem is logged once for each device.
@functools.lru_cache(maxsize=4096)
def _reason(problem, implementation, otherwise, card):
  is_softmax, most = problem.kind == "softmax", decode.MOST_QUERIES
  reason = triton.unsupported(problem)
  if not reason and problem.shapes.query_segment_ids is not None:
    reason = "segment ids are not implemented"
  few = has_few_queries(problem)
  if not reason and not few and (is_softmax or not implementation):
    reason = f"{problem.query_len} queries; at most {most}"
  least = decode.LEAST_KEYS
  if not reason and is_softmax and not implementation:
    reason = f"fewer than {least} keys" * (problem.key_len < least)
  how = f"{otherwise}; not triton: {reason}" if reason else "triton"
  if (few or not reason) and card.capability is not None:
    _logger.info("decoding attention %s by %s", problem, how)
  return reason


def attention(
  problem: Problem,
  portable: Callable[..., jax.Array],
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  *page_table: jax.Array,
) -> jax.Array:
  """(B, T, N, H), computed by the decode kernel. `takes` must be true.

  On a mesh that splits batch or heads, each device computes its part, and has
  all pages.

  Args:
    problem: of the gathered keys; its kind may be softmax, with normalize.
    portable: the same function of the following arrays, with derivatives.
    query: (B, T, N, H).
    key, value: (B, S, K, H), or pages, (P, L, K, H); they may be in 8 bits.
    operands: must not contain dense arrays or segment ids.
    page_table: (B, M) int32 if key and value are pages, else absent.
  """

  @jax.custom_jvp
  def attend(*arrays):
    return _batched(problem)(*arrays)

  @attend.defjvp
  def along(primals, tangents):
    return jax.jvp(portable, primals, tangents)

  return attend(query, key, value, operands, *page_table)


def _batched(problem):
  """The kernel, with a rule for vmap."""

  @jax.custom_batching.custom_vmap
  def attend(query, key, value, operands, *page_table):
    folded, vectors_too = vectors.fold(problem, operands)
    inputs = {"inputs": batching_and_sharding.PAGED} if page_table else {}
    outputs = ("BTNH", "BTN") if problem.normalize else ("BTNH",)
    return batching_and_sharding.over_devices(
      triton.decoded, outputs, folded, query, key, value, vectors_too,
      *page_table, **inputs,
    )[0]  # fmt: skip

  @attend.def_vmap
  def folded(size, batched, *arrays):
    arrays = _fold(problem.batch, size, batched, *arrays)
    larger = batching_and_sharding.resized(problem, *arrays[:4])
    out = _batched(larger)(*arrays)
    return out.reshape(size, problem.batch, *out.shape[1:]), True

  return attend


def _fold(batch, size, batched, query, key, value, operands, *page_table):
  """Folds the vmapped axis of the arrays, their first, into the batch."""
  if page_table and (batched[1] or batched[2]):
    # Each vmapped example has its own pages; the sets follow one another.
    count = key.shape[1] if batched[1] else key.shape[0]
    key, value = (
      batching_and_sharding.fold(
        "pages", x, 0 if b else None, size, count, True
      )
      for x, b in ((key, batched[1]), (value, batched[2]))
    )
    first = count * jnp.arange(size, dtype="int32")[:, None, None]
    of_all = page_table[0] if batched[4] else page_table[0][None]
    page_table, batched = (of_all + first,), (*batched[:4], True)

  def one(name, x, is_batched):
    if x is None:
      return None
    axis = 0 if is_batched else None
    return batching_and_sharding.fold(name, x, axis, size, batch, False)

  if not page_table:
    key, value = one("key", key, batched[1]), one("value", value, batched[2])
  return (
    one("query", query, batched[0]),
    key,
    value,
    Operands(*map(one, Operands._fields, operands, batched[3])),
    *(one("page_table", x, batched[4]) for x in page_table),
  )


# Pages.


def gather(
  pages_PLKH: jax.Array,
  page_table_BM: jax.Array,
  seen_BS: jax.Array,
) -> jax.Array:
  """(B, S, K, H): the keys, or the values, of each row in order.

  seen_BS: bool; keys that are not seen are replaced by zeros. If a page has no
  key that is seen, its number in the table may have any value.
  """
  page, *rest = pages_PLKH.shape[1:]
  of_page_BM = seen_BS.reshape(*page_table_BM.shape, page).any(-1)
  page_table_BM = jnp.where(of_page_BM, page_table_BM, 0)
  x_BMLKH = jnp.take(pages_PLKH, page_table_BM, axis=0, mode="clip")
  x_BSKH = x_BMLKH.reshape(*seen_BS.shape, *rest)
  return jnp.where(seen_BS[..., None, None], x_BSKH, 0)


def seen(problem: Problem, operands: Operands) -> jax.Array:
  """bool (B, S): the keys that some query of a row sees.

  operands: must have key lengths, and no dense arrays.
  """
  j_1S = jnp.arange(problem.key_len)[None]
  seen_BS = j_1S < operands.key_value_seq_lengths[:, None]
  offset_B1 = 0
  if operands.query_offset is not None:
    offset_B1 = operands.query_offset[:, None]
  left, right = problem.bounds
  if left is not None:
    seen_BS &= j_1S >= offset_B1 - left
  if right is not None:
    seen_BS &= j_1S < offset_B1 + problem.query_len + right
  return seen_BS
