"""The tables that train.py, eval.py and a sweep print."""

import json

from configs import vit_sigmoid
from sigattn.analysis import report
from sigattn.training import metrics


def cells(table):
  """The cells of a rich table, column by column."""
  return [list(column.cells) for column in table.columns]


def test_evaluations_are_rows_and_variants_are_columns():
  rows = {
    "best": {"step": 1000, "split": "test", "loss": 0.5},
    "last": {"step": 2000, "split": "test", "loss": 0.75, "accuracy": 1.0},
  }
  [table] = report.evaluation_tables(rows, title="a title")
  assert [x.header for x in table.columns] == ["", "step", "loss", "accuracy"]
  assert cells(table) == [
    ["best", "last"],
    ["1,000", "2,000"],
    ["0.5000", "0.7500"],
    ["", "1.0000"],
  ]
  [table] = report.variants_tables({"2 x 32": {"loss": 1.0}, "4 x 32": {}})
  assert [x.header for x in table.columns] == ["", "2 x 32", "4 x 32"]
  assert cells(table) == [["loss"], ["1.0000"], [""]]


def test_tables_of_many_columns_are_cut_nowhere(capsys):
  variants = {
    f"{factor} x 256{n}": {"loss@128:256": factor + 0.1234}
    for factor in (1, 2, 4, 8)
    for n in ("", ", n of the test")
  }
  tables = report.variants_tables(variants)
  assert len(tables) == 2
  for table in tables:
    metrics.log(table)
  said = capsys.readouterr().out
  assert max(map(len, said.splitlines())) <= metrics.console.width
  assert said.count("loss@128:256") == 2
  for factor in (1, 2, 4, 8):
    assert said.count(f"{factor}.1234") == 2


def test_sweep_joins_seeds_and_leaves_out_runs_without_evaluation(
  tmp_path, capsys
):
  runs = []
  for seed, accuracy in ((0, 0.25), (1, 0.75), (2, None)):
    workdir = tmp_path / str(seed)
    workdir.mkdir()
    with metrics.Writer(workdir, tensorboard=False) as writer:
      writer.write(2, "train", {"loss": 1.0})
      if accuracy is not None:
        writer.write(2, "test", {"accuracy": accuracy})
    runs.append(({"attn.kind": "relu", "seed": seed}, str(workdir)))
  config = vit_sigmoid.get_config("runlocal")
  assert config.data.eval_split == "test"
  report.sweep(runs, tmp_path, config)
  table = json.loads((tmp_path / "sweep.json").read_text())
  assert table == {"attn.kind=relu": {"accuracy": [0.25, 0.75]}}
  assert (tmp_path / "sweep.png").exists()
  said = capsys.readouterr().out
  assert "0.5000 ± 0.3536" in said
  assert "mean ± standard deviation, and the range below" in said
