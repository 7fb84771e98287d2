"""Runs a config's sweeps, one after the other, and compares the runs.

  python -m sigattn.sweep --config=configs/vit_sigmoid.py --sweep=attn,lr,seed

A sweep is a generator beside get_config: sweep_lr yields {"optim.lr": 1e-3}
and so on. Several multiply. Each run is a train.py of its own in its own
folder; finished runs are skipped, killed ones resumed. --config.a.b=value
holds for every run; --dry_run prints the commands.
"""

import copy
import importlib.util
import itertools
import os
import pathlib
import shlex
import subprocess
import sys

from absl import app, flags
from ml_collections import config_flags

from sigattn import metrics, report, tasks, workdirs

_TRAIN = pathlib.Path(__file__).parent.parent / "train.py"


def deltas(config_file, names):
  """The product of the config file's sweeps, as a list of flat dicts.

  Raises ValueError for an unknown sweep, or two that set the same key.
  """
  path = str(config_file).partition(":")[0]
  spec = importlib.util.spec_from_file_location("swept_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  prefix = "sweep_"
  known = [n.removeprefix(prefix) for n in dir(module) if n.startswith(prefix)]
  if unknown := [name for name in names if name not in known]:
    raise ValueError(f"--sweep={unknown[0]!r}; {path} has {sorted(known)}")
  merged = []
  for parts in itertools.product(
    *(list(getattr(module, prefix + name)()) for name in names)
  ):
    keys = [key for part in parts for key in part]
    if len(keys) > len(set(keys)):
      raise ValueError(f"--sweep={','.join(names)}: two set one key: {keys}")
    merged.append({k: v for part in parts for k, v in part.items()})
  return merged


def command(config_file, overrides, workdir):
  """The train.py command of one run, as a list of words."""
  words = [f"--config.{key}={value}" for key, value in overrides.items()]
  train = os.path.relpath(_TRAIN)
  return [
    sys.executable, train, f"--config={config_file}", *words,
    f"--workdir={workdir}",
  ]  # fmt: skip


def _configured(config, delta):
  """The config of one run; ValueError before any run where it is wrong."""
  run = copy.deepcopy(config)
  try:
    run.update_from_flattened_dict(delta)
  except (KeyError, TypeError) as error:
    raise ValueError(f"sweep {delta}: {error}") from error
  tasks.check(run)
  return run


def main(argv):
  if argv[1:]:
    raise app.UsageError(f"not understood: {argv[1:]}")
  metrics.set_up_logs()
  flag = flags.FLAGS["config"]
  file, config = flag.config_filename, flags.FLAGS.config
  root = flags.FLAGS.root or workdirs.default(file, flag.override_values)
  try:
    runs = [
      (delta, _configured(config, delta), f"{root}/{workdirs.name(delta)}")
      for delta in deltas(file, flags.FLAGS.sweep)
    ]
  except ValueError as error:
    sys.exit(f"sigattn.sweep: {error}")
  failed = []
  for index, (delta, run, workdir) in enumerate(runs, 1):
    words = command(file, flag.override_values | delta, workdir)
    if flags.FLAGS.dry_run:
      print(shlex.join(words))
      continue
    if workdirs.done(workdir, run.total_steps):
      metrics.log(f"run {index}/{len(runs)}: {workdir} is finished")
      continue
    metrics.log(f"run {index}/{len(runs)}: {shlex.join(words)}")
    code = subprocess.run(words, check=False).returncode
    if code == 130:  # Ctrl-C reached the run, which has saved its state.
      sys.exit(code)
    if code:
      failed.append(workdir)
  if not flags.FLAGS.dry_run:
    report.sweep([(delta, workdir) for delta, _, workdir in runs], root, config)
  if failed:
    sys.exit(f"failed, and left out of the table: {failed}")


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "configs/vit_sigmoid.py, say.", lock_config=True
  )
  flags.DEFINE_list("sweep", None, "Sweeps of the config file: attn,lr,seed.")
  flags.DEFINE_string("root", None, "Holds the runs; by default below runs/.")
  flags.DEFINE_bool("dry_run", False, "Print the commands, run nothing.")
  flags.mark_flags_as_required(["config", "sweep"])
  app.run(main)
