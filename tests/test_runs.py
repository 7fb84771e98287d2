"""Runs with damaged or missing files, full disks, kills and NaN losses."""

import errno
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from configs import vit_sigmoid
from eval import evaluate
from sigattn import tasks
from sigattn.analysis import report, report_html
from sigattn.training import checkpoint, files, mesh, metrics, replay, run_dir
from sigattn.training import evaluate as evaluation
from sigattn.training import saved as checkpoints
from tests import commands
from tests.training.events import events
from train import train

ROOT = pathlib.Path(__file__).parent.parent
RUNLOCAL = ["--config=configs/vit_sigmoid.py:runlocal"]


def small(**values):
  config = vit_sigmoid.get_config("runlocal")
  config.update_from_flattened_dict(values)
  return config


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
  """Evaluates one batch instead of all batches. The loop is the same."""
  whole = tasks.eval_batches

  def one(config, split):
    return [next(iter(whole(config, split)))]

  monkeypatch.setattr(tasks, "eval_batches", one)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def command(workdir, *words):
  """Starts train.py for two small steps, and does not wait for its end."""
  return subprocess.Popen(
    [
      sys.executable, "train.py", *RUNLOCAL, f"--workdir={workdir}", *words,
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
  assert "config.optim.decay_groups: '.*kernle' is not the first" in stderr
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
  """Runs with and without a folder train on the same batches."""
  equal(train(small(), tmp_path).params, train(small()).params)


# The folder.


def test_evaluations_on_the_training_split_have_a_name_of_their_own(
  tmp_path, capsys
):
  train(small(**{"data.eval_split": "train"}), tmp_path)
  lines = metrics.read(tmp_path)
  names = [line["split"] for line in lines if line["step"] == 2]
  assert sorted(names) == ["train", "train (evaluated)"]
  [run] = report_html.find([tmp_path])
  assert run.evaluation["split"] == "train (evaluated)"
  assert "evaluations on train" in capsys.readouterr().out


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


# Damage.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run with the checkpoints 1, 2 and 3. Tests copy it."""
  folder = tmp_path_factory.mktemp("saved") / "run"
  with pytest.MonkeyPatch.context() as patch:
    whole = tasks.eval_batches
    patch.setattr(
      tasks, "eval_batches", lambda *args: [next(iter(whole(*args)))]
    )
    train(small(total_steps=3, **KEPT), folder)
  return folder


KEPT = {"ckpt.keep": 3, "eval.every_steps": 1}


@pytest.fixture
def run(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def flip(path, rng):
  """Flips one bit."""
  content = bytearray(path.read_bytes())
  content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  path.write_bytes(content)


def needed(run, step):
  """The files of a checkpoint that must be whole."""
  folder = run / "checkpoints" / str(step)
  files = (path for path in folder.rglob("*") if path.is_file())
  return [
    path
    for path in sorted(files)
    if path.relative_to(folder).parts[0]
    not in ("metrics", "config", "commit_success.txt")
  ]


def test_any_flipped_bit_of_a_checkpoint_is_noticed_and_named(run):
  """It flips one bit two thousand times, and undoes each flip."""
  rng = np.random.default_rng(0)
  files = needed(run, 3)
  assert len(files) > 20
  assert checkpoints.newest_whole(run) == (3, {})
  for path in files:
    whole = path.read_bytes()
    for _ in range(2000 // len(files)):
      flip(path, rng)
      step, damaged = checkpoints.newest_whole(run)
      if path.name != "checksums.json":
        name = path.relative_to(run / "checkpoints" / "3").as_posix()
        assert damaged == {3: f"{name} is not what was saved"}
        assert step == 2
      elif step == 3:  # the flip was in a line that training does not need
        [line] = [
          old
          for old, new in zip(
            whole.splitlines(), path.read_bytes().splitlines(), strict=True
          )
          if old != new
        ]
        assert b"metrics/" in line or b"config/" in line
      path.write_bytes(whole)


def empty(path):
  path.write_bytes(b"")


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def array(run, step):
  """The largest file of the arrays of parameters."""
  files = (run / "checkpoints" / str(step) / "params").rglob("d/*")
  return max(files, key=lambda path: path.stat().st_size)


DAMAGE = {
  "flipped": lambda run: flip(array(run, 3), np.random.default_rng(1)),
  "truncated": lambda run: truncate(array(run, 3)),
  "emptied": lambda run: empty(run / "checkpoints/3/params/manifest.ocdbt"),
  "no metadata": lambda run: (
    run / "checkpoints/3/_CHECKPOINT_METADATA"
  ).unlink(),
  "no item": lambda run: shutil.rmtree(run / "checkpoints/3/train"),
  "no data state": lambda run: shutil.rmtree(run / "checkpoints/3/data"),
  "no checksums": lambda run: (run / "checkpoints/3/checksums.json").unlink(),
  "empty folder": lambda run: (
    shutil.rmtree(run / "checkpoints/3"),
    (run / "checkpoints/3").mkdir(),
  ),
  "item of another step": lambda run: (
    shutil.rmtree(run / "checkpoints/3/params"),
    shutil.copytree(run / "checkpoints/2/params", run / "checkpoints/3/params"),
  ),
  "another step": lambda run: (
    shutil.rmtree(run / "checkpoints/3"),
    shutil.copytree(run / "checkpoints/2", run / "checkpoints/3"),
  ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_newest_whole_checkpoint_takes_the_place_of_a_damaged_one(
  kind, run, saved, capsys
):
  DAMAGE[kind](run)
  results = evaluate(run)
  assert results["step"] == 2
  assert "checkpoint 3 of" in (said := capsys.readouterr().out)
  assert "Step 2 is used" in said
  state = train(small(total_steps=3, **KEPT), run)
  [line] = [
    line
    for line in capsys.readouterr().out.splitlines()
    if "is damaged" in line
  ]
  assert "the run goes on from step 2" in line
  assert (run / "damaged" / "3").is_dir()
  # Step 3 was repeated with the same result, and its checkpoint is complete.
  equal(state.params, checkpoint.load(saved)[1])
  equal(state.params, checkpoint.load(run, 3)[1])


def test_run_whose_checkpoints_are_all_damaged_is_refused(run):
  for step in (1, 2, 3):
    empty(array(run, step))
  said = "all checkpoints are damaged .step 3: params/.* is not what was saved"
  said += ".*Restore these files from a copy, or delete the folder to begin"
  with pytest.raises(ValueError, match=said):
    train(small(total_steps=4, **KEPT), run)
  with pytest.raises(ValueError, match=said):
    evaluate(run)
  assert sorted(x.name for x in (run / "checkpoints").iterdir()) == [*"123"]


def test_damaged_step_that_is_asked_for_is_refused(run):
  truncate(array(run, 2))
  with pytest.raises(ValueError, match="step=2: this checkpoint .* is damaged"):
    evaluate(run, step=2)
  assert evaluate(run)["step"] == 3


@pytest.mark.parametrize("harm", [empty, truncate, pathlib.Path.unlink])
def test_what_training_does_not_need_does_not_block_it(harm, run, capsys):
  for step in (1, 2, 3):
    harm(run / f"checkpoints/{step}/metrics/metrics")
    harm(run / f"checkpoints/{step}/config/metadata")
  harm(run / "DONE.json")
  assert int(train(small(total_steps=4, **KEPT), run).step) == 4
  assert "metrics of checkpoint 3 are not used" in capsys.readouterr().out
  assert not (run / "damaged").exists()
  assert evaluate(run)["step"] == 4


def overwrite(path):
  """Puts the config of a model of transformers in its place."""
  path.write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
  "harm", [empty, truncate, overwrite, pathlib.Path.unlink]
)
def test_lost_config_does_not_let_another_config_in(harm, run, capsys):
  harm(run / "config.json")
  with pytest.raises(ValueError, match=r"config\.seed=0, this one has 1"):
    train(small(seed=1), run)
  assert evaluate(run)["step"] == 3
  assert "its copy in" in capsys.readouterr().out
  train(small(total_steps=4, **KEPT), run)
  assert run_dir.read_config(run).total_steps == 4
  # If no copy of the config is left, the folder is refused.
  harm(run / "config.json")
  for path in run.glob("checkpoints/*/config/metadata"):
    harm(path)
  with pytest.raises(ValueError, match="holds checkpoints, but no config"):
    train(small(total_steps=4, **KEPT), run)


def edit_config(run, change):
  path = run / "config.json"
  content = json.loads(path.read_text())
  change(content["config"])
  path.write_text(json.dumps(content))


def test_who_uses_an_unfinished_run_is_told(run, caplog):
  checkpoint.load(run)
  assert "is not finished" not in caplog.text
  edit_config(run, lambda config: config.update(total_steps=2000))
  checkpoint.load(run, step=1)
  said = f"the run in {run} is not finished: it has done 3 of 2000 steps"
  assert said in caplog.text


def without(*paths):
  def change(config):
    for path in paths:
      *parents, key = path.split(".")
      del functools.reduce(dict.get, parents, config)[key]

  return change


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (without("model.width"), "config.model.width is missing"),
    (without("model"), "config.model.* is missing"),
    (without("attn"), "config.attn.kind is missing"),
    (without("task"), "config.task is missing"),
    (dict.clear, "config.task is missing"),
    (lambda x: x.update(attn=3), "config.attn.kind is missing"),
    (lambda x: x["attn"].update(kind="x"), "config.attn.kind='x'; choose"),
    (lambda x: x.update(task=None), "config.task=None; choose from"),
  ],
)
def test_saved_config_that_lacks_what_is_needed_is_refused_by_name(
  change, said, run
):
  edit_config(run, change)
  for call in (
    lambda: evaluate(run),
    lambda: train(small(**KEPT), run),
    lambda: replay.replay(run, 2),
  ):
    with pytest.raises(ValueError, match=f"not one of this version: .*{said}"):
      call()


def test_best_is_known_while_its_metrics_are_being_written(
  tmp_path, monkeypatch
):
  """The metrics of a step are written after `save` has returned."""
  accuracies = iter([0.5, 0.1, 0.3, 0.2])
  monkeypatch.setattr(
    evaluation,
    "evaluator",
    lambda *_: lambda *_: {"loss": 1.0, "accuracy": next(accuracies)},
  )
  seal = files.seal

  def slow(*args, **keywords):
    time.sleep(0.2)
    seal(*args, **keywords)

  monkeypatch.setattr(files, "seal", slow)
  values = {"eval.every_steps": 1, "ckpt.every_steps": 0}
  train(small(total_steps=3, **values), tmp_path)
  assert checkpoints.steps(tmp_path) == [1, 3]  # 2 was not the best
  # After a restart the best step is still known.
  train(small(total_steps=4, **values), tmp_path)
  assert checkpoints.steps(tmp_path) == [1, 4]
  assert checkpoint.load(tmp_path, "best")[2] == 1


@pytest.mark.parametrize("flag", ["--split=test", "--length_factors=1,16"])
def test_finetuning_refuses_what_it_would_not_read(flag, tmp_path):
  words = f"--workdir={tmp_path}", "--eval=finetune", flag
  done = commands.forked("eval.py", *words)
  assert done.returncode == 1
  assert done.stderr == (
    f"eval.py: {flag}; has no effect with --eval=finetune: leave it out\n"
  )


def test_bad_split_of_an_evaluation_is_one_line(run):
  done = commands.forked("eval.py", f"--workdir={run}", "--split=nope")
  assert done.returncode == 1
  assert done.stderr == (
    "eval.py: split='nope' of 'fashion_mnist'; choose from ['test', 'train', "
    "'train_without_validation', 'validation']\n"
  )


# Disks.


def mounted(folder, limit):
  """Mounts a file system of this limit, or skips the test and says why."""
  folder.mkdir()
  words = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(folder)]
  done = subprocess.run(words, capture_output=True, text=True, check=False)
  if done.returncode:
    pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
  """A folder on which a test mounts a file system."""
  if sys.platform != "linux" or shutil.which("mount") is None:
    pytest.skip("cannot mount a small file system: no mount command")
  yield tmp_path / "disk"
  subprocess.run(
    ["umount", tmp_path / "disk"], capture_output=True, check=False
  )


STEPS = ("total_steps=12", "ckpt.every_steps=2", "ckpt.keep=20")
STEPS = [f"--config.{word}" for word in (*STEPS, "eval.every_steps=0")]


def check_one_line_and_resume(workdir, first, said, again=lambda: None):
  """Checks that a run ends with one line of error.

  After a call of `again` the same command completes the run. said: the line;
  {} is the last checkpoint.
  """
  _, stderr = first.communicate(timeout=240)
  assert first.returncode == 1
  before = checkpoints.steps(workdir)
  assert stderr == f"train.py: {workdir / said.format(before[-1])}\n"
  assert all(not checkpoints.damage(workdir, step) for step in before)
  again()
  second = command(workdir, *STEPS)
  stdout, stderr = second.communicate(timeout=240)
  assert second.returncode == 0, stderr
  assert f"resumed from step {before[-1]} in" in stdout
  assert checkpoint.load(workdir)[2] == 12


FULL = (
  "No space left on device: a checkpoint was not written, because "
  "the disk is full. Make room; the same command then goes on from "
)


def test_full_disk_ends_a_run_with_one_line_and_it_goes_on_later(disk):
  mounted(disk, "size=500k")
  first = command(disk / "run", *STEPS)

  def larger():
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)

  said = f"checkpoints: {FULL}step {{}}, the last checkpoint"
  check_one_line_and_resume(disk / "run", first, said, larger)


def test_disk_without_room_for_another_folder_ends_a_run_at_once(disk):
  mounted(disk, "nr_inodes=12")
  with pytest.raises(OSError, match=f"{FULL}the start") as caught:
    train(small(), disk / "run")
  assert caught.value.filename == str(disk / "run" / "checkpoints")


def test_checkpoint_that_cannot_be_written_ends_a_run_with_one_line(tmp_path):
  """A limit on file sizes replaces a full disk, which needs a mount."""
  words = [word.replace("=12", "=2") for word in STEPS]
  assert command(tmp_path, *words).wait(120) == 0
  words = shlex.join(
    [sys.executable, "train.py", *RUNLOCAL, f"--workdir={tmp_path}", *STEPS]
  )
  first = subprocess.Popen(
    ["bash", "-c", f"ulimit -f 16; exec {words}"],
    cwd=ROOT, env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  check_one_line_and_resume(tmp_path, first, "checkpoints: File too large")


def test_failed_write_of_a_checkpoint_is_noticed_before_the_next_one(
  tmp_path, monkeypatch
):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(files, "seal", full)
  values = {"total_steps": 199, "ckpt.every_steps": 100}
  with pytest.raises(OSError, match="No space left on device") as caught:
    train(small(**values, **{"eval.every_steps": 0}), tmp_path)
  assert caught.value.filename == str(tmp_path / "checkpoints")
  assert 100 <= metrics.read(tmp_path)[-1]["step"] < 199


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.out.tfevents"])
def test_metrics_that_cannot_be_written_end_a_run_that_goes_on_later(
  name, tmp_path, monkeypatch, saved
):
  append, count = files.append, [0]

  def full(file, data):
    count[0] += name in str(file.name)
    if count[0] == 5:
      append(file, data[:10])  # the part that still fits on a full disk
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    append(file, data)

  monkeypatch.setattr(files, "append", full)
  with pytest.raises(OSError, match="No space left on device") as caught:
    train(small(total_steps=3, **KEPT), tmp_path)
  assert f"{tmp_path}/{name}" in caught.value.filename
  assert "the same command then goes on from step" in str(caught.value)
  monkeypatch.setattr(files, "append", append)
  state = train(small(total_steps=3, **KEPT), tmp_path)
  equal(state.params, checkpoint.load(saved)[1])
  lines = [metrics.read(folder) for folder in (tmp_path, saved)]
  assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]
  found = [events(folder) for folder in (tmp_path, saved)]
  losses = [[x for x in one if x[1].endswith("loss")] for one in found]
  assert losses[0] == losses[1]


@pytest.mark.parametrize("deleted", [".", "metrics.jsonl", "config.json"])
def test_folder_that_vanishes_ends_the_run_and_is_not_made_anew(
  deleted, tmp_path, monkeypatch
):
  make = evaluation.evaluator

  def deleting(*args):
    evaluate_all = make(*args)

    def run(*args):
      path = tmp_path / "run" / deleted
      shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
      return evaluate_all(*args)

    return run

  monkeypatch.setattr(evaluation, "evaluator", deleting)
  with pytest.raises(FileNotFoundError) as caught:
    train(small(total_steps=3, **KEPT), tmp_path / "run")
  assert str(tmp_path / "run") in caught.value.filename
  assert (tmp_path / "run").exists() == (deleted != ".")


def test_read_only_run_is_evaluated_and_reported(disk, saved, capsys):
  mounted(disk, "size=5m")
  run = shutil.copytree(saved, disk / "run")
  subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
  assert evaluate(run)["step"] == 3
  said = capsys.readouterr().out
  assert f"not written: {run}/eval.json: Read-only file system" in said
  with pytest.raises(ValueError, match="cannot be written: Read-only file"):
    train(small(total_steps=4, **KEPT), run)
  capsys.readouterr()
  report_html.run(types.SimpleNamespace(out=None), [str(run)])
  said = capsys.readouterr().out
  assert f"not written: {run}/report: Read-only file system" in said
  assert "accuracy" in said
  report.finish(run, "test", "accuracy", "max")
  said = capsys.readouterr().out
  assert f"not written: {run}/curves.png: Read-only file system" in said
  assert "last" in said


def test_results_are_printed_where_they_cannot_be_written(
  run, monkeypatch, capsys
):
  def read_only(path, value):
    raise OSError(errno.EROFS, "Read-only file system", str(path))

  monkeypatch.setattr(files, "write_json", read_only)
  assert evaluate(run)["step"] == 3
  said = capsys.readouterr().out
  assert f"not written: {run}/eval.json: Read-only file system" in said


# Steps that are not finite.


def poison(monkeypatch, config, steps):
  """Makes the images of these steps NaN, each time that they are drawn."""
  data = tasks.train_batches(config)
  drawn = {i: next(data)["image"].tobytes() for i in range(1, max(steps) + 1)}
  bad = {drawn[step] for step in steps}
  put = mesh.put

  def poisoned(batch, devices):
    if batch["image"].tobytes() in bad:
      nans = np.full(batch["image"].shape, np.nan, np.float32)
      batch = batch | {"image": nans}
    return put(batch, devices)

  monkeypatch.setattr(mesh, "put", poisoned)


def test_skipped_steps_leave_the_parameters_and_are_resumed_bit_for_bit(
  tmp_path, monkeypatch, capsys
):
  values = {
    "optim.non_finite": "skip",
    "optim.schedule": "constant",
    "optim.ema_decay": 0.9,
    "ckpt.every_steps": 1,
    "ckpt.keep": 9,
    "log.every_steps": 3,
  }
  poison(monkeypatch, small(), steps=(3, 4))
  state = train(small(total_steps=6, **values), tmp_path / "once")
  assert "loss=nan at step 4" in (said := capsys.readouterr().out)
  assert "The update is left out, 2 in a row" in said
  train(small(total_steps=3, **values), tmp_path / "twice")
  equal(train(small(total_steps=6, **values), tmp_path / "twice"), state)
  averages = [checkpoint.load(tmp_path / "once", i)[1] for i in (2, 4, 5)]
  equal(averages[0], averages[1])
  assert any(
    (a != b).any()
    for a, b in zip(*map(jax.tree.leaves, averages[1:]), strict=True)
  )
  lines = [x for x in metrics.read(tmp_path / "once") if x["split"] == "train"]
  assert [x.get("skipped", 0) for x in lines] == [1, 1]
  assert all(np.isfinite(x["loss"]) for x in lines)
  for name in ("once", "twice"):
    path = tmp_path / name / "non_finite.json"
    records = json.loads(path.read_text())
    assert [x["step"] for x in records] == [3, 4]
    assert records[0]["data"] == {"seed": 0, "batch": 3}
    assert records[0]["metrics"]["loss"] == "nan"
    norms = records[0]["norms"]
    assert {*norms["gradient"].values()} == {"nan"}
    assert all(isinstance(x, float) for x in norms["parameters"].values())
    assert norms["parameters"].keys() >= {"head", "encoder"}


TWO_POLICIES = """
from tests.test_runs import equal, small
from train import train

equal(train(small(**{"optim.non_finite": "skip"})), train(small()))
"""


def test_skipping_changes_no_bit_of_a_run_that_is_finite():
  # With XLA's own emitters, as users have them: with the older ones, which the
  # tests use, the two programs round differently.
  environment = os.environ | {"XLA_FLAGS": ""}
  subprocess.run(
    [sys.executable, "-c", TWO_POLICIES], cwd=ROOT, env=environment, check=True
  )


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_run_ends_and_the_step_is_replayed(
  policy, tmp_path, monkeypatch, capsys
):
  values = {"optim.non_finite": policy, "optim.max_skipped": 2}
  config = small(total_steps=9, **values, **{"ckpt.every_steps": 2})
  poison(monkeypatch, small(), steps=(4, 5))
  last = 4 if policy == "raise" else 5
  with pytest.raises(FloatingPointError) as caught:
    train(config, tmp_path)
  said = str(caught.value)
  assert said.startswith(f"loss=nan at step {last} (grad_norm=nan, lr=")
  assert "parameters not finite in: no module" in said
  assert f"--replay={last} runs the step again" in said
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(FloatingPointError) as caught:
    replay.replay(tmp_path, 4)
  assert re.fullmatch(
    r"step 4: invalid value \(nan\) encountered in \w+ in .*\.py:\d+, .*",
    str(caught.value),
  )
  # The step before has the same numbers as in the run.
  values = replay.replay(tmp_path, 3)
  [line] = [x for x in metrics.read(tmp_path) if x["step"] == 3]
  assert {k: values[k] for k in ("loss", "grad_norm", "lr")} == {
    k: line[k] for k in ("loss", "grad_norm", "lr")
  }
  assert sorted(tmp_path.rglob("*")) == before


def test_replay_is_a_flag_and_refuses_what_is_no_step(run):
  shown = command(run, "--replay=2")
  stdout, _ = shown.communicate()
  assert shown.returncode == 0
  assert all(x in stdout for x in ("step 2", "grad_norm", "gradient/head"))
  refused = command(run, "--replay=4")
  _, stderr = refused.communicate()
  assert refused.returncode == 1
  assert stderr == (
    f"train.py: step=4: the run in {run} has the steps 1 to 3\n"
  )


def test_a_step_is_replayed_as_the_command_ran_it(tmp_path):
  """The length of the run decides the learning rate."""
  short = small(total_steps=3, **{"ckpt.every_steps": 1})
  train(short, tmp_path)
  rate = replay.replay(tmp_path, 3)["lr"]
  longer = small(total_steps=9, **{"ckpt.every_steps": 1})
  train(longer, tmp_path)
  assert replay.replay(tmp_path, 3)["lr"] > rate
  assert replay.replay(tmp_path, 3, short)["lr"] == rate
  other = small(total_steps=3, **{"model.depth": 7})
  with pytest.raises(ValueError, match="model.depth"):
    replay.replay(tmp_path, 3, other)
