"""Sweeps: their product, the commands, skipped runs, and the table."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from configs import vit_sigmoid
from sigattn import sweep

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "configs/vit_sigmoid.py"


def run(*words):
  return subprocess.run(
    [sys.executable, "-m", "sigattn.sweep", *words],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip


def test_sweeps_multiply():
  deltas = sweep.deltas(CONFIG, ["attn", "seed"])
  assert len(deltas) == 9
  assert deltas[0] == {"attn.kind": "sigmoid", "seed": 0}
  assert deltas[-1] == {"attn.kind": "relu", "seed": 2}
  assert len({json.dumps(delta) for delta in deltas}) == 9


def test_error_for_an_unknown_sweep_names_the_known_ones():
  with pytest.raises(ValueError, match=r"'sed'; .*'attn', 'lr', 'seed'"):
    sweep.deltas(CONFIG, ["sed"])
  with pytest.raises(ValueError, match="two sweeps set the same key"):
    sweep.deltas(CONFIG, ["seed", "seed"])
  with pytest.raises(ValueError, match=r"--sweep=; name .*'attn', 'lr', 'seed"):
    sweep.deltas(CONFIG, [])


def test_dry_run_prints_the_commands_and_runs_nothing(tmp_path):
  root = tmp_path / "root"
  finished = run(
    f"--config={CONFIG}:runlocal", "--sweep=attn,seed", "--dry_run",
    f"--root={root}", "--config.optim.b1=0.8",
  )  # fmt: skip
  assert finished.returncode == 0, finished.stderr
  lines = finished.stdout.splitlines()
  assert len(lines) == 9
  assert (
    f"train.py --config={CONFIG}:runlocal --config.optim.b1=0.8" in lines[0]
  )
  assert "--config.attn.kind=sigmoid --config.seed=0" in lines[0]
  assert f"--workdir={root}/attn.kind=sigmoid,seed=0" in lines[0]
  assert not root.exists()


def test_dry_run_refuses_a_root_that_the_runs_would_refuse(tmp_path):
  for name in "ab":
    (tmp_path / f"{name}.txt").write_text(f"{name} cat sat on a mat\n" * 50)
  refused = run(
    "--config=configs/lm_sigmoid.py:runlocal", "--sweep=seed", "--dry_run",
    f"--config.data.source={tmp_path}", f"--root={tmp_path / 'runs'}",
  )  # fmt: skip
  assert refused.returncode == 1
  assert "runs/seed=0'; must not be in config.data.source=" in refused.stderr


def test_a_wrong_root_is_named_in_one_line():
  for word, said in (
    ("--workdir=x", "flag 'workdir'; did you mean --root, the folder of all"),
    ("--root=README.md", "--root=README.md; must be a folder, in which the"),
  ):
    refused = run(f"--config={CONFIG}:runlocal", "--sweep=seed", word)
    assert refused.returncode == 1
    assert said in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["--dry_run"]])
def test_a_root_that_cannot_be_written_is_refused_before_the_runs(words):
  refused = run(
    f"--config={CONFIG}:runlocal", "--sweep=seed", "--root=/proc/no", *words
  )
  assert refused.returncode == 1
  assert refused.stderr.startswith("sigattn sweep: workdir='/proc/no/seed=0' ")
  assert "cannot be written" in refused.stderr
  assert not refused.stdout


def test_sweep_trains_compares_and_skips_finished_runs(tmp_path):
  config = tmp_path / "mine.py"
  config.write_text("""
from configs.synthetic_sigmoid import get_config

def sweep_kind():
  yield {"attn.kind": "sigmoid"}
  yield {"attn.kind": "relu"}
""")
  root = tmp_path / "root"
  words = f"--config={config}:copy,runlocal", "--sweep=kind", f"--root={root}"
  first = run(*words)
  assert first.returncode == 0, first.stdout + first.stderr
  for kind in ("sigmoid", "relu"):
    assert f"attn.kind={kind}" in first.stdout
    assert (root / f"attn.kind={kind}" / "DONE.json").exists()
  table = json.loads((root / "sweep.json").read_text())
  done = json.loads((root / "attn.kind=relu" / "DONE.json").read_text())
  assert table["attn.kind=relu"]["accuracy"] == [done["accuracy"]]
  assert (root / "sweep.png").stat().st_size > 10_000
  again = run(*words)
  assert again.stdout.count("is finished") == 2


def test_a_sweep_refuses_flags_that_it_overrides_and_unknown_fields():
  config = vit_sigmoid.get_config("runlocal")
  runs = [{"attn.normalize": False}, {"attn.normalize": True}]
  sweep._validate_flags({"optim.lr": 1.0}, runs, config)
  said = r"--config\.attn\.normalize=True; the sweep sets this field itself"
  with pytest.raises(ValueError, match=said):
    sweep._validate_flags({"attn.normalize": True}, runs, config)
  said = "no field 'normalise'; did you mean config.attn.normalize"
  with pytest.raises(ValueError, match=said):
    sweep._validate_flags({}, [{"attn.normalise": True}], config)


class Given(types.SimpleNamespace):
  """The values of flags, and the flag of the config."""

  def __getitem__(self, name):
    return types.SimpleNamespace(config_filename=CONFIG, override_values={})


def test_a_stopped_sweep_says_how_many_runs_are_finished(
  tmp_path, monkeypatch, capsys
):
  """SIGTERM reaches only the sweep, which passes it on to the run."""
  ready = tmp_path / "ready"
  script = (
    "import pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
    f"pathlib.Path({str(ready)!r}).touch()\n"
    "time.sleep(60)\n"
  )
  monkeypatch.setattr(
    sweep, "command", lambda *_: [sys.executable, "-c", script]
  )

  def stop():
    while not ready.exists():
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  # It would stay for the tests that follow in this process.
  monkeypatch.setattr(sweep.metrics, "set_up_logs", lambda: None)
  thread = threading.Thread(target=stop)
  thread.start()
  given = Given(
    config=vit_sigmoid.get_config("runlocal"),
    sweep=["seed"],
    root=str(tmp_path),
    dry_run=False,
  )
  with pytest.raises(SystemExit, match="130"):
    sweep.run(given)
  thread.join()
  assert "0 of 3 runs are finished; the same command" in capsys.readouterr().out
