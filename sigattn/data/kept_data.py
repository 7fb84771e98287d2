"""The checksums of its data that a run keeps in its folder, as data.json.

  {"source": {"files": 40, "bytes": 1080, "sha256": "5f3a...",
              "each": {"0.txt": [27, "9c1d..."], ...}}}

A key is one of config.data that names a source: source, eval_source, or
mixture[0] and so on. `each` has the size of each file and the SHA-256 of its
contents, and is left out for more than 1,000 files. `sha256` is that of all
names, sizes and contents. Names are relative to the source, so that it may be
moved.

Of the contents, only the first 256 MiB of a source are read, its files being
sorted by name; what changes behind them without a change of size is not
noticed. Embedded data and data sets of the Hub have no checksum.
"""

import hashlib
import json
import os
import pathlib
import types
from collections.abc import Iterable

from absl import logging
from ml_collections import ConfigDict

from sigattn.data import hub

FILE = "data.json"
# The keys of a flat config whose values `difference` compares.
KEYS = ("data.source", "data.eval_source", "data.mixture")
_MOST_HASHED = 2**28  # bytes of a source
_MOST_LISTED = 1000  # files of a source
_SHOWN = 3  # names of files that an error names
_CHUNK = 2**20


def names(config: ConfigDict) -> dict[str, str]:
  """{key of config.data: the name of a source}, for all that a run reads."""
  data = config.data
  found = {key: data.get(key) for key in ("source", "eval_source")}
  for i, (name, _) in enumerate(data.get("mixture", ())):
    found[f"mixture[{i}]"] = name
  return {key: name for key, name in found.items() if name}


def evaluated_key(config: ConfigDict, split: str | None = None) -> str:
  """The key of `names` whose source is evaluated.

  split: what is evaluated, by default config.data.eval_split. The split that a
  run trains on is that of config.data.source.
  """
  data = config.data
  if not data.get("eval_source"):
    return "source"
  is_trained_on = split == data.train_split != data.eval_split
  return "source" if is_trained_on and not data.mixture else "eval_source"


def write(
  source: types.ModuleType,
  config: ConfigDict,
  workdir: str | os.PathLike[str],
) -> None:
  """Writes data.json into the folder of a run that begins.

  source: the module that reads the config's data, see sigattn/data/loader.py.
  Raises ValueError for a file that cannot be read.
  """
  checksums = {
    key: _checksum(source, name, key)
    for key, name in names(config).items()
    if _is_local(source, name, key)
  }
  text = json.dumps(checksums, indent=2) + "\n"
  (pathlib.Path(workdir) / FILE).write_text(text, encoding="utf-8")


def may_be(source: types.ModuleType, name: str) -> bool:
  """Whether `name` is an embedded or local source, or has the form of a Hub's.

  source: as in `write`.
  """
  return (
    name in getattr(source, "EMBEDDED", ())
    or hub.local(name).exists()
    or hub.is_hub_name(name)
  )


def _is_local(source, name, key):
  if name in getattr(source, "EMBEDDED", ()):
    return False
  return hub.local(name, key).exists()


def _checksum(source, name, key):
  """The checksum of a local source, a value of data.json."""
  base = hub.local(name, key).resolve()
  base = base if base.is_dir() else base.parent
  each, rest = {}, _MOST_HASHED
  try:
    for path in sorted(getattr(source, "files", hub.files)(name, key)):
      size = path.stat().st_size
      hashed = _hash(path, min(size, rest))
      each[path.relative_to(base).as_posix()] = [size, hashed]
      rest = max(rest - size, 0)
  except OSError as error:
    raise ValueError(
      f"config.data.{key}={name!r}: cannot be read: {error}"
    ) from error
  found = {
    "files": len(each),
    "bytes": sum(size for size, _ in each.values()),
    "sha256": hashlib.sha256(json.dumps(each).encode()).hexdigest(),
  }
  return found | ({"each": each} if len(each) <= _MOST_LISTED else {})


def _hash(path, count):
  """The SHA-256 of the first `count` bytes of a file; "" for none."""
  if not count:
    return ""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while count and (chunk := file.read(min(count, _CHUNK))):
      digest.update(chunk)
      count -= len(chunk)
  return digest.hexdigest()


def damage(workdir: str | os.PathLike[str]) -> str:
  """Why a run's data.json cannot be read; "" if it can."""
  return _read(workdir)[1]


def _read(workdir):
  """(the contents of a run's data.json, why they cannot be read or "")."""
  try:
    kept = json.loads((pathlib.Path(workdir) / FILE).read_bytes())
    _ = [(x["files"], x["bytes"], x["sha256"]) for x in kept.values()]
  except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
    return {}, getattr(error, "strerror", None) or f"unreadable: {error}"
  return kept, ""


def missing(
  source: types.ModuleType, config: ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, str]:
  """The `names` of local sources of a run that are no longer where they were.

  source: as in `write`. Without data.json there is none.
  """
  kept, _ = _read(workdir)
  return {
    key: name
    for key, name in names(config).items()
    if key in kept and not _is_local(source, name, key)
  }


def difference(
  source: types.ModuleType,
  config: ConfigDict,
  old: ConfigDict,
  workdir: str | os.PathLike[str],
  only: str | None = None,
) -> str:
  """How the data of `config` differ from those of the run in the folder.

  "" if they do not differ. A source may have another name if its files are the
  same. If data.json is lost or damaged, only the names are compared, and a
  warning says so. source: as in `write`. old: the config of the run. only: a
  key of `names`, if the other sources do not matter. Raises ValueError for a
  file that cannot be read.
  """
  ours, theirs = names(config), names(old)
  if ours.keys() != theirs.keys() or _shares(config) != _shares(old):
    [key] = [x for x in KEYS if _flat(config, x) != _flat(old, x)][:1]
    return _other_name(key, _flat(old, key), _flat(config, key))
  kept, why_not = _read(workdir)
  if why_not and any(
    _is_local(source, name, key) for key, name in ours.items()
  ):
    logging.warning(
      "%s: %s; whether the data are those that the run began with is not known",
      pathlib.Path(workdir) / FILE, why_not,
    )  # fmt: skip
  for key in ours if only is None else ours.keys() & {only}:
    name = ours[key]
    if key not in kept or not _is_local(source, name, key):
      if not _same_place(name, theirs[key], key):
        return _other_name(f"data.{key}", theirs[key], name)
    elif why := _changed(source, name, key, kept[key]):
      return why
  return ""


def files_of_run(
  source: types.ModuleType,
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  key: str,
) -> list[str]:
  """The files of a source that have the contents of one of the run's.

  source: as in `write`. config: names the source. key: that of `names`. Empty
  if the run keeps no checksum of each file.
  """
  kept, name = _read(workdir)[0].get(key), names(config)[key]
  if kept is None or not _is_local(source, name, key):
    return []
  theirs = {hashed for _, hashed in kept.get("each", {}).values() if hashed}
  found = _checksum(source, name, key).get("each", {})
  return [x for x, (size, hashed) in found.items() if size and hashed in theirs]


def _shares(config):
  return [share for _, share in config.data.get("mixture", ())]


def _flat(config, key):
  value = config.data.get(key.removeprefix("data."))
  return [list(x) for x in value] if key == "data.mixture" and value else value


def _other_name(key, old, new):
  return f"the run was trained with config.{key}={old!r}, not with {new!r}"


def _same_place(ours, theirs, key):
  """Whether two names of a source are one, or spell the same path."""
  if ours == theirs:
    return True
  paths = [hub.local(name, key) for name in (ours, theirs)]
  return paths[0].exists() and paths[0].resolve() == paths[1].resolve()


def _changed(source, name, key, kept):
  """How a local source differs from the checksum that was kept; "" if equal."""
  found = _checksum(source, name, key)
  if found["sha256"] == kept["sha256"]:
    return ""
  return (
    f"config.data.{key}={name!r} is not what the run began with: "
    f"{_what_differs(found, kept)}"
  )


def _what_differs(found, kept):
  ours, theirs = found.get("each"), kept.get("each")
  if ours is None or not isinstance(theirs, dict):
    sizes = [f"{x['files']} files of {x['bytes']} bytes" for x in (found, kept)]
    return (
      f"it holds {sizes[0]}, where {sizes[1]} were; names, sizes or contents "
      "have changed"
    )
  both = ours.keys() & theirs.keys()
  parts = (
    ("changed", [x for x in both if ours[x] != theirs[x]]),
    ("missing", theirs.keys() - both),
    ("new", ours.keys() - both),
  )
  return ", ".join(
    f"{len(files)} {word} ({shown(files)})" for word, files in parts if files
  )


def shown(files: Iterable[str]) -> str:
  """The first few names of files, for a message."""
  shown = ", ".join(map(repr, sorted(files)[:_SHOWN]))
  return shown + ", ..." * (len(files) > _SHOWN)


def moved(
  config: ConfigDict, place: str, split: str | None = None
) -> ConfigDict:
  """The config with the evaluated source at another place, locked.

  A source that is both trained on and evaluated keeps its held-out part. place:
  the new name of the source. split: as in evaluated_key. Raises ValueError for
  a task without data.
  """
  key = evaluated_key(config, split)
  if key not in names(config):
    raise ValueError(
      f"source={place!r}; must be left out: the task {config.task!r} reads no "
      "data"
    )
  old = names(config)[key]
  config = config.copy_and_resolve_references().unlock()
  data = config.data
  for key in ("source", "eval_source"):
    if data.get(key) == old:
      data[key] = place
  if data.get("mixture"):
    data.mixture = tuple(
      (place if name == old else name, share) for name, share in data.mixture
    )
  return config.lock()
