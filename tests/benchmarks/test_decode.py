"""The benchmark of generation: what it counts, and that it runs."""

import pytest

from benchmarks import decode
from sigattn.data import text
from sigattn.inference import engine
from tests.tasks import small_lm


@pytest.mark.parametrize(
  "cache", [{}, {"cache": "paged", "cache_dtype": "float8_e4m3fn"}]
)
def test_a_row_of_a_small_model_counts_the_bytes_that_a_step_reads(cache):
  config = small_lm.small(depth=2)
  graphdef, shapes = engine.shapes(config)
  params = decode._random(shapes)
  machine = engine.Engine(graphdef, params, small_lm.V, end=-1)
  row = decode._our_row(machine, "3x20", 1e9, 4, {}, False, **cache)
  assert (row["rows"], row["prompt"]) == (3, 20)
  assert row["milliseconds_per_token"] > 0
  model = config.model
  attention = 4 * model.width**2
  mlp = 3 * model.width * model.mlp_dim
  matrices = 2 * (attention + mlp) + text.vocab_size(config) * model.width
  # Two arrays of keys and values in each of two layers, 22 tokens of each row.
  numbers = 2 * 2 * 3 * 22 * model.width
  bytes_ = 4 * matrices + (1 if cache else 4) * numbers
  assert row["gigabytes"] * 1e9 == pytest.approx(bytes_, rel=0.05)
  assert row["gigabytes"] * 1e9 >= bytes_
  assert row["bytes_bound_ms"] == pytest.approx(row["gigabytes"] * 1e3)


def test_rows_are_joined_with_the_fastest_peer_of_their_size():
  own = {
    "rows": 1, "prompt": 512, "milliseconds_per_token": 1.0,
    "bytes_bound_ms": 0.8,
  }  # fmt: skip
  size = {"rows": 1, "prompt": 512}
  found = {
    "ours": [own, own | {"rows": 2}],
    "dynamic": [size | {"milliseconds": 25.0}],
    "static": [size | {"milliseconds": 6.0}],
  }
  first, second = decode._joined("1b", {}, found)
  assert (first["ratio"], first["peer"]) == (1.25, 6.0)
  assert first["peer_name"] == decode.PEERS["static"]
  assert first["times_faster"] == 6.0
  assert (second["peer"], second["peers"]) == (None, {})
