"""Reads a run's folder `checkpoints` without Orbax.

Orbax expects that every file is whole. This module finds out which ones are.
"""

import contextlib
import json
import os
import pathlib
from typing import Any

from sigattn.training import files, metrics

# Where Orbax saves the item "config", which is JSON.
_CONFIG = "config/metadata"
_LOG = "log/metadata"


def steps(workdir: str | os.PathLike[str] | None) -> list[int]:
  """The steps for which the run has a checkpoint, whole or not, in order.

  The list is empty if `workdir` is None.
  """
  if workdir is None:
    return []
  folder = pathlib.Path(workdir) / "checkpoints"
  names = [x.name for x in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


def folder(workdir: str | os.PathLike[str], step: int) -> pathlib.Path:
  """The folder of a checkpoint."""
  return pathlib.Path(workdir) / "checkpoints" / str(step)


def metadata(path: pathlib.Path) -> dict[str, Any]:
  """The custom metadata that `Checkpoints.save` wrote into the folder `path`.

  Raises ValueError if they are unreadable.
  """
  try:
    content = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())
    return dict(content["custom_metadata"] or {})
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError("_CHECKPOINT_METADATA is unreadable") from error


def damage(workdir: str | os.PathLike[str], step: int) -> str:
  """Why the checkpoint cannot be used, as text; empty if it can.

  Files that training does not need may be damaged: metrics, and the copy of the
  config.
  """
  return files.damage(
    folder(workdir, step),
    lambda file: not file.startswith(("metrics/", "config/")),
  )


def newest_whole(
  workdir: str | os.PathLike[str],
) -> tuple[int | None, dict[int, str]]:
  """(the newest whole step, {newer step: its damage}).

  (None, {}) if there is no checkpoint. Raises ValueError if all are damaged.
  """
  damaged = {}
  for step in reversed(steps(workdir)):
    why = damage(workdir, step)
    if not why:
      return step, damaged
    damaged[step] = why
  if damaged:
    reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
    raise ValueError(
      f"workdir={str(workdir)!r}: all checkpoints are damaged ({reasons}). "
      "Restore these files from a copy, or delete the folder to begin again"
    )
  return None, {}


def move_aside(workdir: str | os.PathLike[str], step: int) -> pathlib.Path:
  """Moves a checkpoint to the run's folder `damaged`; returns the new path."""
  place = pathlib.Path(workdir) / "damaged" / str(step)
  place.parent.mkdir(exist_ok=True)
  count = 1
  while place.exists():
    count += 1
    place = place.with_name(f"{step}_{count}")
  return folder(workdir, step).rename(place)


def results(workdir: str | os.PathLike[str], step: int) -> dict[str, float]:
  """The evaluation in a checkpoint; empty if there is none or it is damaged."""
  path = folder(workdir, step)
  try:
    if why := files.damage(path, lambda file: file == "metrics/metrics"):
      raise ValueError(why)
    found = json.loads((path / "metrics" / "metrics").read_bytes())
    return {name: float(value) for name, value in found.items()}
  except (OSError, ValueError, TypeError, AttributeError) as error:
    metrics.log(f"the metrics of checkpoint {step} are not used: {error}")
    return {}


def log_state(workdir: str | os.PathLike[str], step: int) -> dict[str, Any]:
  """The state of the StepLog in a whole checkpoint."""
  return json.loads((folder(workdir, step) / _LOG).read_bytes())


def config(
  workdir: str | os.PathLike[str],
) -> tuple[dict[str, Any] | None, pathlib.Path | None]:
  """(the contents of config.json, the path of the copy that was read).

  It reads the newest copy that is not damaged; (None, None) if there is none.
  """
  for step in reversed(steps(workdir)):
    path = folder(workdir, step) / _CONFIG
    if not files.damage(folder(workdir, step), lambda file: file == _CONFIG):
      with contextlib.suppress(OSError, ValueError):
        return read_config(path), path
  return None, None


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """The contents of a config.json. Raises OSError or ValueError for damage."""
  contents = json.loads(path.read_bytes())
  if not isinstance(contents, dict):
    raise ValueError("not a JSON object")
  if not contents:
    raise ValueError("it is empty")
  if "format" not in contents:
    raise ValueError("it has no format, so it is not that of a run")
  if not isinstance(contents.get("config"), dict):
    raise ValueError("it has no config")
  return contents
