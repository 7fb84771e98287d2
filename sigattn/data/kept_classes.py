"""The names of the classes, which a run keeps in its folder as classes.json.

It is a list, in which a class has the place of its number: classes[2] names the
images for which the third logit is the largest. Sources whose labels are plain
numbers have no names, and then there is no file.
"""

import json
import os
import pathlib

from ml_collections import ConfigDict

from sigattn.data import image

FILE = "classes.json"
_SHOWN = 5  # names that an error shows


def write(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
  """Writes the names of the classes into the folder of a run that begins."""
  if (names := image.class_names(config)) is not None:
    text = json.dumps(names, ensure_ascii=False, indent=2) + "\n"
    (pathlib.Path(workdir) / FILE).write_text(text, encoding="utf-8")


def read(workdir: str | os.PathLike[str]) -> list[str] | None:
  """The names of a run's classes; None if it has none or the file is lost."""
  try:
    names = json.loads((pathlib.Path(workdir) / FILE).read_bytes())
  except (OSError, ValueError):
    return None
  return [str(x) for x in names] if isinstance(names, list) else None


def used(config: ConfigDict, workdir: str | os.PathLike[str]) -> ConfigDict:
  """The config itself, because the names are no part of it."""
  del workdir
  return config


resumed = used


def difference(config: ConfigDict, workdir: str | os.PathLike[str]) -> str:
  """How the classes of the config's data differ from the run's; "" if equal."""
  theirs = read(workdir)
  ours = None if theirs is None else image.class_names(config)
  if ours == theirs:
    return ""
  return (
    f"config.data.source={config.data.source!r}; {_what_differs(ours, theirs)} "
    f"{pathlib.Path(workdir) / FILE}, the classes of the run. If classes were "
    "renamed, give them their old names"
  )


def _what_differs(ours, theirs):
  if ours is None:
    return "its classes have no names, unlike those in"
  parts = (
    ("lacks", [x for x in theirs if x not in ours]),
    ("has in addition", [x for x in ours if x not in theirs]),
  )
  said = [f"{word} {_shown(names)}" for word, names in parts if names]
  if not said:
    return "has its classes in another order than"
  return " and ".join(said) + ", compared with"


def _shown(names):
  shown = ", ".join(map(repr, names[:_SHOWN]))
  return shown + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
