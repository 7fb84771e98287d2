"""The folder of a run: its name, its config, and whether the run is finished.

config.json    the whole config that the run was started with, and FORMAT
metrics.jsonl  a line of metrics for every config.log.every_steps steps and for
               every evaluation
checkpoints/   written by Orbax
DONE.json      the last evaluation, written when the run is complete
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Increased whenever config keys or parameter paths change, so that a run of an
# older version is refused with a clear message instead of a missing key.
FORMAT = 2

# Config keys, or their prefixes, that may change when a run is resumed.
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
  """The config as one dict, {"attn.kind": "sigmoid", ...}.

  Values are as JSON returns them: tuples become lists.
  """
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
  """Creates the folder and writes config.json.

  If the folder already has a run, its config may differ only in values that
  may change when a run is resumed, such as total_steps. Raises ValueError that
  names the first key that differs, or the reason why the folder cannot be
  written.
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
  """Reads the config of a run, locked.

  Raises ValueError if there is no run in `workdir`, or one of another format.
  """
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
  """Raises ValueError if a run or checkpoint has another format than FORMAT."""
  if number != FORMAT:
    raise ValueError(
      f"{workdir=}: holds a run of format {number}, this version reads format "
      f"{FORMAT}; train it again in another workdir, or use the version of "
      "sigattn that trained it"
    )


def write_json(path: str | os.PathLike[str], value: object) -> None:
  """Writes a JSON file atomically: a kill never leaves half a file."""
  partial = pathlib.Path(f"{path}.partial")
  partial.write_text(json.dumps(value, indent=2) + "\n")
  os.replace(partial, path)


def done(workdir: str | os.PathLike[str] | None, total_steps: int) -> bool:
  """Whether the run has completed total_steps and written its last evaluation.

  False for a `workdir` of None.
  """
  if workdir is None:
    return False
  path = pathlib.Path(workdir) / "DONE.json"
  return path.exists() and json.loads(path.read_text())["step"] >= total_steps


def write_done(
  workdir: str | os.PathLike[str] | None, metrics: Mapping[str, float]
) -> None:
  """Marks the run as complete.

  metrics: the last evaluation and its "step". Does nothing for a `workdir` of
  None.
  """
  if workdir is not None:
    write_json(pathlib.Path(workdir) / "DONE.json", metrics)


def name(overrides: Mapping[str, object]) -> str:
  """The name of a run with these config overrides.

  {"optim.lr": 1e-3, "seed": 0} becomes "optim.lr=0.001,seed=0", and {} becomes
  "default".
  """
  values = ",".join(f"{key}={value}" for key, value in overrides.items())
  return values.replace("/", "-") or "default"


def default(
  config_file: str | os.PathLike[str], overrides: Mapping[str, object]
) -> str:
  """The default folder of a run: runs/<config>/<key=value,...>.

  The same command therefore resumes its own run, and other overrides get
  another folder. config_file: for example configs/vit.py:imagenet. overrides:
  for example {"optim.lr": 1e-3}.
  """
  file, _, arg = str(config_file).partition(":")
  config = pathlib.Path(file).stem + (f":{arg}" if arg else "")
  return os.path.join("runs", config.replace("/", "-"), name(overrides))
