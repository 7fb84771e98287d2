"""Runs five kills of tests/chaos.py.

benchmarks/results/chaos.json records a hundred.
"""

from tests import chaos


def test_five_kills_lose_nothing(tmp_path):
  counts = chaos.chaos(5, tmp_path, total_steps=40, writes=2, seconds=0.5)
  assert counts["kills"] == counts["bit_identical"] == 5
  assert counts["inside_write"] >= 2
  assert counts["metrics_lost"] == counts["events_lost"] == 0
  assert all(counts[f"of_{task}"] for task in chaos.TASKS)
