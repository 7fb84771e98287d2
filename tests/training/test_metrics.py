"""Metrics: the files, the means over steps, and when a step is due."""

import pytest

from sigattn.training import metrics


def test_due_is_every_so_many_steps_and_never_for_0():
  assert [step for step in range(7) if metrics.due(step, 3)] == [0, 3, 6]
  assert not any(metrics.due(step, 0) for step in range(7))


def test_mean_starts_again_after_take():
  mean = metrics.Mean()
  mean.add({"loss": 1.0})
  mean.add({"loss": 3.0})
  assert mean.take() == {"loss": 2.0}
  mean.add({"loss": 5.0})
  assert mean.take() == {"loss": 5.0}


def test_resumed_writer_drops_the_lines_after_its_start(tmp_path):
  with metrics.Writer(tmp_path, tensorboard=False) as writer:
    for step in (1, 2, 3):
      writer.write(step, "train", {"loss": 1.0})
  with metrics.Writer(tmp_path, start=2, tensorboard=False) as writer:
    writer.write(3, "test", {"loss": 0.5})
  assert metrics.read(tmp_path) == [
    {"step": 1, "split": "train", "loss": 1.0},
    {"step": 2, "split": "train", "loss": 1.0},
    {"step": 3, "split": "test", "loss": 0.5},
  ]


def test_read_drops_an_incomplete_line(tmp_path):
  assert metrics.read(tmp_path) == []
  whole = '{"step": 1, "split": "train"}\n'
  (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "spl')
  assert metrics.read(tmp_path) == [{"step": 1, "split": "train"}]


@pytest.mark.parametrize(("split", "step"), [("test", 4), ("train", 5)])
def test_last_evaluation_is_of_the_split(split, step):
  lines = [
    {"step": 2, "split": "test"},
    {"step": 4, "split": "test"},
    {"step": 5, "split": "train"},
  ]
  assert metrics.last_evaluation(lines, split)["step"] == step
  assert metrics.last_evaluation(lines, "val") is None
