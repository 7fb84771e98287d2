"""The training loop in two small steps, from the command line to the model."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from configs import vit, vit_sigmoid
from eval import evaluate
from sigattn import tasks
from sigattn.training import (
  checkpoint,
  mesh,
  metrics,
  process,
  run_dir,
  setup,
  step,
)
from sigattn.training import evaluate as evaluation
from tests import commands
from tests.training.events import events
from train import train

ROOT = pathlib.Path(__file__).parent.parent
TIMES = ("per_second", "data_seconds")  # they differ between any two runs


def small(kind="sigmoid", **values):
  config = vit_sigmoid.get_config("runlocal")
  config.attn.kind = kind
  config.update_from_flattened_dict(values)
  return config


@pytest.fixture
def few_images(monkeypatch):
  """Evaluates one batch instead of all batches. The loop is the same."""
  whole = tasks.eval_batches

  def one(config, split):
    return [next(iter(whole(config, split)))]

  monkeypatch.setattr(tasks, "eval_batches", one)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "relu", "relu2"])
def test_every_kind_trains_and_writes_nothing_without_a_workdir(
  kind, normalize, tmp_path, monkeypatch, few_images
):
  if kind == "softmax" and normalize:
    pytest.skip("is refused: tests/test_configs.py")
  monkeypatch.chdir(tmp_path)
  config = small(kind, **{"attn.normalize": normalize})
  state = train(config)
  assert int(state.step) == 2
  assert not list(tmp_path.iterdir())
  _, start = setup.init(config)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, start)
  assert all(jax.tree.leaves(moved["head"]))
  model = setup.model(config, state.params)
  logits = model(np.zeros((3, 28, 28, 1), np.float32))
  assert logits.shape == (3, 10)


def test_loss_falls_when_it_learns_one_batch():
  config = small(total_steps=30)
  config.optim.update(lr=3e-3, schedule="constant")
  state, update = step.init(config, mesh.make())
  step_fn = step.jitted(update)
  batch = next(tasks.train_batches(config))
  losses = []
  for _ in range(30):
    state, values = step_fn(state, batch)
    losses.append(float(values["loss"]))
  assert losses[0] == pytest.approx(np.log(10), rel=0.05)
  assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
  workers, tmp_path, few_images
):
  values = {
    "optim.schedule": "constant",
    "optim.ema_decay": 0.9,
    "model.drop_path": 0.2,
    "augment.mixup": 0.5,
    "data.num_workers": workers,
    "log.every_steps": 2,  # the run stops between two lines
  }
  once = train(small(total_steps=6, **values), tmp_path / "once")
  train(small(total_steps=3, **values), tmp_path / "twice")
  twice = train(small(total_steps=6, **values), tmp_path / "twice")
  equal(once, twice)
  lines = [
    [
      {k: v for k, v in line.items() if k not in TIMES}
      for line in metrics.read(tmp_path / name)
      # Only the shorter run has lines of step 3, because it ended there.
      if line["step"] != 3
    ]
    for name in ("once", "twice")
  ]
  assert lines[0] == lines[1]


def test_kill_9_and_the_same_command_again_equals_one_run(tmp_path):
  config = ["--config=configs/vit_sigmoid.py:runlocal"]
  config += ["--config.total_steps=120", "--config.ckpt.every_steps=20"]
  config += ["--config.eval.every_steps=0", "--config.optim.warmup_steps=5"]

  def command(workdir):
    return [sys.executable, "train.py", *config, f"--workdir={workdir}"]

  killed = subprocess.Popen(
    command(tmp_path / "killed"), cwd=ROOT, stdout=subprocess.DEVNULL
  )
  folder, deadline = tmp_path / "killed" / "checkpoints", time.time() + 120
  while not folder.is_dir() or not [
    p for p in folder.iterdir() if p.name.isdecimal()
  ]:
    assert killed.poll() is None, "ended before its first checkpoint"
    assert time.time() < deadline
    time.sleep(0.02)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  assert not (tmp_path / "killed" / "DONE.json").exists()
  output = subprocess.run(
    command(tmp_path / "killed"),
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  assert "resumed from step" in output
  assert re.search(r"the first step ended \d+\.\d s after the start", output)
  subprocess.run(
    command(tmp_path / "whole"), cwd=ROOT, capture_output=True, check=True
  )
  _, killed_params, last = checkpoint.load(tmp_path / "killed")
  _, whole_params, _ = checkpoint.load(tmp_path / "whole")
  assert last == 120
  equal(killed_params, whole_params)
  runs = [tmp_path / "killed", tmp_path / "whole"]
  lines = [metrics.read(run) for run in runs]
  assert [x["step"] for x in lines[0]] == [x["step"] for x in lines[1]]
  # TensorBoard has every number once.
  for run, expected in zip(runs, lines, strict=True):
    scalars = [
      (line["step"], f"{line['split']}/{name}", np.float32(value))
      for line in expected
      for name, value in line.items()
      if name not in ("step", "split")
    ]
    assert events(run) == scalars


def test_interrupt_saves_and_the_same_call_goes_on(tmp_path):
  command = [
    sys.executable, "train.py", "--config=configs/vit_sigmoid.py:runlocal",
    "--config.total_steps=100000", "--config.ckpt.every_steps=0",
    "--config.eval.every_steps=0", f"--workdir={tmp_path}",
  ]  # fmt: skip
  run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  for line in run.stdout:
    if line.startswith("step 5/"):
      break
  run.send_signal(signal.SIGINT)
  output = run.stdout.read()
  assert run.wait(60) == 130
  assert "Traceback" not in output
  last = checkpoint.load(tmp_path)[2]
  assert f"stopped after step {last} and is saved; the same command" in output
  assert 5 <= last < 100000
  state = train(
    small(total_steps=last, **{"ckpt.every_steps": 0, "eval.every_steps": 0}),
    tmp_path,
  )
  assert int(state.step) == last


def test_finished_run_is_read_back_not_trained_again(
  tmp_path, few_images, capsys
):
  first = train(small(), tmp_path)
  before = (tmp_path / "metrics.jsonl").read_text()
  capsys.readouterr()
  again = train(small(), tmp_path)
  assert "total_steps=2 and the run has done 2 updates, so nothing is" in (
    capsys.readouterr().out
  )
  equal(first, again)
  assert (tmp_path / "metrics.jsonl").read_text() == before
  assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_run_killed_between_its_last_checkpoint_and_its_end_is_completed(
  tmp_path, few_images
):
  train(small(), tmp_path)
  before = (tmp_path / "metrics.jsonl").read_text()
  done = (tmp_path / "DONE.json").read_text()
  (tmp_path / "DONE.json").unlink()
  train(small(), tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == before
  assert (tmp_path / "DONE.json").read_text() == done


def test_a_run_is_resumed_with_another_length_but_not_another_config(
  tmp_path, few_images, capsys
):
  train(small(), tmp_path)
  with pytest.raises(ValueError, match=r"config\.attn\.kind='sigmoid'"):
    train(small("softmax"), tmp_path)
  capsys.readouterr()
  other = {"log.every_steps": 2, "eval.every_steps": 1}
  assert int(train(small(total_steps=1, **other), tmp_path).step) == 2
  said = capsys.readouterr().out
  assert "total_steps=1 and the run has done 2 updates" in said


def test_a_run_that_does_not_fit_may_begin_anew_with_another_config(
  tmp_path, monkeypatch, few_images, capsys
):
  jitted = step.jitted
  petabytes = jax.jit(lambda *_: jax.numpy.ones((2**25, 2**25)))
  monkeypatch.setattr(step, "jitted", lambda update: petabytes)
  said = (
    r"lower config\.batch_size=8, or raise config\.optim\.accumulate=1 "
    r"\(RESOURCE_EXHAUSTED: Out of memory"
  )
  with pytest.raises(MemoryError, match=said):
    train(small(), tmp_path)
  assert (tmp_path / "config.json").exists()
  monkeypatch.setattr(step, "jitted", jitted)
  capsys.readouterr()
  assert int(train(small("softmax"), tmp_path).step) == 2
  said = "its run has not finished a step, and begins anew"
  assert said in capsys.readouterr().out
  assert run_dir.read_config(tmp_path).attn.kind == "softmax"
  # A run with a finished step stays, even without a checkpoint.
  shutil.rmtree(tmp_path / "checkpoints")
  (tmp_path / "DONE.json").unlink()
  with pytest.raises(ValueError, match=r"config\.attn\.kind='softmax'"):
    train(small(), tmp_path)


def test_what_a_run_leaves(tmp_path):
  config = small(**{"batch_size": 256, "eval.every_steps": 1})
  train(config, tmp_path)
  assert run_dir.read_config(tmp_path).attn.kind == "sigmoid"
  lines = metrics.read(tmp_path)
  assert [(x["step"], x["split"]) for x in lines] == [
    (1, "train"), (1, "test"), (2, "train"), (2, "test"),
  ]  # fmt: skip
  assert {"loss", "accuracy", "lr", "grad_norm"} <= lines[0].keys()
  done = json.loads((tmp_path / "DONE.json").read_text())
  assert done["step"] == 2
  assert done["accuracy"] == lines[-1]["accuracy"]
  assert (tmp_path / "curves.png").stat().st_size > 10_000
  assert list(tmp_path.glob("events.out.tfevents.*"))
  results = evaluate(tmp_path)
  assert results["accuracy"] == pytest.approx(done["accuracy"], abs=1e-7)
  assert evaluate(tmp_path, split="train", step=2)["split"] == "train"
  assert json.loads((tmp_path / "eval.json").read_text()) == results
  with pytest.raises(
    ValueError, match=r"length_factors=\(2,\); the task 'vit'"
  ):
    evaluate(tmp_path, length_factors=[2])
  with pytest.raises(ValueError, match=r"step=7: .* holds the steps \["):
    evaluate(tmp_path, step=7)
  with pytest.raises(ValueError, match="no run here"):
    evaluate(tmp_path / "nothing")


def test_rate_does_not_count_what_compiles(monkeypatch, few_images):
  """On this clock a step takes 1 second and compiling takes 1000 seconds."""
  clock, lines, sizes = [0], [], set()
  time = types.SimpleNamespace(perf_counter=lambda: clock[0])
  monkeypatch.setattr(metrics, "time", time)
  monkeypatch.setattr(metrics.Writer, "write", lambda _, *x: lines.append(x))
  fetch = metrics.StepLog._fetch

  def step_fn(state, batch):
    size = len(batch["target"])
    clock[0] += 0 if size in sizes else 1000
    sizes.add(size)
    values = {"loss": np.ones(()), "lr": np.ones(()), "grad_norm": np.ones(())}
    return state, values

  def wait(log):
    clock[0] += 1
    fetch(log)

  monkeypatch.setattr(step, "jitted", lambda update: step_fn)
  monkeypatch.setattr(metrics.StepLog, "_fetch", wait)
  every = {f"{name}.every_steps": 0 for name in ("eval", "ckpt")}
  config = small(total_steps=5, **every, **{"log.every_steps": 5})
  batch = next(tasks.train_batches(config))
  half = {name: x[: len(x) // 2] for name, x in batch.items()}
  batches = [batch, batch, half, batch, half]
  monkeypatch.setattr(tasks, "train_batches", lambda _: (x for x in batches))
  train(config)
  rates = [x["per_second"] for _, split, x in lines if split == "train"]
  # The first step of each batch size compiles.
  whole = len(batch["target"])
  assert rates == [pytest.approx((whole + whole + whole // 2) / 3)]


def test_evaluation_averages_over_the_examples_not_the_padding(tmp_path):
  config = small(batch_size=192)  # 2000 images: the last batch is padded
  _, params = setup.init(config)
  evaluator = evaluation.evaluator(config, mesh.make())
  found = evaluator(params, tasks.eval_batches(config, "test"))
  config.batch_size = 250
  whole = evaluator(params, tasks.eval_batches(config, "test"))
  assert found["accuracy"] == pytest.approx(whole["accuracy"], abs=1e-6)
  assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_best_checkpoint_is_kept_beside_the_newest(
  tmp_path, monkeypatch, caplog
):
  accuracies = iter([0.1, 0.5, 0.3])
  monkeypatch.setattr(
    evaluation,
    "evaluator",
    lambda *_: lambda *_: {"loss": 1.0, "accuracy": next(accuracies)},
  )
  values = {"eval.every_steps": 2, "ckpt.every_steps": 1}
  train(small(total_steps=6, **values), tmp_path)
  folder = tmp_path / "checkpoints"
  assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["4", "6"]
  assert checkpoint.load(tmp_path, "best")[2] == 4
  assert checkpoint.load(tmp_path)[2] == 6
  assert "metrics" not in caplog.text  # Orbax warns if it finds no metrics


@pytest.mark.parametrize(("keep", "kept"), [(1, ["3"]), (2, ["2", "3"])])
def test_two_kept_checkpoints_leave_a_spare(keep, kept, tmp_path, monkeypatch):
  """Also if the newest is the best."""
  accuracies = iter([0.1, 0.2, 0.3])
  monkeypatch.setattr(
    evaluation,
    "evaluator",
    lambda *_: lambda *_: {"loss": 1.0, "accuracy": next(accuracies)},
  )
  values = {"eval.every_steps": 1, "ckpt.every_steps": 1, "ckpt.keep": keep}
  train(small(total_steps=3, **values), tmp_path)
  folder = tmp_path / "checkpoints"
  assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == kept


def test_accumulated_gradient_equals_the_whole_batchs():
  # Mixup would mix different pairs in each part.
  config = small(batch_size=12, **{"augment.mixup": 0.0})
  batch = next(tasks.train_batches(config))
  found = []
  for parts in (1, 3):
    config.optim.accumulate = parts
    state, update = step.init(config, mesh.make())
    found.append(step.jitted(update)(state, batch)[1])
  for name in ("loss", "accuracy", "grad_norm"):
    np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-5)


def test_bfloat16_computes_in_it_and_keeps_float32_parameters(few_images):
  state = train(small(dtype="bfloat16"))
  assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
  exact = train(small())
  rounding = jax.tree.map(
    lambda a, b: float(abs(a - b).max()), state.params, exact.params
  )
  assert max(jax.tree.leaves(rounding)) > 0


def test_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
  tmp_path, monkeypatch
):
  put, count = mesh.put, [0]

  def poisoned(batch, devices):
    count[0] += 1
    if count[0] == 3:
      nans = np.full(batch["image"].shape, np.nan, np.float32)
      batch = batch | {"image": nans}
    return put(batch, devices)

  monkeypatch.setattr(mesh, "put", poisoned)
  with pytest.raises(FloatingPointError, match="loss=nan at step 3 "):
    train(small(total_steps=5, **{"eval.every_steps": 0}), tmp_path)
  _, params, step = checkpoint.load(tmp_path)
  assert step == 2
  assert not any(np.isnan(x).any() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--config=configs/vit.py", "--config.attn.kidn=relu"], "kind"),
    (
      ["--config=configs/vit.py", "--config.atn.kind=relu"],
      "config.attn.kind?",
    ),
    (
      ["--config=configs/vit.py", "--config.model.width=abc"],
      "width=abc; must",
    ),
    (["--config=configs/vit.py", "--config.attn.kind=x"], "config.attn.kind"),
    (["--config=configs/no.py"], "configs/no.py"),
    (["--config=configs/vit_sigmoid.py:b"], "vit_sigmoid.py:b: unknown 'b'"),
    (
      ["--config=configs/vit.py:runlocal", "--config=configs/lm.py"],
      "--config=configs/lm.py; --config=configs/vit.py:runlocal is given too",
    ),
    (["--config=configs/vit.py", "--workdir=/proc/no"], "cannot be written"),
  ],
)
def test_command_line_refuses_without_a_trace_of_a_run(words, said, tmp_path):
  done = commands.forked("train.py", *words, TMPDIR=str(tmp_path))
  assert done.returncode == 1
  assert said in done.stderr
  assert len(done.stderr.splitlines()) == 1


# A step's buffer of 125 MiB is at the address of the previous one, unless a
# small object has been allocated there since. That happens now and then in any
# process, so the program prints the median.
FAULTS = """
import resource, statistics, jax
from sigattn.training import process
process.keep_freed_memory()
x = jax.numpy.ones((128, 128))
step = jax.jit(lambda x: (jax.numpy.tile(x, (2000, 1)) @ x).sum())

def fetched():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(x).block_until_ready()
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(statistics.median_low(fetched() for _ in range(25)))
"""


def test_steps_on_a_cpu_reuse_the_memory_of_the_one_before():
  done = subprocess.run(
    [sys.executable, "-c", FAULTS], cwd=ROOT,
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert int(done.stdout) < 2000  # of 32,000 pages


COMPILED = """
import jax
from sigattn import cli
cli.keep_compiled()
jax.jit(lambda x: x + 1)(1.0)
"""


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_compiled_is_kept_for_the_next_program(tmp_path, writable):
  cache = tmp_path / "cache"
  if not writable:
    cache.write_text("no folder")
  env = os.environ | {
    "XDG_CACHE_HOME": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  del env["JAX_COMPILATION_CACHE_DIR"]
  done = subprocess.run(
    [sys.executable, "-c", COMPILED], cwd=ROOT, env=env,
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  folder = cache / "sigattn" / "compiled"
  if writable:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert any("jit__lambda" in path.name for path in folder.iterdir())
  said = f"what is compiled is not kept: [Errno 20] Not a directory: '{folder}'"
  assert done.stderr == ("" if writable else f"{said}\n")


def test_two_seeds_differ_and_one_repeats(few_images):
  runs = [train(small(seed=seed)).params for seed in (0, 0, 1)]
  equal(runs[0], runs[1])
  assert (runs[0]["head"]["kernel"] != runs[2]["head"]["kernel"]).any()


def test_kinds_start_from_the_same_parameters():
  equal(
    setup.init(vit.get_config())[1], setup.init(vit_sigmoid.get_config())[1]
  )


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_a_run_of_an_older_format_is_refused_by_name(
  program, tmp_path, few_images
):
  train(small(), tmp_path)
  path = tmp_path / "config.json"
  content = json.loads(path.read_text())
  assert content["format"] == run_dir.FORMAT
  path.write_text(json.dumps(content | {"format": 1}))
  words = ["--config=configs/vit_sigmoid.py:runlocal"]
  done = commands.forked(
    program, *words[: program == "train.py"], f"--workdir={tmp_path}"
  )
  assert done.returncode == 1
  assert (
    f"holds a run of format 1, this version reads format {run_dir.FORMAT}"
    in done.stderr
  )
  assert "Traceback" not in done.stderr


def test_a_checkpoint_of_an_older_format_is_refused(
  tmp_path, few_images, monkeypatch
):
  monkeypatch.setattr(run_dir, "FORMAT", 1)
  train(small(), tmp_path)
  monkeypatch.undo()
  path = tmp_path / "config.json"
  content = json.loads(path.read_text()) | {"format": run_dir.FORMAT}
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="holds a run of format 1"):
    checkpoint.load(tmp_path)
  with pytest.raises(ValueError, match="holds a run of format 1"):
    train(small(total_steps=3), tmp_path)


def test_a_stop_that_comes_twice_is_one_and_a_later_one_ends_at_once(
  monkeypatch,
):
  # A shell starts what runs in the background with this signal ignored.
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  with process.stop_signals() as stop:
    for _ in range(2):
      signal.raise_signal(signal.SIGTERM)
    assert stop.at(1)
    monkeypatch.setattr(process, "_SECONDS_OF_ONE_STOP", 0)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  signal.signal(signal.SIGINT, old)
