"""Runs the benchmark of scaling with sizes that a CPU can compute."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import attention, scale

TINY = [
  "--model",
  "runlocal",
  "--length",
  "32",
  "--rows",
  "2",
  "--lengths",
  "64",
  "--heads",
  "2",
  "--width",
  "8",
]


def test_rows_of_two_devices(tmp_path):
  program = (
    "import sys; from benchmarks import scale; scale._SECONDS = 0; "
    "scale.main([*sys.argv[2:], '--out', sys.argv[1], '--meshes', 'fsdp'])"
  )
  path = tmp_path / "a" / "tiny.json"
  flags = os.environ.get("XLA_FLAGS", "")
  flags += " --xla_force_host_platform_device_count=2"
  subprocess.run(
    [sys.executable, "-c", program, str(path), *TINY],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    check=True,
    timeout=240,
  )
  result = json.loads(path.read_text())
  assert {"device", "date", "commit", "jax", "rows"} == set(result)
  rows = result["rows"]
  assert [row["mesh"] for row in rows] == [
    {"data": 1}, {"fsdp": 2}, {"sequence": 1},
    *[{"sequence": 2}] * len(scale.RINGS),
  ]  # fmt: skip
  for row in rows:
    assert row["devices"] == max(row["mesh"].values())
    assert row["tokens_per_second"] > 0
    alone = rows[2 if "sequence" in row["mesh"] else 0]
    assert row["scaling"] * row["devices"] == pytest.approx(
      row["tokens_per_second"] / alone["tokens_per_second"]
    )
  assert [(row["exchange"], row["order"]) for row in rows[3:]] == [*scale.RINGS]
  assert all(row["error"] < 1e-5 for row in rows[3:])


def test_one_device_has_nothing_to_be_compared_with(tmp_path, monkeypatch):
  monkeypatch.setattr(attention, "_FOLDER", tmp_path / "a" / "results")
  (tmp_path / "a").mkdir()
  monkeypatch.setattr(scale, "_SECONDS", 0)
  scale.main([*TINY, "--parts", "ring"])
  path = tmp_path / "a" / "results" / "scale_cpu.json"
  [row] = json.loads(path.read_text())["rows"]
  assert (row["devices"], row["scaling"]) == (1, 1)
