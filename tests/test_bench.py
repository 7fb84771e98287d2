"""The benchmark of the kernels, with what of the field a CPU can run."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from kernels import bench, rivals
from kernels.rivals import Cell, Rival

CELLS = (Cell(16, 32, 2, 2, False), Cell(16, 32, 2, 2, True, padding=0.25))


@pytest.fixture
def field():
  ours = functools.partial(rivals._ours, "xla")
  ready = jax.block_until_ready
  return [
    Rival("sigattn xla", False, "jax", ours, ready, rivals._any),
    *(rival for rival in rivals.RIVALS if rival.name == "XLA (jax.nn)"),
  ]


def test_flops_and_lengths_of_a_cell():
  full, half = Cell(64, 1000, 4, 8, False), Cell(64, 1000, 4, 8, True, 0.25)
  assert full.flops("forward") == 4 * 4 * 1000**2 * 8 * 64
  assert half.flops("both") == full.flops("forward") * 3.5 / 2
  assert full.lengths is None
  np.testing.assert_array_equal(half.lengths, [1000, 833, 667, 500])


def test_a_row_for_each_rival_and_pass_that_can(field):
  prepared = bench.prepare(CELLS, field)
  full, padded = (list(bench.speed(cell, field, prepared)) for cell in CELLS)
  assert [(row["implementation"], row["pass"]) for row in full] == [
    (rival.name, direction) for rival in field for direction in rivals.PASSES
  ]
  for row in full[3:]:  # the only softmax
    assert row["ratio_to_best_softmax"] == 1
  assert {row["implementation"] for row in padded} == {"sigattn xla"}
  assert {row["ratio_to_best_softmax"] for row in padded} == {None}
  means = list(bench._means(full + padded))
  assert [m["mean"] for m in means] == [
    pytest.approx(row["ratio_to_best_softmax"], abs=1e-3) for row in full[:3]
  ]


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--rivals", "mosaic", "FA3"], "--rivals FA3: no part of sigattn mosaic,"),
    (["--plot", "x.json"], "--plot x.json: there is no such file"),
  ],
)
def test_what_it_refuses(arguments, said, monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["bench", *arguments])
  with pytest.raises(SystemExit):
    bench.main()
  assert said in capsys.readouterr().err


def test_a_rival_that_fails_is_named_and_left_out(field, capsys):
  def fail(cell):
    raise RuntimeError("out of memory\nand more")

  field[0] = Rival("other", True, "jax", fail, jax.block_until_ready)
  rows = list(bench.speed(CELLS[0], field, bench.prepare(CELLS, field)))
  assert {row["implementation"] for row in rows} == {"XLA (jax.nn)"}
  said = capsys.readouterr().out
  assert said.count("other, Cell(width=16") == 1
  assert "RuntimeError out of memory\n" in said


def test_a_rival_that_fails_when_it_is_timed_has_no_rows(field, capsys):
  asked = []

  def call():
    asked.append(1)
    if len(asked) > len(rivals.PASSES):
      raise RuntimeError("out of memory")

  def calls(cell):
    return dict.fromkeys(rivals.PASSES, call)

  field[0] = Rival("other", True, "torch", calls, lambda found: None)
  rows = list(bench.speed(CELLS[0], field, bench.prepare(CELLS, field)))
  assert {row["implementation"] for row in rows} == {"XLA (jax.nn)"}
  assert "other, Cell(width=16" in capsys.readouterr().out


def test_ours_saves_query_key_and_value_alone(field):
  ours, softmax = (
    rivals._jax_memory(rival.calls(CELLS[0]))[0] for rival in field
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
    for direction in rivals.PASSES
    for length in (196, 1024, 2048)
  ]
  path = tmp_path / "x.json"
  path.write_text(json.dumps({"device": "a card", "rows": rows}))
  assert bench.plot(path) == tmp_path / "x.png"
  assert (tmp_path / "x.png").stat().st_size > 10_000
