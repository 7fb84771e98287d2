"""Trains the runs of a config's sweeps one after the other and compares them.

  python -m sigattn.sweep --config=configs/vit_sigmoid.py --sweep=attn,lr,seed

A sweep is a generator in the config file, beside get_config: sweep_lr yields
{"optim.lr": 1e-3} and so on. Several sweeps are multiplied: every combination
is a run. Each run is a process of train.py with its own folder. Finished runs
are skipped, and interrupted runs are resumed. --config.a.b=value applies to
every run. --dry_run validates everything, and only prints the commands.
"""

import copy
import importlib.util
import itertools
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from sigattn.analysis import report
from sigattn.cli import unknown_field
from sigattn.training import metrics, run_dir

_TRAIN = pathlib.Path(__file__).parent.parent / "train.py"


def deltas(
  config_file: str | os.PathLike[str], names: Sequence[str]
) -> list[dict[str, Any]]:
  """The product of the named sweeps, as a list of flat dicts of overrides.

  Args:
    config_file: for example configs/vit.py:runlocal.
    names: of its sweeps; "lr" is the name of its generator sweep_lr.

  Raises:
    ValueError: for no sweep, an unknown one, or two that set the same key.
  """
  path = str(config_file).partition(":")[0]
  spec = importlib.util.spec_from_file_location("swept_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  prefix = "sweep_"
  known = [n.removeprefix(prefix) for n in dir(module) if n.startswith(prefix)]
  if not names:
    raise ValueError(f"--sweep=; name at least one of {sorted(known)}")
  if unknown := [name for name in names if name not in known]:
    raise ValueError(f"--sweep={unknown[0]!r}; {path} has {sorted(known)}")
  merged = []
  for parts in itertools.product(
    *(list(getattr(module, prefix + name)()) for name in names)
  ):
    keys = [key for part in parts for key in part]
    if len(keys) > len(set(keys)):
      raise ValueError(
        f"--sweep={','.join(names)}: two sweeps set the same key: {keys}"
      )
    merged.append({k: v for part in parts for k, v in part.items()})
  return merged


def command(
  config_file: str | os.PathLike[str],
  overrides: Mapping[str, object],
  workdir: str | os.PathLike[str],
) -> list[str]:
  """The train.py command of one run, as a list of words.

  Raises ValueError where train.py is missing, as in an installed package.
  """
  words = [f"--config.{key}={value}" for key, value in overrides.items()]
  if not _TRAIN.is_file():
    raise ValueError(
      "a sweep runs train.py, which the installed package does not contain; "
      "run the sweep in a checkout of the repository"
    )
  train = os.path.relpath(_TRAIN)
  return [
    sys.executable, train, f"--config={config_file}", *words,
    f"--workdir={workdir}",
  ]  # fmt: skip


def _run_of(config, delta, root):
  """(delta, config, folder) of one run.

  Raises ValueError if the config is wrong, if the folder may not hold the run
  or cannot be written, and if it holds an unfinished run of another config.
  """
  workdir = f"{root}/{run_dir.folder_name(run_dir.name(delta))}"
  run = copy.deepcopy(config)
  try:
    run.update_from_flattened_dict(delta)
  except (KeyError, TypeError) as error:
    raise ValueError(f"sweep {delta}: {error}") from error
  run = run_dir.validated(run, workdir)
  if not run_dir.done(workdir, run.total_steps):
    run_dir.validate_resumable(workdir, run)
    run_dir.validate_writable(workdir)
  return delta, run, workdir


def _validate_flags(overrides, runs, config):
  """Refuses a sweep's field that the config lacks or that a flag sets."""
  for path in dict.fromkeys(key for delta in runs for key in delta):
    if why := unknown_field(config, path):
      raise ValueError(f"the sweep sets config.{path}: {why}")
    if path in overrides:
      raise ValueError(
        f"--config.{path}={overrides[path]}; the sweep sets this field itself: "
        "leave the flag out"
      )


def _run_process(words):
  """Runs a process: its exit code, and whether it or this one was stopped.

  Ctrl-C reaches both. SIGTERM may reach only this one, which passes it on. The
  run then saves its state and ends with 130; see process.stop_signals.
  """
  process, stopped = subprocess.Popen(words), False

  def pass_on(number, _):
    nonlocal stopped
    stopped = True
    if number == signal.SIGTERM:
      process.terminate()

  numbers = (signal.SIGINT, signal.SIGTERM)
  old = {number: signal.signal(number, pass_on) for number in numbers}
  try:
    code = process.wait()
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
  return code, stopped or code == 130


def define_flags() -> None:
  """Defines the flags of `python -m sigattn sweep`, except --config."""
  flags.DEFINE_list(
    "sweep", None, "Sweeps of the config file, for example attn,lr,seed."
  )
  flags.DEFINE_string(
    "root", None, "The folder for the runs; by default in runs/."
  )
  flags.DEFINE_bool(
    "dry_run", False, "Print the commands without running them."
  )
  flags.mark_flag_as_required("sweep")


def run(flag_values: flags.FlagValues) -> None:
  """Trains every run of the sweeps and prints a table that compares them.

  All configs and folders are validated before the first run starts.
  """
  metrics.set_up_logs()
  flag = flag_values["config"]
  file, config = flag.config_filename, flag_values.config
  runs = deltas(file, flag_values.sweep)
  _validate_flags(flag.override_values, runs, config)
  root = flag_values.root
  if root is None:
    root = run_dir.default(file, flag.override_values)
  if not root or pathlib.Path(root).is_file():
    raise ValueError(f"--root={root}; must be a folder, in which the runs are")
  runs = [_run_of(config, delta, root) for delta in runs]
  failed = []
  for index, (delta, run_config, workdir) in enumerate(runs, 1):
    words = command(file, flag.override_values | delta, workdir)
    if flag_values.dry_run:
      print(shlex.join(words))
      continue
    if run_dir.done(workdir, run_config.total_steps):
      metrics.log(f"run {index}/{len(runs)}: {workdir} is finished")
      continue
    metrics.log(f"run {index}/{len(runs)}: {shlex.join(words)}")
    code, stopped = _run_process(words)
    if stopped:
      done = [run_dir.done(folder, x.total_steps) for _, x, folder in runs]
      metrics.log(
        f"the sweep has stopped: {sum(done)} of {len(runs)} runs are finished; "
        "the same command goes on with the others"
      )
      sys.exit(130)
    if code:
      failed.append(workdir)
  if not flag_values.dry_run:
    report.sweep([(delta, workdir) for delta, _, workdir in runs], root, config)
  if failed:
    sys.exit(f"these runs failed and are not in the table: {failed}")


if __name__ == "__main__":
  from sigattn import cli

  cli.main([sys.argv[0], "sweep", *sys.argv[1:]])
