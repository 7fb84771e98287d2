"""Attention to a cache of keys and values that lies in pages.

A row takes only the memory that its own length needs, and rows that begin with
the same tokens share the pages of these tokens. The idea is from PagedAttention
(vLLM, 2309.06180, Section 4.1).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sigattn import attention
from sigattn.kernels import decoding
from sigattn.kernels.problem import has_8_bits

PAGE_LENGTHS = (16, 32, 64, 128)


def paged_attention(
  query_BTNH: ArrayLike,
  key_pages_PLKH: ArrayLike,
  value_pages_PLKH: ArrayLike,
  page_table_BM: ArrayLike,
  lengths_B: ArrayLike,
  *,
  kind: str = "sigmoid",
  logit_bias: ArrayLike | None = None,
  query_logit_bias: ArrayLike | None = None,
  key_logit_bias: ArrayLike | None = None,
  n: float | None = None,
  normalize: bool = False,
  alibi_slopes: ArrayLike | None = None,
  scale: ArrayLike | None = None,
  is_causal: bool = True,
  query_offset: ArrayLike | None = None,
  local_window_size: int | tuple[int | None, int | None] | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """dot_product_attention from a few new tokens to keys that lie in pages.

    k_j = key_pages[page_table[row, j // L], j % L],   v_j in the same way
    out_i = sum_j phi(scale q_i k_j + alibi + b + b_i + b_j) v_j,
                                                       j < lengths[row]

  The queries are the last T tokens of a row. Their keys and values are in the
  pages already. Shapes: P pages of L tokens each, at most M pages for a row,
  S = M L. The other letters are those of dot_product_attention, and so are the
  arguments that are not listed here.

  On a GPU, the Triton decode kernel computes up to 16 queries and reads the
  keys where they lie. All other calls gather the pages of each row into
  (B, S, K, H), and call dot_product_attention. Gradients are always computed in
  the gathered form.

  Args:
    query_BTNH: float16, bfloat16 or float32.
    key_pages_PLKH, value_pages_PLKH: of the query's dtype, or float8_e4m3fn as
      in dot_product_attention; L is one of PAGE_LENGTHS, and K divides N. Rows
      may share pages.
    page_table_BM: integers from 0 to P - 1, the pages of each row in the order
      of its tokens. A number is read only if its page has a token that some
      query sees. So numbers beyond the row's length, and before the window of
      its first query, may have any value.
    lengths_B: integers, the number of tokens of each row, at most S. If it is
      0, the row of the output is zero, with softmax only in the decode kernel.
    key_logit_bias: b_j, with S in the order of a row's tokens; it does not lie
      in pages. Numbers at and beyond the row's length have no effect.
    n: the length that b and ReLU's divisor are made for; None: S.
    is_causal: a query sees no token behind its own. True by default, unlike in
      dot_product_attention.
    query_offset: the position of a row's first query, an integer or (B,)
      integers; None: lengths - T. It is refused without is_causal,
      local_window_size and alibi_slopes, where it would have no effect.
    implementation: "triton" is the decode kernel, for any T, but with softmax
      for at most 16. The other names of attention.implementations(kind) gather
      the pages, and then act as in dot_product_attention. None: the fastest.

  Returns:
    (B, T, N, H), with the dtype of the query.

  Raises:
    ValueError: for arguments that make no sense.
    NotImplementedError: if the named implementation cannot compute this.
  """
  query, keys, values, table, lengths = (
    attention.as_array(name, x)
    for name, x in dict(
      query_BTNH=query_BTNH,
      key_pages_PLKH=key_pages_PLKH,
      value_pages_PLKH=value_pages_PLKH,
      page_table_BM=page_table_BM,
      lengths_B=lengths_B,
    ).items()
  )
  normalize, is_causal = attention.flags(
    normalize=normalize, is_causal=is_causal
  )
  attention.validate_kind(kind, implementation, normalize)
  _validate(query, keys, values, table, lengths)
  _validate_lengths(lengths_B, table.shape[1] * keys.shape[1])
  table, lengths = table.astype("int32"), lengths.astype("int32")
  has_place = attention.depends_on_position(
    query_offset, is_causal, local_window_size, alibi_slopes
  )
  if query_offset is None and has_place:
    query_offset = lengths - query.shape[1]
  whole = jax.ShapeDtypeStruct(
    (len(query), table.shape[1] * keys.shape[1], *keys.shape[2:]), keys.dtype
  )
  query, operands, numbers = attention.prepare(
    query, whole, kind=kind, logit_bias=logit_bias, n=n, scale=scale,
    query_offset=query_offset, alibi_slopes=alibi_slopes,
    query_logit_bias=query_logit_bias, key_logit_bias=key_logit_bias,
    key_value_seq_lengths=lengths,
  )  # fmt: skip
  problem = attention.problem_of(
    query, whole, whole, operands, kind=kind, normalize=normalize,
    is_causal=is_causal, window=local_window_size, **numbers,
  )  # fmt: skip
  if decoding.takes(problem, implementation, otherwise="gathered pages"):
    return decoding.attention(
      problem, functools.partial(_gathered, problem, None),
      query, keys, values, operands, table,
    )  # fmt: skip
  return _gathered(
    problem, implementation, query, keys, values, operands, table
  )


def _gathered(problem, implementation, query, keys, values, operands, table):
  seen_BS = decoding.seen(problem, operands)
  key, value = (decoding.gather(x, table, seen_BS) for x in (keys, values))
  return attention.computed(
    problem, implementation, query, key, value, operands
  )


def _validate(query, keys, values, table, lengths):
  if query.ndim != 4:
    raise ValueError(f"query_BTNH.shape={query.shape}; must have four axes")
  batch, _, heads, width = query.shape
  if keys.ndim != 4 or keys.shape[3] != width or 0 in keys.shape:
    raise ValueError(
      f"key_pages_PLKH.shape={keys.shape}; must be pages, tokens, key heads "
      f"and the query's head width, {width}"
    )
  if keys.shape[1] not in PAGE_LENGTHS:
    raise ValueError(
      f"key_pages_PLKH.shape={keys.shape}: pages of {keys.shape[1]} tokens; "
      f"choose from {PAGE_LENGTHS}"
    )
  if heads % keys.shape[2]:
    raise ValueError(
      f"key_pages_PLKH.shape={keys.shape}: {keys.shape[2]} heads; must divide "
      f"the query's {heads}"
    )
  if values.shape != keys.shape:
    raise ValueError(
      f"value_pages_PLKH.shape={values.shape}; must be that of key_pages_PLKH, "
      f"{keys.shape}"
    )
  for name, pages in (("key_pages_PLKH", keys), ("value_pages_PLKH", values)):
    if pages.dtype != query.dtype and not has_8_bits(query, keys, values):
      raise ValueError(
        f"{name}.dtype={pages.dtype.name}; must be the query's, "
        f"{query.dtype.name}"
      )
  if table.ndim != 2 or len(table) != batch or not table.shape[1]:
    raise ValueError(
      f"page_table_BM.shape={table.shape}; must be ({batch}, M), M the pages "
      "of a row"
    )
  if lengths.shape != (batch,):
    raise ValueError(f"lengths_B.shape={lengths.shape}; must be ({batch},)")
  for name, x in (("page_table_BM", table), ("lengths_B", lengths)):
    if not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(f"{name}.dtype={x.dtype.name}; must be an integer")


def _validate_lengths(lengths, most):
  """Checks lengths that are known without waiting for a device."""
  if isinstance(lengths, jax.Array) or not np.size(lengths):
    return
  least, longest = np.min(lengths), np.max(lengths)
  if least < 0 or longest > most:
    raise ValueError(
      f"lengths_B from {least} to {longest}; must be from 0 to {most}, the "
      "tokens of a row's pages"
    )
