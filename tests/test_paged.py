"""Compares the portable paged_attention with the contiguous operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sigattn
from tests.kernels.cases import PAGE, draw_paged


def contiguous(arrays, whole, **options):
  """The same attention, with contiguous keys and values."""
  query, *_, lengths = arrays
  options = dict(is_causal=True) | options
  if options["is_causal"]:
    options = dict(query_offset=lengths - query.shape[1]) | options
  return sigattn.dot_product_attention(
    query, *whole, key_value_seq_lengths=lengths, **options
  )


OPTIONS = (
  {}, dict(normalize=True), dict(kind="relu", n=30.0), dict(is_causal=False),
  dict(local_window_size=(20, 0)), dict(query_offset=5),
  dict(alibi_slopes=np.ones(4, np.float32), logit_bias=-1.0, scale=0.7),
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pages_change_no_bit(options):
  arrays, whole = draw_paged([40, 64, 0, 5], shared=0)
  found = sigattn.paged_attention(*arrays, **options)
  np.testing.assert_array_equal(found, contiguous(arrays, whole, **options))
  assert not np.asarray(found[2]).any()
  assert np.asarray(found[0]).any()


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_logit_vectors_are_not_in_pages(kind):
  arrays, whole = draw_paged([40, 64, 5])
  draw = np.random.default_rng(1).standard_normal
  vectors = dict(key_logit_bias=draw((3, 4, whole.shape[2]), "float32"))
  if kind == "sigmoid":
    vectors["query_logit_bias"] = draw((3, 4, 3), "float32")
  wanted = contiguous(arrays, np.nan_to_num(whole), kind=kind, **vectors)
  found = sigattn.paged_attention(*arrays, kind=kind, **vectors)
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
  plain = sigattn.paged_attention(*arrays, kind=kind)
  assert not np.allclose(found, plain, atol=1e-3)


def test_pages_in_8_bits_are_cast_when_they_are_gathered():
  arrays, _ = draw_paged([40, 64, 0, 5])
  query, *pages, table, lengths = arrays
  pages = [x.astype("float8_e4m3fn") for x in pages]
  found = sigattn.paged_attention(query, *pages, table, lengths)
  pages = [x.astype("float32") for x in pages]
  wanted = sigattn.paged_attention(query, *pages, table, lengths)
  np.testing.assert_array_equal(found, wanted)


def test_softmax_of_pages():
  arrays, whole = draw_paged([40, 64, 17])
  wanted = contiguous(arrays, np.nan_to_num(whole), kind="softmax")
  found = sigattn.paged_attention(*arrays, kind="softmax")
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_rows_share_the_pages_of_a_common_beginning():
  """The gradient of a shared page is the sum of the rows' gradients."""
  arrays, whole = draw_paged([40, 64, 37], shared=2)
  query, keys, values, table, lengths = arrays
  assert (table[:, :2] == table[:1, :2]).all()
  found, pull_back = jax.vjp(
    lambda *x: sigattn.paged_attention(*x, table, lengths), query, keys, values
  )
  wanted, pull_wanted = jax.vjp(
    lambda *x: contiguous((x[0], table, lengths), x[1:]), query, *whole
  )
  np.testing.assert_array_equal(found, wanted)
  d_query, *d_pages = pull_back(jnp.cos(found))
  d_wanted, *d_whole = pull_wanted(jnp.cos(found))
  np.testing.assert_array_equal(d_query, d_wanted)
  for of_pages, of_rows in zip(d_pages, d_whole, strict=True):
    total = np.zeros_like(of_pages)
    of_rows = np.asarray(of_rows).reshape(*table.shape, *keys.shape[1:])
    for row, length in enumerate(lengths):
      for p in range(-(-length // PAGE)):
        total[table[row, p]] += of_rows[row, p]
    np.testing.assert_allclose(of_pages, total, rtol=1e-6, atol=1e-7)


def test_pages_behind_the_window_are_free():
  """They may belong to another row, and may hold any numbers."""
  arrays, _ = draw_paged([64, 50])
  query, keys, values, table, lengths = arrays
  window = dict(local_window_size=(12, 0))
  wanted = sigattn.paged_attention(*arrays, **window)
  for row, length in enumerate(lengths):
    free = (length - query.shape[1] - 12) // PAGE
    keys[table[row, :free]] = values[table[row, :free]] = np.nan
    table[row, :free] = -1
  found = sigattn.paged_attention(query, keys, values, table, lengths, **window)
  np.testing.assert_array_equal(found, wanted)


X = np.zeros


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (dict(query_BTNH=X((2, 4, 8))), r"query_BTNH\.shape=.*; must have four"),
    (dict(key_pages_PLKH=X((5, 16, 2, 4))), r"key_pages_PLKH\.shape.*width, 8"),
    (dict(key_pages_PLKH=X((5, 24, 2, 8))), "pages of 24 tokens; choose from"),
    (dict(key_pages_PLKH=X((5, 16, 3, 8))), "3 heads; must divide the query's"),
    (dict(value_pages_PLKH=X((4, 16, 2, 8))), r"value_pages_PLKH\.shape=\(4,"),
    (dict(value_pages_PLKH=X((5, 16, 2, 8), "float16")), "query's, float32"),
    (dict(page_table_BM=X((3, 4), int)), r"page_table_BM\.shape=\(3, 4\); m"),
    (dict(page_table_BM=X((2, 4))), r"page_table_BM\.dtype=float32; must"),
    (dict(lengths_B=X((3,), int)), r"lengths_B\.shape=\(3,\); must be \(2,\)"),
    (dict(lengths_B=X((2,))), r"lengths_B\.dtype=float32; must be an integer"),
    (dict(lengths_B=np.array([3, 65])), "lengths_B from 3 to 65; .* 0 to 64"),
    (dict(kind="softplus"), "kind='softplus'; choose from"),
    (dict(kind="softmax", logit_bias=1.0), "logit_bias=1.0 with kind='soft"),
    (dict(implementation="cudnn"), "implementation='cudnn'; .* choose from"),
    (dict(is_causal="no"), "is_causal='no'; must be True or False"),
    (dict(page_table_BM=None), "page_table_BM=None; must be an array of"),
    (dict(local_window_size=-1), "local_window_size=-1; must be"),
  ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(change, said):
  arguments = dict(
    query_BTNH=X((2, 1, 4, 8)), key_pages_PLKH=X((5, 16, 2, 8)),
    value_pages_PLKH=X((5, 16, 2, 8)), page_table_BM=X((2, 4), int),
    lengths_B=X((2,), int),
  )  # fmt: skip
  with pytest.raises(ValueError, match=said):
    sigattn.paged_attention(**arguments | change)


def test_an_offset_that_has_no_effect_is_refused():
  arrays, _ = draw_paged([40])
  with pytest.raises(ValueError, match="query_offset=3; has no effect"):
    sigattn.paged_attention(*arrays, is_causal=False, query_offset=3)


def test_what_the_kernel_cannot_do_is_refused_where_it_is_named():
  arrays, _ = draw_paged([40])
  with pytest.raises(NotImplementedError, match="attention .* triton: needs"):
    sigattn.paged_attention(*arrays, implementation="triton")
