"""The attention benchmark, with the baselines that run on a CPU."""

import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest

from benchmarks import attention, baselines
from benchmarks.baselines import Baseline, Cell

CELLS = (Cell(16, 32, 2, 2, False), Cell(16, 32, 2, 2, True, padding=0.25))


@pytest.fixture
def field():
  ours = functools.partial(baselines._ours, "xla")
  ready = jax.block_until_ready
  return [
    Baseline("sigattn xla", False, "jax", ours, ready, baselines._any),
    *(
      baseline
      for baseline in baselines.BASELINES
      if baseline.name == "XLA (jax.nn)"
    ),
  ]


def test_flops_and_lengths_of_a_cell():
  full, half = Cell(64, 1000, 4, 8, False), Cell(64, 1000, 4, 8, True, 0.25)
  assert full.flops("forward") == 4 * 4 * 1000**2 * 8 * 64
  assert half.flops("both") == full.flops("forward") * 3.5 / 2
  assert full.lengths is None
  np.testing.assert_array_equal(half.lengths, [1000, 833, 667, 500])


def test_a_row_for_each_baseline_and_pass_that_can(field):
  prepared = attention.prepare(CELLS, field)
  full, padded = (
    list(attention.speed(cell, field, prepared)) for cell in CELLS
  )
  assert [(row["implementation"], row["pass"]) for row in full] == [
    (baseline.name, direction)
    for baseline in field
    for direction in baselines.PASSES
  ]
  for row in full[3:]:  # these rows are the only softmax baseline
    assert row["ratio_to_best_softmax"] == 1
  assert {row["implementation"] for row in padded} == {"sigattn xla"}
  assert {row["ratio_to_best_softmax"] for row in padded} == {None}
  means = list(attention._means(full + padded))
  assert [m["mean"] for m in means] == [
    pytest.approx(row["ratio_to_best_softmax"], abs=1e-3) for row in full[:3]
  ]


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (
      ["--baselines", "mosaic", "FA3"],
      "--baselines FA3: no part of sigattn mosaic,",
    ),
    (["--plot", "x.json"], "--plot x.json: there is no such file"),
    (["--table", "x.json"], "--table x.json: there is no file x.json"),
    (["--table", "no"], "--table no: there is no file "),
  ],
)
def test_what_it_refuses(arguments, said, monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["bench", *arguments])
  with pytest.raises(SystemExit):
    attention.main()
  assert said in capsys.readouterr().err


def test_a_table_is_named_or_has_a_path(tmp_path, monkeypatch, capsys):
  name = "kernels_h100_64"
  copy = tmp_path / "copy.json"
  shutil.copy(attention.result_path(name), copy)
  monkeypatch.setattr("sys.argv", ["bench", "--table", name, str(copy)])
  attention.main()
  rows = capsys.readouterr().out.splitlines()
  assert len(rows) == 6
  assert rows[:3] == rows[3:]


def test_a_baseline_that_fails_is_named_and_left_out(field, capsys):
  def fail(cell):
    raise RuntimeError("out of memory\nand more")

  field[0] = Baseline("other", True, "jax", fail, jax.block_until_ready)
  rows = list(attention.speed(CELLS[0], field, attention.prepare(CELLS, field)))
  assert {row["implementation"] for row in rows} == {"XLA (jax.nn)"}
  said = capsys.readouterr().out
  assert said.count("other, Cell(width=16") == 1
  assert "RuntimeError out of memory\n" in said


def test_a_baseline_that_fails_when_it_is_timed_has_no_rows(field, capsys):
  started = []

  def call():
    started.append(1)
    if len(started) > len(baselines.PASSES):
      raise RuntimeError("out of memory")

  def calls(cell):
    return dict.fromkeys(baselines.PASSES, call)

  field[0] = Baseline("other", True, "torch", calls, lambda result: None)
  rows = list(attention.speed(CELLS[0], field, attention.prepare(CELLS, field)))
  assert {row["implementation"] for row in rows} == {"XLA (jax.nn)"}
  assert "other, Cell(width=16" in capsys.readouterr().out


def test_ours_saves_query_key_and_value_alone(field):
  ours, softmax = (
    baselines._jax_memory(baseline.calls(CELLS[0]))[0] for baseline in field
  )
  assert ours == 3 * math.prod(CELLS[0].shape) * 2
  assert softmax > ours


def test_plot(tmp_path):
  row = {
    "implementation": "sigattn mosaic", "head_dim": 64, "causal": False,
    "padding": 0.0,
  }  # fmt: skip
  rows = [
    row | {"pass": direction, "seq_len": length, "tflops": length / 10}
    for direction in baselines.PASSES
    for length in (196, 1024, 2048)
  ]
  path = tmp_path / "x.json"
  path.write_text(json.dumps({"device": "a card", "rows": rows}))
  assert attention.plot(path) == tmp_path / "x.png"
  assert (tmp_path / "x.png").stat().st_size > 10_000
