"""Metrics: the files, the means over steps, and the steps that are logged."""

import pytest
from ml_collections import ConfigDict

from sigattn.training import metrics
from tests.training.events import events


def test_due_is_every_so_many_steps_and_never_for_0():
  assert [step for step in range(7) if metrics.due(step, 3)] == [0, 3, 6]
  assert not any(metrics.due(step, 0) for step in range(7))


def test_mean_starts_again_after_reset():
  mean = metrics.Mean()
  mean.add({"loss": 1.0})
  mean.add({"loss": 3.0})
  assert mean.means() == {"loss": 2.0}
  mean.reset()
  mean.add({"loss": 5.0})
  assert mean.means() == {"loss": 5.0}


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


BROKEN = [
  b"\xff\xfe", b"12", b"{}", b"", b"[]", b"null", b'{"step": 2}', b"[" * 10**5,
  b'{"step": "2", "split": "train"}', b'{"step": true, "split": "train"}',
  b'{"step": 2, "split": "t", "\\ud800": 1}', b'{"step": 2, "split": 3}',
  b'{"step": 2, "split": "train", "loss": "x"}',
  b'{"step": 2, "split": "train", "loss": {}}', b'{"step": 2, "split": "trai',
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda text: str(text[:40]))
def test_broken_line_is_left_out_and_reported(broken, tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  lines = [b'{"step": 1, "split": "train", "loss": NaN}', broken]
  lines += [b'{"step": 3, "split": "test", "loss": 1}']
  path.write_bytes(b"\n".join(lines))
  assert [line["step"] for line in metrics.read(tmp_path)] == [1, 3]
  [said] = capsys.readouterr().out.splitlines()
  assert (
    f"{path}: left out 1 line that is not metrics; the first is line" in said
  )
  assert "line 2" in said
  with metrics.Writer(tmp_path, start=1, tensorboard=False):
    pass
  assert len(path.read_bytes().splitlines()) == 1


def test_event_files_are_read_as_tensorboard_does(tmp_path):
  for start in (0, 0, 2):
    with metrics.Writer(tmp_path, start) as writer:
      for step in range(start + 1, start + 5):
        writer.write(step, "train", {"loss": step + start, "lr": 1.0})
      # Everything is already written, so a kill would leave these files.
      steps = [step for step, tag, _ in events(tmp_path) if tag == "train/lr"]
      assert steps == [*range(1, start + 5)]
  values = {
    step: value for step, tag, value in events(tmp_path) if tag == "train/loss"
  }
  assert values == {1: 1, 2: 2, 3: 5, 4: 6, 5: 7, 6: 8}


@pytest.mark.parametrize(("split", "step"), [("test", 4), ("train", 5)])
def test_last_evaluation_is_of_the_split(split, step):
  lines = [
    {"step": 2, "split": "test"},
    {"step": 4, "split": "test"},
    {"step": 5, "split": "train"},
  ]
  assert metrics.last_evaluation(lines, split)["step"] == step
  assert metrics.last_evaluation(lines, "val") is None


@pytest.mark.parametrize("total", [4, 5])
def test_the_last_step_has_a_line_wherever_it_falls(total, tmp_path):
  """A line is the mean over the steps since the line before it."""
  config = ConfigDict({"total_steps": total, "log": {"every_steps": 2}})
  with metrics.Writer(tmp_path, tensorboard=False) as writer:
    progress = metrics.Progress(0, total, "images")
    log = metrics.StepLog(config, writer, progress)
    for step in range(1, total + 1):
      values = {"loss": float(step), "grad_norm": 1.0, "lr": 1.0}
      log.step(step, values, 1)
    log.finish()
  assert [(x["step"], x["loss"]) for x in metrics.read(tmp_path)] == [
    (2, 1.5), (4, 3.5), (5, 5.0),
  ][: total - 2]  # fmt: skip
