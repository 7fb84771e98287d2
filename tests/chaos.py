"""Kills training repeatedly, and checks that nothing is lost.

  python -m tests.chaos --kills=100 --out=benchmarks/results/chaos.json

SIGKILL ends train.py at random moments, in vision, streamed text and speech.
Half of the kills come while a checkpoint is written. If worker processes read
the data, some kills end one of them instead. The same command then resumes from
the newest checkpoint. Each of these checkpoints and the end of each run must
have the same bits as in an undisturbed run, and metrics.jsonl and the event
files must have the same numbers. The program exits with 1 if anything differs.

A kill counts as inside of a write only if it leaves the folder of an unfinished
checkpoint that this start of train.py made.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time

if __name__ == "__main__":  # before JAX reads it; train.py inherits it
  _cache = tempfile.TemporaryDirectory(prefix="sigattn_chaos_")
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": _cache.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }

import jax
import numpy as np
from absl import logging

from configs import lm_sigmoid, speech_sigmoid, vit_sigmoid
from sigattn.training import checkpoint, files, metrics, saved
from tests.data.recordings import recording, write_folder
from tests.training.events import events
from train import train

ROOT = pathlib.Path(__file__).parents[1]

# Lines of metrics are means over 5 steps; checkpoints fall between the lines.
EVERY = {
  "log.every_steps": 5,
  "ckpt.every_steps": 7,
  "eval.every_steps": 41,
  "optim.schedule": "constant",
  "model.depth": 1,
}


def vision(folder):
  """The embedded images, read by two worker processes."""
  del folder
  return (
    "configs/vit_sigmoid.py:runlocal",
    vit_sigmoid,
    {
      "batch_size": 100,
      "data.num_workers": 2,
      "model.drop_path": 0.2,
      "augment.mixup": 0.5,
      "optim.ema_decay": 0.9,
    },
  )


def text(folder):
  """Streams of two files."""
  rng = random.Random(0)
  for split in ("train", "test"):
    lines = [
      json.dumps({"text": "".join(rng.choices("abcde ", k=rng.randrange(90)))})
      for _ in range(200 if split == "train" else 20)
    ]
    (folder / f"{split}.jsonl").write_text("\n".join(lines))
  return (
    "configs/lm_sigmoid.py:runlocal",
    lm_sigmoid,
    {
      "data.source": str(folder / "train.jsonl"),
      "data.eval_source": str(folder / "test.jsonl"),
      "data.tokenizer": "bytes",
      "data.vocab_size": 257,
    },
  )


def speech(folder):
  """A table of recordings in two buckets, read by two worker processes."""
  rows = [(recording(0.3 + i % 7 / 10), "abcdefg"[: i % 7]) for i in range(21)]
  return (
    "configs/speech_sigmoid.py:runlocal",
    speech_sigmoid,
    {
      **write_folder(folder, rows),
      "data.bucket_seconds": (0.6, 1.0),
      "eval.every_steps": 0,  # each evaluation would start workers
      "data.num_workers": 2,
    },
  )


TASKS = {"vision": vision, "text": text, "speech": speech}


class Run:
  """A task with its data and its undisturbed run."""

  def __init__(self, task, folder, total_steps):
    self.folder = folder
    (folder / "data").mkdir(parents=True)
    self.file, module, values = TASKS[task](folder / "data")
    self.values = EVERY | values | {"total_steps": total_steps}
    self.has_workers = "data.num_workers" in values
    self._config = module.get_config("runlocal")
    self._config.update_from_flattened_dict(self.values)
    self.whole = folder / "whole"
    config = self._config.copy_and_resolve_references()
    config.ckpt.keep = 10**6
    self.end = train(config, self.whole)
    self._params = {}

  def start(self, workdir):
    """Starts train.py, and does not wait for its end."""
    words = [f"--config.{name}={value}" for name, value in self.values.items()]
    with (self.folder / "stderr").open("w") as file:
      return subprocess.Popen(
        [sys.executable, "train.py", f"--config={self.file}", *words,
         f"--workdir={workdir}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file,
      )  # fmt: skip

  def stderr(self):
    return (self.folder / "stderr").read_text()

  def newest_is_right(self, workdir):
    """Whether the newest checkpoint is complete and equals the whole run's."""
    if not saved.steps(workdir):
      return True
    _, params, step = checkpoint.load(workdir)
    if step not in self._params:
      self._params[step] = checkpoint.load(self.whole, step)[1]
    return equal(params, self._params[step])

  def finish(self, workdir):
    """Completes the run.

    Returns (whether its end is right, lost lines of metrics, lost events).
    Lines and events that occur twice also count as lost.
    """
    same = equal(train(self._config, workdir), self.end)
    lines = [numbers(metrics.read(x)) for x in (workdir, self.whole)]
    # TensorBoard has every number of metrics.jsonl, including the times.
    scalars = collections.Counter(
      (line["step"], f"{line['split']}/{name}", np.float32(value))
      for line in metrics.read(workdir)
      for name, value in line.items()
      if name not in ("step", "split")
    )
    return (
      same,
      difference(*lines),
      difference(collections.Counter(events(workdir)), scalars),
    )


def equal(tree, other):
  same = jax.tree.map(np.array_equal, tree, other)
  return all(jax.tree.leaves(same))


def numbers(lines):
  """How often each line occurs, without its times."""
  return collections.Counter(
    tuple(
      (name, x)
      for name, x in line.items()
      if name not in ("per_second", "data_seconds")
    )
    for line in lines
  )


def difference(counts, expected):
  return ((counts - expected) + (expected - counts)).total()


def unfinished(workdir):
  """The folders of checkpoints that are not finished."""
  found = set()
  try:
    with os.scandir(pathlib.Path(workdir) / "checkpoints") as entries:
      for entry in entries:
        if not entry.name.isdecimal():
          found.add((entry.name, entry.inode()))
  except FileNotFoundError:
    pass
  return found


def workers(pid):
  """The worker processes of a process."""
  table = subprocess.run(
    ["ps", "-A", "-o", "pid=,ppid=,args="],
    capture_output=True, text=True, check=True,
  ).stdout  # fmt: skip
  rows = [line.split(None, 2) for line in table.splitlines()]
  return [
    int(row[0]) for row in rows if row[1] == str(pid) and "spawn_main" in row[2]
  ]


def is_alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def wait_until(condition, process, seconds=120):
  """Waits until the condition holds; False if the process ends first."""
  deadline = time.monotonic() + seconds
  while not condition():
    if process.poll() is not None:
      return False
    if time.monotonic() > deadline:
      process.kill()
      raise TimeoutError(f"nothing happened in {seconds} s")
    time.sleep(0.0005)
  return True


class Killer:
  """Starts and kills train.py, and counts the kills."""

  def __init__(self, seed, writes, seconds):
    """writes, seconds: how long training runs at most before a kill."""
    self._rng = random.Random(seed)
    self._writes, self._seconds = writes, seconds
    self._seconds_to_first_line = 5.0
    self.counts = collections.Counter()

  def kill(self, run, workdir):
    """Starts train.py and kills it. Returns False if the run finished first."""
    rng, before = self._rng, unfinished(workdir)
    begin, size = time.monotonic(), _size(workdir)
    process = run.start(workdir)
    victims = []

    def is_writing():
      return bool(unfinished(workdir) - before)

    def is_training():
      return _size(workdir) > size

    # Some kills shall come while it starts.
    if 2 * self.counts["inside_write"] <= self.counts["kills"]:
      how, alive = "write", wait_until(is_training, process)
      for _ in range(
        rng.randrange(self._writes)
      ):  # the first write, or a later one
        alive = alive and wait_until(lambda: not is_writing(), process)
        alive = alive and wait_until(is_writing, process)
      alive = alive and wait_until(is_writing, process)
      time.sleep(rng.uniform(0, 0.03))
    elif rng.random() < 0.25:
      how, alive = "start", True
      time.sleep(rng.uniform(0, self._seconds_to_first_line))
    else:
      how, alive = "step", wait_until(is_training, process)
      if alive:
        self._seconds_to_first_line = time.monotonic() - begin
      time.sleep(rng.uniform(0, self._seconds))
    if alive and run.has_workers:
      victims = workers(process.pid)
    if how == "step" and victims and rng.random() < 0.5:
      code = self._kill_worker(run, process, rng.choice(victims))
    else:
      process.kill()
      code = process.wait()
      if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"train.py ended with {code}: {run.stderr()}")
    if code == 0:
      return False  # the kill came too late
    self.counts["kills"] += 1
    self.counts["inside_write"] += is_writing()
    deadline = time.monotonic() + 30
    while any(map(is_alive, victims)):  # they end when their parent has ended
      if time.monotonic() > deadline:
        raise RuntimeError("a worker process outlived train.py")
      time.sleep(0.01)
    return True

  def _kill_worker(self, run, process, victim):
    """Kills a worker. train.py must then end by itself, with one line."""
    os.kill(victim, signal.SIGKILL)
    code = process.wait(120)
    if code:
      self.counts["of_workers"] += 1
      # Python's tracker of shared memory then logs what it has cleaned up.
      said = run.stderr()
      if code != 1 or "a worker process" not in said or "Traceback" in said:
        raise RuntimeError(f"train.py ended with {code}: {run.stderr()}")
    return code


def _size(workdir):
  try:
    return os.stat(pathlib.Path(workdir) / "metrics.jsonl").st_size
  except FileNotFoundError:
    return 0


def chaos(kills, folder, total_steps, writes, seconds, seed=0, per_run=10):
  """Kills as often as asked, and returns the results to record."""
  killer = Killer(seed, writes, seconds)
  counts = killer.counts
  counts.update(metrics_lost=0, events_lost=0, bit_identical=0, of_workers=0)
  runs = {}
  while counts["kills"] < kills:
    for task in TASKS:
      count = min(per_run, -(-kills // len(TASKS)), kills - counts["kills"])
      if not count:
        break
      if task not in runs:
        runs[task] = Run(task, folder / task, total_steps)
      run, right = runs[task], []
      workdir = run.folder / f"killed_{counts['kills']}"
      while len(right) < count and killer.kill(run, workdir):
        right.append(run.newest_is_right(workdir))
      same, lines, numbers = run.finish(workdir)
      counts["bit_identical"] += same * sum(right)
      counts["metrics_lost"] += lines
      counts["events_lost"] += numbers
      counts[f"of_{task}"] += len(right)
      print(f"{task}: {dict(counts)}", flush=True)
  return dict(counts)


def _commit():
  def git(*words):
    return subprocess.run(
      ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()

  changed = git("status", "--porcelain", "--untracked-files=no")
  return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, required=True)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", help="a JSON file for the result")
  given = parser.parse_args()
  metrics.console.quiet = True
  logging.set_verbosity(logging.ERROR)
  record = {
    "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
    "date": datetime.date.today().isoformat(),
    "commit": _commit(),
    "jax": jax.__version__,
  }
  with tempfile.TemporaryDirectory(prefix="sigattn_chaos_") as folder:
    record |= chaos(
      given.kills, pathlib.Path(folder), 300, 8, 2.0, seed=given.seed
    )
  print(json.dumps(record, indent=2))
  if given.out:
    files.write_json(given.out, record)
  lost = record["metrics_lost"] or record["events_lost"]
  sys.exit(bool(lost or record["bit_identical"] < record["kills"]))


if __name__ == "__main__":
  main()
