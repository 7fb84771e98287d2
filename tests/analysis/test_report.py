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
  table = report.evaluation_table(rows, title="a title")
  assert [x.header for x in table.columns] == ["", "step", "loss", "accuracy"]
  assert cells(table) == [
    ["best", "last"],
    ["1,000", "2,000"],
    ["0.5000", "0.7500"],
    ["", "1.0000"],
  ]
  table = report.variants_table({"2 x 32": {"loss": 1.0}, "4 x 32": {}})
  assert [x.header for x in table.columns] == ["", "2 x 32", "4 x 32"]
  assert cells(table) == [["loss"], ["1.0000"], [""]]


def test_sweep_joins_seeds_and_leaves_out_runs_without_evaluation(tmp_path):
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
