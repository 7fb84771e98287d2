"""The studies: every run has a valid config, and a small run does a step."""

import importlib
import pathlib
import re

import pytest

from benchmarks import studies
from sigattn import sweep, tasks
from sigattn.analysis import report_html
from sigattn.training import setup
from train import train

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs" / "studies").glob("[!_]*.py"))
SMALL = {  # changes that make a step take seconds
  "lm": {"data.length": 16},
  "vit": {},
  "synthetic": {"data.eval_examples": 8},
}


def load(file):
  return importlib.import_module(f"configs.studies.{file.stem}")


def deltas(file):
  """The overrides of all runs that the commands in the docstring start."""
  path = file.relative_to(ROOT)
  command = rf"sigattn\.sweep --config={path}[\s\\]+--sweep=(\S+)"
  sweeps = re.findall(command, load(file).__doc__)
  assert sweeps
  return [x for names in sweeps for x in sweep.deltas(file, names.split(","))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_run_is_a_valid_config(file):
  changes = deltas(file)
  assert len(changes) > 3
  # If runs differ only in the seed, only the last of them is validated.
  settings = {
    str({k: v for k, v in delta.items() if k != "seed"}): delta
    for delta in changes
  }
  for delta in settings.values():
    config = load(file).get_config()
    config.update_from_flattened_dict(delta)
    setup.validate_config(config)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_small_run_takes_a_step(file, monkeypatch):
  eval_batches = tasks.eval_batches
  monkeypatch.setattr(
    tasks, "eval_batches", lambda *args: [next(iter(eval_batches(*args)))]
  )
  config = load(file).get_config()
  config.update_from_flattened_dict(deltas(file)[-1])
  config.update_from_flattened_dict(SMALL[config.task])
  config.model.update(width=24, depth=1, mlp_dim=32)
  config.total_steps, config.batch_size = 1, 8
  config.optim.warmup_steps = 1
  assert int(train(config).step) == 1


def run_of(loss, seed=0, step=10, **config):
  """A run that reached `step` of ten steps. Its initial loss is 4."""
  base = {
    "seed": seed,
    "total_steps": 10,
    "data.eval_split": "test",
    "attn.kind": "softmax",
    "attn.qk_norm": "none",
    "model.width": 64,
  }
  first = {"step": 1, "split": "train", "loss": 4.0}
  last = {"step": step, "split": "test", "loss": loss, "accuracy": 0.5}
  return report_html.Run("", base | config, [first, last])


def test_run_that_was_cut_off_is_listed_without_values():
  assert studies._row([run_of(1.0, 0), run_of(2.0, 1, step=7)]) == {
    "seed": [0],
    "loss": [1.0],
    "accuracy": [0.5],
    "cut_off": {"seed": [1], "step": [7]},
  }


def test_sensitivity_is_the_mean_over_the_rates_above_the_best():
  losses = {
    1e-3: 2.0,
    1e-2: 1.0,
    1e-1: 9.0,
  }  # the last exceeds the initial loss of 4
  runs = [run_of(loss, **{"optim.lr": lr}) for lr, loss in losses.items()]
  sensitivity = studies.sensitivity(runs)
  assert sensitivity == {
    "softmax, no QK norm": {"width 64": [(2 + 1 + 4) / 3 - 1]}
  }
