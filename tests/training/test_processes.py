"""One run in several processes, which connect on this machine's loopback."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from sigattn.training import metrics, process

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 240


def start(folder, index=None, count=None, port=None):
  """Starts train.py, as process `index` of `count`."""
  command = [
    sys.executable, "train.py", f"--workdir={folder}",
    "--config=configs/synthetic_sigmoid.py:recall,runlocal",
    f"--config.total_steps={STEPS}", "--config.ckpt.every_steps=40",
    "--config.eval.every_steps=0", "--config.log.every_steps=40",
    "--config.optim.name=sgd", "--config.optim.schedule=constant",
    "--config.optim.lr=0.01", "--config.optim.warmup_steps=0",
  ]  # fmt: skip
  if index is not None:
    command += [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"]
    command += [f"--process={index}"]
  return subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def start_all(folder, count):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [start(folder, i, count, port) for i in range(count)]


def finished(runs, seconds=240):
  """[(exit status, stdout, stderr)] of the processes, after all have ended."""
  try:
    outputs = [run.communicate(timeout=seconds) for run in runs]
  finally:
    for run in runs:
      run.kill()
  return [
    (run.returncode, *output) for run, output in zip(runs, outputs, strict=True)
  ]


def losses(folder):
  """{(step, split): loss} of a run. No line may occur twice."""
  lines = metrics.read(folder)
  found = {(line["step"], line["split"]): line["loss"] for line in lines}
  assert len(found) == len(lines)
  return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The losses of the run in one process."""
  folder = tmp_path_factory.mktemp("runs") / "alone"
  [(status, _, error)] = finished([start(folder)])
  assert status == 0, error
  return losses(folder)


def test_one_is_killed_the_others_end_and_the_same_commands_go_on(
  tmp_path, alone
):
  runs = start_all(tmp_path, 2)
  checkpoint, deadline = tmp_path / "checkpoints" / "40", time.time() + 120
  while not checkpoint.is_dir():
    assert time.time() < deadline
    assert [run.poll() for run in runs] == [None, None]
    time.sleep(0.02)
  runs[1].send_signal(signal.SIGKILL)
  clock = time.time()
  (status, _, error), _ = finished(runs, 60)
  assert time.time() - clock < 60
  assert status == 1
  assert re.search("process 0 of 2 cannot go on.* same commands resume", error)
  assert "Traceback" not in error
  assert not (tmp_path / "DONE.json").exists()

  first, second = finished(start_all(tmp_path, 2))
  assert (first[0], second[0]) == (0, 0), first[2] + second[2]
  assert "resumed from step" in first[1]
  assert "process 0 of 2, with 1 of 2 devices" in first[1]
  assert "step" not in second[1]  # only one process writes the log
  assert losses(tmp_path) == pytest.approx(alone, rel=1e-5)


def test_sigterm_to_one_stops_all_at_the_same_step(tmp_path, request):
  if not request.config.getoption("--all-meshes"):
    pytest.skip("--all-meshes runs it")
  runs = start_all(tmp_path, 2)
  while not (tmp_path / "checkpoints" / "40").is_dir():
    assert [run.poll() for run in runs] == [None, None]
    time.sleep(0.02)
  os.kill(runs[1].pid, signal.SIGTERM)
  (first, output, _), (second, *_) = finished(runs)
  assert (first, second) == (130, 130)
  assert "the same command resumes it" in output


def test_four_processes_equal_one(tmp_path, alone, request):
  if not request.config.getoption("--all-meshes"):
    pytest.skip("--all-meshes runs it")
  results = finished(start_all(tmp_path, 4))
  assert [status for status, *_ in results] == [0] * 4, results[0][2]
  assert losses(tmp_path) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
  "arguments",
  [
    ("127.0.0.1:80",),
    ("127.0.0.1:80", 2),
    ("auto", 2, 0),
    (None, 2, 0),
    ("127.0.0.1:80", 2, 2),
  ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments):
  with pytest.raises(ValueError, match="--coordinator=.*; .*--process|give"):
    process.join(*arguments)


def test_no_cluster_is_an_error_that_says_so():
  run = subprocess.run(
    [
      sys.executable, "train.py", "--coordinator=auto",
      "--config=configs/vit_sigmoid.py:runlocal",
    ],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert run.returncode == 1
  assert "train.py: --coordinator=auto" in run.stderr
  assert "Traceback" not in run.stderr
