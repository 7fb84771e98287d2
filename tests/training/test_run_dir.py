"""The folder of a run: names, the config in it, and the file DONE.json."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import vit_sigmoid
from sigattn.training import run_dir

ROOT = pathlib.Path(__file__).parents[2]


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


def begin(workdir, config):
  with run_dir.RunDir(workdir, config) as folder:
    folder.begin()


def finish_a_step(workdir):
  """Writes a line of metrics, without which a run may be replaced."""
  (workdir / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')


def test_a_run_without_a_finished_step_is_replaced(tmp_path, capsys):
  begin(tmp_path, make_config())
  line = '{"step": 0, "split": "test", "loss": 1.0}\n'
  (tmp_path / "metrics.jsonl").write_text(line)
  begin(tmp_path, make_config(seed=1))
  assert run_dir.read_config(tmp_path).seed == 1
  assert not (tmp_path / "metrics.jsonl").exists()
  assert "and begins anew" in capsys.readouterr().out
  finish_a_step(tmp_path)
  with pytest.raises(ValueError, match=r"config\.seed=1, this one has 2"):
    begin(tmp_path, make_config(seed=2))


def test_a_config_of_others_is_not_replaced(tmp_path):
  """It may be that of a model of transformers."""
  content = '{"model_type": "llama"}'
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(ValueError, match="it has no format, so it is not that"):
    begin(tmp_path, make_config())
  assert (tmp_path / "config.json").read_text() == content


def test_default_folder_of_any_values_is_one_that_can_be_restored():
  values = ["[1]", "((7, 3),)", r"((.*\\w?, 1.0),)", "a\nb", "x" * 300, "", "ü"]
  paths = [
    run_dir.default("configs/v[i]t.py", {"model.x": value}) for value in values
  ]
  for path in paths:
    run_dir.validate_path(path)
    assert all(len(part.encode()) < 255 for part in path.split("/"))
  assert len(set(paths)) == len(values)
  # Names that differ only in replaced characters remain different.
  names = [run_dir.folder_name(x) for x in ("a*", "a?", "a-")]
  assert len(set(names)) == 3
  assert names[2] == "a-"


@pytest.mark.parametrize(
  "name",
  [
    "br[1]",
    "a*",
    "b?",
    "back\\slash",
    "new\nline",
    "gs:/x",
    "\udcff",
    "[x]/run",
  ],
)
def test_path_that_cannot_be_restored_is_refused_by_name(name, tmp_path):
  with pytest.raises(ValueError, match="cannot be restored") as caught:
    begin(tmp_path / name, make_config())
  assert repr(str(tmp_path / name)) in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_config_is_read_back_and_only_some_values_may_change(tmp_path):
  config = make_config()
  begin(tmp_path, config)
  flat = run_dir.flatten(config)
  assert flat["attn.kind"] == "sigmoid"
  assert run_dir.flatten(run_dir.read_config(tmp_path)) == flat
  longer = make_config(total_steps=7)
  begin(tmp_path, longer)
  assert run_dir.read_config(tmp_path).total_steps == 7
  finish_a_step(tmp_path)
  said = (
    r"config\.dtype='float32', this one has 'bfloat16'; "
    r"config\.seed=0, this one has 1\. Give the values"
  )
  with pytest.raises(ValueError, match=said):
    begin(tmp_path, make_config(seed=1, dtype="bfloat16"))


def test_nothing_is_written_before_the_run_begins(tmp_path):
  with run_dir.RunDir(tmp_path / "run", make_config()):
    assert not list(tmp_path.iterdir())
  assert not list(tmp_path.iterdir())


def test_one_run_at_a_time_and_the_lock_of_a_killed_one_is_free(tmp_path):
  code = f"""
import os, signal
from configs import vit_sigmoid
from sigattn.training import run_dir
config = vit_sigmoid.get_config("runlocal")
with run_dir.RunDir({str(tmp_path)!r}, config) as folder:
  folder.begin()
  print(os.getpid(), flush=True)
  signal.pause()
"""
  other = subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  pid = other.stdout.readline().strip()
  said = rf"is in use: process {pid} on .+, since \d{{4}}-\d\d-\d\d "
  with pytest.raises(ValueError, match=said):
    begin(tmp_path, make_config())
  # A run that has seen an empty folder notices the other one when it begins.
  late = run_dir.RunDir(tmp_path, make_config())
  with pytest.raises(ValueError, match=said):
    late.begin()
  other.kill()
  other.wait()
  begin(tmp_path, make_config())
  assert not (tmp_path / "lock.json").exists()


def test_folder_without_a_run_or_of_another_format_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"no run here \(config.json"):
    run_dir.read_config(tmp_path)
  begin(tmp_path, make_config())
  path = tmp_path / "config.json"
  contents = json.loads(path.read_text())
  path.write_text(json.dumps(contents | {"format": 1}))
  with pytest.raises(ValueError, match="a run of format 1, this version reads"):
    run_dir.read_config(tmp_path)
  del contents["format"]
  path.write_text(json.dumps(contents))
  with pytest.raises(ValueError, match="it has no format, so it is not that"):
    run_dir.read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "12", "{}", "\x00", '{"step": "a"}'])
def test_damaged_done_file_counts_as_not_finished(text, tmp_path):
  (tmp_path / "DONE.json").write_text(text)
  assert not run_dir.done(tmp_path, 2)


def test_run_is_done_when_it_has_reached_total_steps(tmp_path):
  assert not run_dir.done(None, 2)
  assert not run_dir.done(tmp_path, 2)
  run_dir.write_done(tmp_path, {"step": 2, "loss": 1.0})
  assert run_dir.done(tmp_path, 2)
  assert not run_dir.done(tmp_path, 3)
  assert [path.name for path in tmp_path.iterdir()] == ["DONE.json"]
