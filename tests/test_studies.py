"""The studies: every run of every sweep is a valid config, and takes a step."""

import importlib
import pathlib
import re

import pytest

from sigattn import sweep, tasks
from sigattn.data import loader
from train import train

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs" / "studies").glob("[!_]*.py"))
SMALL = {  # what makes a step of any of them take seconds
  "lm": {"data.length": 16},
  "vit": {},
  "synthetic": {"data.eval_examples": 8},
}


def load(file):
  return importlib.import_module(f"configs.studies.{file.stem}")


def deltas(file):
  """What the runs of the docstring's commands change."""
  path = file.relative_to(ROOT)
  command = rf"sigattn\.sweep --config={path}[\s\\]+--sweep=(\S+)"
  found = re.findall(command, load(file).__doc__)
  assert found
  return [x for names in found for x in sweep.deltas(file, names.split(","))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_run_is_a_config_that_passes_its_check(file):
  found = deltas(file)
  assert len(found) > 3
  for delta in found:
    config = load(file).get_config()
    config.update_from_flattened_dict(delta)
    tasks.check(config)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_small_one_trains(file, monkeypatch):
  whole = loader.eval_batches
  monkeypatch.setattr(
    loader, "eval_batches", lambda *args: [next(iter(whole(*args)))]
  )
  config = load(file).get_config()
  config.update_from_flattened_dict(deltas(file)[-1])
  config.update_from_flattened_dict(SMALL[config.task])
  config.model.update(width=24, depth=1, mlp_dim=32)
  config.total_steps, config.batch_size = 1, 8
  config.optim.warmup_steps = 1
  assert int(train(config).step) == 1
