"""A run's folder: its config, whether it is finished, and where runs lie.

config.json   the whole config, as the run was started, and FORMAT
metrics.jsonl a line of metrics each config.log.every_steps and evaluation
checkpoints/  by Orbax
DONE.json     the last evaluation, written when the run is complete
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Counts changes of the config's keys and of the parameters' paths, so that a
# run of an older kind is refused by name, not by a missing key.
FORMAT = 2

# What a rerun may change and still be the same run.
_CHANGEABLE = (
  "total_steps",
  "optim.warmup_steps",  # follows total_steps
  "eval.",
  "ckpt.",
  "log.",
  "telemetry.",
  "data.num_workers",
  "attn.implementation",
)


def flatten(config: ConfigDict) -> dict[str, Any]:
  """{"attn.kind": "sigmoid", ...}, as JSON would give it back."""
  flat = {}

  def visit(tree, prefix):
    for key, value in tree.items():
      if isinstance(value, dict):
        visit(value, f"{prefix}{key}.")
      else:
        flat[prefix + key] = value

  visit(json.loads(json.dumps(config.to_dict())), "")
  return flat


def prepare(workdir: str | os.PathLike[str], config: ConfigDict) -> None:
  """Makes the folder, or checks that the run in it is this config's.

  Raises ValueError naming the first key that differs, or the reason why the
  folder cannot be written.
  """
  path = pathlib.Path(workdir) / "config.json"
  if path.exists():
    _compare(workdir, flatten(read_config(workdir)), flatten(config))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": FORMAT, "config": config.to_dict()})
  except OSError as error:
    raise ValueError(
      f"{workdir=} cannot be written: {error.strerror}"
    ) from error


def _compare(workdir, old, new):
  for key in sorted(old.keys() | new.keys()):
    if key.startswith(_CHANGEABLE) or old.get(key) == new.get(key):
      continue
    raise ValueError(
      f"{workdir=} holds a run with config.{key}={old.get(key)!r}, this one "
      f"has {new.get(key)!r}; choose another workdir, or delete that one"
    )


def read_config(workdir: str | os.PathLike[str]) -> ConfigDict:
  """The config of the run in `workdir`; ValueError where there is none."""
  path = pathlib.Path(workdir) / "config.json"
  try:
    text = path.read_text()
  except OSError as error:
    raise ValueError(
      f"{workdir=}: no run here ({path.name}: {error.strerror})"
    ) from error
  contents = json.loads(text)
  validate_format(contents.get("format", 1), workdir)
  return ConfigDict(contents["config"]).lock()


def validate_format(number: int, workdir: str | os.PathLike[str]) -> None:
  """ValueError unless a run, or its checkpoint, is of this version's format."""
  if number != FORMAT:
    raise ValueError(
      f"{workdir=}: holds a run of format {number}, this version reads format "
      f"{FORMAT}; train it again in another workdir, or use the version of "
      "sigattn that trained it"
    )


def write_json(path: str | os.PathLike[str], value: object) -> None:
  """Writes the whole file or none of it: a kill leaves no half."""
  partial = pathlib.Path(f"{path}.partial")
  partial.write_text(json.dumps(value, indent=2) + "\n")
  os.replace(partial, path)


def done(workdir: str | os.PathLike[str] | None, total_steps: int) -> bool:
  """Whether the run in `workdir` has reached total_steps and its last word."""
  if workdir is None:
    return False
  path = pathlib.Path(workdir) / "DONE.json"
  return path.exists() and json.loads(path.read_text())["step"] >= total_steps


def write_done(
  workdir: str | os.PathLike[str] | None, metrics: Mapping[str, float]
) -> None:
  if workdir is not None:
    write_json(pathlib.Path(workdir) / "DONE.json", metrics)


def name(overrides: Mapping[str, object]) -> str:
  """{"optim.lr": 1e-3, "seed": 0} -> "optim.lr=0.001,seed=0"."""
  values = ",".join(f"{key}={value}" for key, value in overrides.items())
  return values.replace("/", "-") or "default"


def default(
  config_file: str | os.PathLike[str], overrides: Mapping[str, object]
) -> str:
  """runs/<config>/<key=value,...>: one folder for each command.

  The same command finds its run again; another override gets its own folder.
  config_file: configs/vit.py:imagenet, say. overrides: {"optim.lr": 1e-3}.
  """
  file, _, arg = str(config_file).partition(":")
  config = pathlib.Path(file).stem + (f":{arg}" if arg else "")
  return os.path.join("runs", config.replace("/", "-"), name(overrides))
