"""The calculated step time, and the tables of docs/scaling.md."""

import pathlib

import pytest

from benchmarks import scale_model

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_document_has_the_tables():
  text = DOCS.read_text()
  assert scale_model.markdown() in text
  assert scale_model.bytes_markdown() in text


def test_counts_of_a_small_ring():
  # 4 GPUs with 1,000 tokens of width 2,048 each.
  block = 1000 * 2048
  assert scale_model.ring_bytes(4, 4000, False) == 3 * 2 * block * 2
  assert scale_model.ring_bytes(4, 4000, True) == (
    3 * 2 * block * 2 + 4 * 2 * block * 4
  )
  assert scale_model.ring_bytes(1, 1000, False) == 0
  products = 2 * 2 * 4000**2 * 2048 / 2  # q k^T and p v under a causal mask
  assert scale_model.attention_seconds(4, 4000) == pytest.approx(
    products / 4 / scale_model.ATTENTION
  )


def test_parts_add_up_and_the_exchange_is_exposed_where_blocks_are_short():
  for row in scale_model.rows():
    parts = row["products"] + row["attention"] + row["gradients"]
    assert row["step"] == pytest.approx(parts)
    assert 0 <= row["exposed"] <= row["attention"]
    assert 0 < row["busy"] < 1
  edge = int(scale_model.hidden_from(scale_model.NVLINK))
  for tokens, is_exposed in ((2 * edge, False), (edge // 4, True)):
    row = scale_model.row(8, 8, 8 * tokens)
    assert (row["exposed"] > 0) == is_exposed


def test_softmax_needs_more_than_sigmoid_of_everything():
  for what, softmax, plain, normalised in scale_model.row_bytes():
    assert plain == 0, what
    assert softmax >= plain
    if "carried" in what or "sent where" in what:
      assert softmax == 2 * normalised
