"""The folder of a run: names, the config in it, and the file DONE.json."""

import json

import pytest

from configs import vit_sigmoid
from sigattn.training import run_dir


def make_config(**overrides):
  config = vit_sigmoid.get_config("runlocal")
  config.update_from_flattened_dict(overrides)
  return config


def test_name_lists_the_overrides_without_slashes():
  assert run_dir.name({"optim.lr": 1e-3, "seed": 0}) == "optim.lr=0.001,seed=0"
  assert run_dir.name({"data.source": "a/b"}) == "data.source=a-b"
  assert run_dir.name({}) == "default"


def test_default_folder_has_the_config_and_its_argument():
  path = run_dir.default("configs/vit.py:imagenet", {"seed": 1})
  assert path == "runs/vit:imagenet/seed=1"
  assert run_dir.default("configs/vit.py", {}) == "runs/vit/default"


def test_config_is_read_back_and_only_some_values_may_change(tmp_path):
  config = make_config()
  run_dir.prepare(tmp_path, config)
  flat = run_dir.flatten(config)
  assert flat["attn.kind"] == "sigmoid"
  assert run_dir.flatten(run_dir.read_config(tmp_path)) == flat
  longer = make_config(total_steps=7)
  run_dir.prepare(tmp_path, longer)
  assert run_dir.read_config(tmp_path).total_steps == 7
  with pytest.raises(ValueError, match=r"config\.seed=0, this one has 1"):
    run_dir.prepare(tmp_path, make_config(seed=1))


def test_folder_without_a_run_or_of_another_format_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"no run here \(config.json"):
    run_dir.read_config(tmp_path)
  run_dir.prepare(tmp_path, make_config())
  path = tmp_path / "config.json"
  contents = json.loads(path.read_text())
  del contents["format"]  # as the first version wrote it
  path.write_text(json.dumps(contents))
  with pytest.raises(ValueError, match="a run of format 1, this version reads"):
    run_dir.read_config(tmp_path)


def test_run_is_done_when_it_has_reached_total_steps(tmp_path):
  assert not run_dir.done(None, 2)
  assert not run_dir.done(tmp_path, 2)
  run_dir.write_done(tmp_path, {"step": 2, "loss": 1.0})
  assert run_dir.done(tmp_path, 2)
  assert not run_dir.done(tmp_path, 3)
  assert [path.name for path in tmp_path.iterdir()] == ["DONE.json"]
