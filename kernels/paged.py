"""Keys and values that lie in pages: gathered, or found by the decode kernel.

A row of the batch names its pages in a table, (B, M): the page that its p-th
number names holds its keys p L .. p L + L - 1. Rows may share pages.

Shapes: P pages of L keys, M pages of a row, S = M L; the others as in problem.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from sigattn.kernels import batching_and_sharding, device, triton, xla
from sigattn.kernels.problem import Operands, Problem
from sigattn.kernels.triton import decode

_logger = logging.getLogger(__name__)


def takes(problem: Problem, implementation: str | None) -> bool:
  """Whether `attention` computes a problem, and not a gathered form.

  problem: of the gathered keys. implementation: "triton" is `attention`; other
  names are not, and None is where it is the fastest.

  Raises:
    NotImplementedError: with the reason, if it is named and cannot.
  """
  if implementation not in (None, "triton"):
    return False
  reason = _reason(problem, implementation, device.current())
  if reason and implementation:
    raise NotImplementedError(f"paged attention {problem}: triton: {reason}")
  return not reason


# Cached, so that each problem is logged once for each device.
@functools.lru_cache(maxsize=4096)
def _reason(problem, implementation, _):
  reason = triton.unsupported(problem)
  if not reason and not implementation:
    most = decode.MOST_QUERIES
    if problem.query_len > most:
      reason = f"more than {most} queries"
  how = f"gathered; not triton: {reason}" if reason else "triton"
  _logger.info("paged attention %s by %s", problem, how)
  return reason


def gather(
  pages_PLKH: jax.Array,
  page_table_BM: jax.Array,
  seen_BS: jax.Array,
) -> jax.Array:
  """(B, S, K, H): the keys, or the values, of each row one after another.

  seen_BS: bool; zeros take the place of the others, whose numbers in the table
  may be any.
  """
  page, *rest = pages_PLKH.shape[1:]
  of_page_BM = seen_BS.reshape(*page_table_BM.shape, page).any(-1)
  page_table_BM = jnp.where(of_page_BM, page_table_BM, 0)
  x_BMLKH = jnp.take(pages_PLKH, page_table_BM, axis=0, mode="clip")
  x_BSKH = x_BMLKH.reshape(*seen_BS.shape, *rest)
  return jnp.where(seen_BS[..., None, None], x_BSKH, 0)


def seen(problem: Problem, operands: Operands) -> jax.Array:
  """bool (B, S): the keys that some query of a row sees.

  operands: with key lengths, and without dense ones.
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


def attention(
  query: jax.Array,
  key_pages: jax.Array,
  value_pages: jax.Array,
  page_table: jax.Array,
  operands: Operands,
  problem: Problem,
) -> jax.Array:
  """(B, T, N, H) by the decode kernel, which reads the keys where they lie.

  Derivatives of all orders are those of the gathered form. On a mesh that
  splits batch or heads each device computes its part; all pages are on each.

  Args:
    query: (B, T, N, H).
    key_pages, value_pages: (P, L, K, H).
    page_table: (B, M) int32.
    operands: none of them dense, and no segments.
    problem: of the gathered keys. triton.unsupported(problem) must be "".
  """
  return _attention(
    problem, query, key_pages, value_pages, page_table, operands
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(problem, query, key_pages, value_pages, page_table, operands):
  # JAX can split a kernel by a rule, but not batch it.
  @jax.custom_batching.sequential_vmap
  def attend(query, key_pages, value_pages, page_table, operands):
    return batching_and_sharding.over_devices(
      triton.paged, ("BTNH",), problem, query, key_pages, value_pages, operands,
      page_table, inputs=batching_and_sharding.PAGED,
    )[0]  # fmt: skip

  return attend(query, key_pages, value_pages, page_table, operands)


@_attention.defjvp
def _along(problem, primals, tangents):
  return _attention(problem, *primals), jax.jvp(
    functools.partial(_gathered, problem), primals, tangents
  )[1]


def _gathered(problem, query, key_pages, value_pages, page_table, operands):
  seen_BS = seen(problem, operands)
  key, value = (
    gather(x, page_table, seen_BS) for x in (key_pages, value_pages)
  )
  result = xla.attention(query, key, value, operands, problem)
  return result[0] if problem.normalize else result
