"""The order of examples, exact resume, and worker processes."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sigattn import tasks
from sigattn.data import hub, loader
from tests.data.pictures import AUGMENTED, equal, local, make, take

ROOT = pathlib.Path(__file__).parents[2]


# The order.


def test_batch_may_be_of_one_example():
  [batch] = take(make(batch_size=1), 1)
  assert batch["image"].shape[0] == 1


def test_seed_decides_order_and_augmentation():
  for values in ({}, AUGMENTED):
    equal(take(make(**values), 3), take(make(**values), 3))
  first, other = take(make(), 2), take(make(seed=1), 2)
  assert (first[0]["target"] != other[0]["target"]).any()
  assert (first[1]["target"] != other[1]["target"]).any()
  first, other = take(make(**AUGMENTED), 1)[0], take(make(), 1)[0]
  np.testing.assert_array_equal(first["target"], other["target"])
  assert (first["image"] != other["image"]).any()


def test_seed_decides_augmentation_of_the_same_images(monkeypatch):
  monkeypatch.setattr(loader, "_permutation", lambda n, *_: np.arange(n))
  first, other = (
    take(make(**AUGMENTED), 1)[0],
    take(make(seed=1, **AUGMENTED), 1)[0],
  )
  np.testing.assert_array_equal(first["target"], other["target"])
  assert (first["image"] != other["image"]).any()


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_epoch_has_every_example_once_in_an_order_of_its_own(chunk):
  order = loader._Shuffled(7, chunk, seed=0)
  indices = np.concatenate([order[i] for i in range(100)])[:70].reshape(10, 7)
  for epoch in indices:
    assert sorted(epoch) == list(range(7))
  assert len({tuple(epoch) for epoch in indices}) == 10
  other = loader._Shuffled(7, chunk, seed=1)
  shifted = np.concatenate([other[i] for i in range(100)])[:70].reshape(10, 7)
  assert (indices[1:] != shifted[:-1]).any()


def test_whole_epoch_of_the_embedded_set_is_the_set():
  shuffled = take(make(batch_size=1000), 10)
  in_order = list(tasks.eval_batches(make(batch_size=1000), "train"))
  images = [
    np.concatenate([b["image"] for b in x]) for x in (shuffled, in_order)
  ]
  sums = [np.sort(x.sum((1, 2, 3), dtype=np.int64)) for x in images]
  np.testing.assert_array_equal(*sums)


def test_processes_share_what_one_process_would_have(monkeypatch):
  [whole] = take(make(), 1)
  monkeypatch.setattr(loader.jax, "process_count", lambda: 2)
  shares = []
  for index in range(2):
    monkeypatch.setattr(loader.jax, "process_index", lambda i=index: i)
    shares += take(make(), 1)
    evaluated = list(tasks.eval_batches(make(), "test"))
    assert len(evaluated) == 250
    assert evaluated[0]["image"].shape == (4, 28, 28, 1)
  both = {k: np.concatenate([s[k] for s in shares]) for k in whole}
  equal([both], [whole])


def test_evaluation_has_every_example_once_and_padding_of_no_weight():
  batches = tasks.eval_batches(make(batch_size=192), "test")
  first_pass = list(batches)
  assert {b["image"].shape for b in first_pass} == {(192, 28, 28, 1)}
  weight = np.concatenate([b["weight"] for b in first_pass])
  assert weight.dtype == np.float32
  np.testing.assert_array_equal(weight, np.arange(len(weight)) < 2000)
  with np.load(hub.embedded("fashion_mnist", "fashion_mnist.npz")) as arrays:
    images = np.concatenate([b["image"] for b in first_pass])[:2000, ..., 0]
    np.testing.assert_array_equal(images, arrays["x_test"])
    targets = np.concatenate([b["target"] for b in first_pass])[:2000]
    np.testing.assert_array_equal(targets, arrays["y_test"])
  equal(batches, first_pass)


# Resume and workers.


@pytest.mark.parametrize(
  ("workers", "source"), [(0, "embedded"), (2, "embedded"), (0, "folder")]
)
def test_resumes_bit_for_bit_where_it_was_saved(
  workers, source, tmp_path, request
):
  config = make(**AUGMENTED, **{"data.num_workers": workers})
  if source == "folder":
    config = local(request.getfixturevalue("folder"), **AUGMENTED)
  with (
    ocp.CheckpointManager(tmp_path / "ckpt") as manager,
    contextlib.closing(tasks.train_batches(config)) as data,
  ):
    for _ in range(3):
      next(data)
    save = grain.checkpoint.CheckpointSave(data)
    manager.save(3, args=ocp.args.Composite(data=save))
    rest = [next(data) for _ in range(4)]
    manager.wait_until_finished()
    with contextlib.closing(tasks.train_batches(config)) as again:
      restore = grain.checkpoint.CheckpointRestore(again)
      manager.restore(3, args=ocp.args.Composite(data=restore))
      equal([next(again) for _ in range(4)], rest)
  # Worker processes change only the speed.
  config.data.num_workers = 0
  equal(take(config, 7)[3:], rest)
  assert (rest[0]["image"] != rest[1]["image"]).any()


def test_workers_decode_what_threads_do(folder):
  values = AUGMENTED | {"augment.crop": "inception"}
  workers = {"data.num_workers": 1}
  equal(
    take(local(folder, **values), 3),
    take(local(folder, **values, **workers), 3),
  )


def test_killed_run_leaves_no_workers(tmp_path):
  script = tmp_path / "run.py"
  script.write_text("""
import multiprocessing, os, signal
from configs import vit
from sigattn import tasks

if __name__ == "__main__":
  config = vit.get_config()
  config.data.num_workers = 2
  data = tasks.train_batches(config)
  next(data), next(data)  # the second batch comes from the second worker
  print(len(multiprocessing.active_children()), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
""")
  # This returns when the last process that holds the pipe has ended.
  done = subprocess.run(
    [sys.executable, script],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60,
    check=False,
  )  # fmt: skip
  assert done.returncode == -signal.SIGKILL
  assert done.stdout == "2\n"


# Worker processes.


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
  """Its workers would run it again, and crash without an explanation."""
  script = tmp_path / "script.py"
  call = "next(tasks.train_batches(config))"
  script.write_text(
    "from configs import speech_sigmoid\n"
    "from sigattn import tasks\n"
    "config = speech_sigmoid.get_config('runlocal')\n"
    "config.data.num_workers = 1\n"
    f"{call}\n"
  )
  done = subprocess.run(
    [sys.executable, script], capture_output=True, text=True, timeout=100,
    env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
  )  # fmt: skip
  assert done.returncode == 1
  [*_, last] = done.stderr.strip().splitlines()
  assert "config.data.num_workers=1" in last
  assert "script.py again" in last
  assert "line 5" in last
