"""What a run leaves, survives and says when something goes wrong with files."""

import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import vit_sigmoid
from sigattn import tasks
from sigattn.training import checkpoint
from train import train

ROOT = pathlib.Path(__file__).parent.parent


def small(**values):
  config = vit_sigmoid.get_config("runlocal")
  config.update_from_flattened_dict(values)
  return config


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
  """Evaluates one batch instead of all: the loop is the same."""
  whole = tasks.eval_batches

  def one(config, split):
    return [next(iter(whole(config, split)))]

  monkeypatch.setattr(tasks, "eval_batches", one)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def command(workdir, *words):
  """train.py at two small steps, which is not waited for."""
  return subprocess.Popen(
    [
      sys.executable, "train.py", "--config=configs/vit_sigmoid.py:runlocal",
      f"--workdir={workdir}", *words,
    ],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


# A failed start.


def test_failed_start_leaves_nothing_and_the_corrected_command_works(tmp_path):
  folder = tmp_path / "new" / "run"
  words = ["--config.optim.weight_decay=0.1", "--config.optim.decay_groups"]
  failed = command(folder, words[0], f"{words[1]}=(('.*kernle', 1.0),)")
  _, stderr = failed.communicate()
  assert failed.returncode == 1
  assert stderr.count("\n") == 1
  assert "config.optim.decay_groups: '.*kernle' is the first match" in stderr
  assert not list(tmp_path.iterdir())
  right = command(folder, words[0], f"{words[1]}=(('.*kernel', 1.0),)")
  _, stderr = right.communicate()
  assert right.returncode == 0, stderr


def test_source_that_cannot_be_read_leaves_nothing(tmp_path, monkeypatch):
  def broken(config):
    del config
    raise OSError(5, "Input/output error", "images.parquet")
    yield

  monkeypatch.setattr(tasks, "train_batches", broken)
  with pytest.raises(OSError, match="Input/output error"):
    train(small(), tmp_path / "run")
  assert not list(tmp_path.iterdir())
  monkeypatch.undo()
  train(small(), tmp_path / "run")


def test_the_batch_drawn_at_the_start_is_the_first_of_the_run(tmp_path):
  """A run with a folder trains on what one without a folder trains on."""
  equal(train(small(), tmp_path).params, train(small()).params)


# The folder.


def test_second_of_two_runs_in_one_folder_is_refused(tmp_path):
  words = ["--config.total_steps=100000", "--config.eval.every_steps=0"]
  both = [command(tmp_path / "run", *words) for _ in range(2)]
  while all(run.poll() is None for run in both):
    time.sleep(0.1)
  [first] = [run for run in both if run.poll() is None]
  [second] = [run for run in both if run is not first]
  _, stderr = second.communicate()
  assert second.returncode == 1
  assert f"is in use: process {first.pid} on " in stderr
  assert stderr.count("\n") == 1
  first.kill()
  first.communicate()


def test_folder_of_an_odd_name_can_be_restored_and_is_printed_whole(
  tmp_path, capsys
):
  folder = tmp_path / "(1), a:b" / "ü%7B{x}" / ":cat: ~#'"
  train(small(), folder)
  assert f"curves: {folder / 'curves.png'}" in capsys.readouterr().out
  assert checkpoint.load(folder)[2] == 2
  assert int(train(small(total_steps=3), folder).step) == 3
