"""The folder of a run: its name, its config, and whether the run is complete.

config.json    the whole config that the run was started with, and FORMAT
data.json      the checksums of the data, see sigattn.data.kept_data
tokenizer.json the tokenizer of a language model, see
               sigattn.data.kept_tokenizer
classes.json   the names of the classes of images, if they have names, see
               sigattn.data.kept_classes
metrics.jsonl  a line of metrics for every config.log.every_steps steps and for
               every evaluation
checkpoints/   written by Orbax
non_finite.json
               the steps whose loss or gradient was not finite, if there are any
DONE.json      the last evaluation, written when the run is complete
lock           locked by the process that trains; lock.json names that process
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import pathlib
import re
import socket
import tempfile
import types
from collections.abc import Mapping
from typing import Any, Self

import filelock
import jax
from absl import logging
from ml_collections import ConfigDict

from sigattn import tasks
from sigattn.data import hub, kept_data, kept_tokenizer
from sigattn.training import files, metrics, saved, setup

# FORMAT increases whenever config keys, parameter paths or the files that a run
# needs change. A run of an older version is then refused with a clear message,
# not with a missing key.
FORMAT = 5

# Config keys, or their prefixes, that may change when a run is resumed.
_CHANGEABLE = (
  "total_steps",
  "optim.warmup_steps",  # follows total_steps
  "optim.non_finite",
  "optim.max_skipped",
  "eval.",
  "ckpt.",
  "log.",
  "telemetry.",
  "data.num_workers",
  "attn.implementation",
  "model.remat",
  "model.max_unrolled",
  "model.loss_chunks",
  "mesh.",
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


class RunDir:
  """The folder of a run that trains; one process at a time may use it.

  It is a context manager. On entry it refuses a folder that cannot belong to
  the run. It writes nothing until `begin`, so that a failed start leaves
  nothing behind. If `workdir` is None, it does nothing.
  """

  def __init__(
    self, workdir: str | os.PathLike[str] | None, config: ConfigDict
  ) -> None:
    self._workdir, self._config = workdir, config
    self._lock = None

  def __enter__(self) -> Self:
    """Validates the place and the run in the folder, and that it is not locked.

    Raises ValueError for a place that validate_place refuses, a folder with a
    run of another config, and a folder in which another process trains.
    """
    if self._workdir is None:
      return self
    validate_place(self._workdir, self._config)
    try:
      if (pathlib.Path(self._workdir) / "lock").exists():
        self._take()
      validate_resumable(self._workdir, self._config)
    except BaseException:
      self._release()
      raise
    return self

  def begin(self) -> None:
    """Creates the folder and writes what the task keeps, then config.json.

    Raises ValueError as __enter__ does, and if the folder cannot be written.
    """
    if self._workdir is None:
      return
    folder = pathlib.Path(self._workdir)
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise _not_writable(folder, error) from error
    if self._lock is None:  # another process may have started since __enter__
      self._take()
      validate_resumable(folder, self._config)
    if jax.process_index():
      return  # the first process writes it
    try:
      if not _holds_run(folder):
        _remove_start(folder, self._config)
        _write_kept(self._config, folder)
      elif kept_data.damage(folder):
        kept_data.write(_source(self._config), self._config, folder)
      files.write_json(folder / "config.json", contents(self._config))
    except OSError as error:
      raise _not_writable(folder, error) from error

  def _take(self):
    """Locks the folder. In a run of several processes only the first does so.

    The system unlocks the folder when the process ends, however it ends. The
    file stays, because processes that wait for the lock have it open.
    """
    if self._lock is not None or jax.process_index():
      return
    folder = pathlib.Path(self._workdir)
    lock = filelock.FileLock(folder / "lock", timeout=_SECONDS_FOR_A_LOCK)
    start = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": start}
    try:
      lock.acquire()
      self._lock = lock
      files.write_json(folder / "lock.json", owner)
    except filelock.Timeout:
      raise ValueError(_locked(folder)) from None
    except OSError as error:
      raise _not_writable(folder, error) from error

  def _release(self):
    if self._lock is not None:
      with contextlib.suppress(OSError):  # the folder may be gone
        (pathlib.Path(self._workdir) / "lock.json").unlink()
      self._lock.release()
      self._lock = None

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    """Unlocks the folder. Raises OSError, with advice, for a full disk."""
    self._release()
    code = error.errno if isinstance(error, OSError) else None
    if self._workdir is not None and code in _FULL:
      raise _full(error, self._workdir) from error


# The workers of a killed process may hold its lock for a moment longer.
_SECONDS_FOR_A_LOCK = 2


_FULL = {
  errno.ENOSPC: "the disk is full",
  errno.EDQUOT: "the user's quota of the disk is used up",
}


def _full(error, workdir):
  """The error of a full disk: what was not written, and how the run goes on."""
  path = pathlib.Path(error.filename or workdir)
  what = "a checkpoint" if path.name == "checkpoints" else "this"
  steps = saved.steps(workdir)
  start = f"step {steps[-1]}, the last checkpoint" if steps else "the start"
  advice = (
    f"{os.strerror(error.errno)}: {what} was not written, because "
    f"{_FULL[error.errno]}. Make room; the same command then goes on from "
    f"{start}"
  )
  return OSError(error.errno, advice, str(path))


def _not_writable(folder, error):
  return ValueError(
    f"workdir={str(folder)!r} cannot be written: {error.strerror}"
  )


def _locked(folder):
  """The error message for a folder that another process has locked."""
  try:
    owner = json.loads((folder / "lock.json").read_text())
    who = "process {pid} on {host}, since {start}".format(**owner)
  except (OSError, ValueError, KeyError, TypeError):
    who = "another process"
  return (
    f"workdir={str(folder)!r} is in use: {who}, trains in it. End that one or "
    f"choose another workdir; if its host is gone, delete {folder / 'lock'}"
  )


def validate_path(workdir: str | os.PathLike[str]) -> None:
  """Raises ValueError for a path that Orbax would save to but not restore from.

  Orbax treats the whole path of a checkpoint as a pattern of file names.
  """
  if not os.fspath(workdir):
    raise ValueError("workdir=''; must be a folder, or None to write nothing")
  path = str(pathlib.Path(workdir).absolute().resolve())
  if bad := re.search(r"[][*?\\\x00-\x1f\x7f\ud800-\udfff]", path):
    reason = f"contains {bad.group()!r}"
  elif bad := re.search(r"/(\w+:)(/|$)", path):
    reason = f"has a folder {bad.group(1)!r}"
  else:
    return
  raise ValueError(
    f"workdir={str(workdir)!r}: the path {path!r} {reason}, so a checkpoint "
    "below it cannot be restored; choose another one, with none of [ ] * ? \\ "
    "and no folder whose name ends in a colon"
  )


def validate_place(workdir: str | os.PathLike[str], config: ConfigDict) -> None:
  """Raises ValueError if no run of this config may be in the folder.

  That is a path that validate_path refuses, a file, and a folder inside of the
  data, because the run would read what it writes.
  """
  validate_path(workdir)
  if pathlib.Path(workdir).is_file():
    raise ValueError(f"workdir={str(workdir)!r}; is a file, not a folder")
  folder = pathlib.Path(workdir).absolute().resolve()
  for key, source in kept_data.names(config).items():
    path = hub.local(source, key)
    if path.is_dir() and folder.is_relative_to(path.resolve()):
      raise ValueError(
        f"workdir={str(workdir)!r}; must not be in config.data.{key}="
        f"{source!r}: the run would read what it writes"
      )


def validate_writable(workdir: str | os.PathLike[str]) -> None:
  """Raises ValueError if nothing can be written in the folder of a run.

  It writes an empty folder, in the folder or the nearest one above that exists,
  and removes it.
  """
  folder = pathlib.Path(workdir).absolute()
  there = next(x for x in (folder, *folder.parents) if x.exists())
  try:
    with tempfile.TemporaryDirectory(dir=there):
      pass
  except OSError as error:
    raise _not_writable(pathlib.Path(workdir), error) from error


def validate_resumable(
  workdir: str | os.PathLike[str], config: ConfigDict
) -> None:
  """Raises ValueError if the folder holds a run that `config` cannot resume.

  A run that has neither a checkpoint nor a finished step may be replaced.
  The config of the run may differ only in values that may change when a run is
  resumed, such as total_steps. The message names the keys that differ. What the
  task keeps with the run, its tokenizer or the names of its classes, must not
  differ, and neither must the files of its data, but they may be at another
  place.
  """
  if not _holds_run(workdir):
    return
  old = read_config(workdir)
  setup.validate_saved(old, workdir)
  _compare(workdir, flatten(old), flatten(config))
  # The files come first: they say why the alphabet or the classes differ.
  if difference := kept_data.difference(_source(config), config, old, workdir):
    raise ValueError(
      f"{workdir=} cannot be resumed: {difference}. Give it the files that it "
      "began with, under their old names; --config.data.source=... may name "
      "another place of them. To train on other data, choose another workdir; "
      f"there --config.init_from={workdir} starts from this run's parameters"
    )
  keeps = _keeps(config)
  if keeps and (difference := keeps.difference(config, workdir)):
    raise ValueError(
      f"{workdir=} cannot be resumed: {difference}. To train on these data "
      "from the start, choose another workdir"
    )


def validated(
  config: ConfigDict, workdir: str | os.PathLike[str] | None
) -> ConfigDict:
  """Validates a whole config; returns the one with which a run uses it.

  A run in `workdir` goes on with its own copy of a tokenizer whose file is
  gone. Raises ValueError as validate_place and setup.validate_config do, and
  for data that are no longer where the run read them.
  """
  setup.validate_fields(config)
  if workdir is not None:
    validate_place(workdir, config)
  if workdir is not None and _holds_run(workdir):
    if keeps := _keeps(config):
      config = keeps.resumed(config, workdir)
    missing = kept_data.missing(_source(config), config, workdir)
    for key, name in missing.items():
      theirs = kept_data.names(read_config(workdir)).get(key)
      if theirs not in (None, name):
        flag = f"--config.data.{key.partition('[')[0]}"
        raise ValueError(
          f"config.data.{key}={name!r}; the run in {workdir=} has {theirs!r}. "
          f"Repeat all flags with which it began, also {flag}; if its data "
          f"were moved, {flag}=... must name their new place"
        )
      raise ValueError(
        f"config.data.{key}={name!r}; there is no such file or folder any "
        f"more. If the data of {workdir=} were moved, name their new place: "
        f"--config.data.{key.partition('[')[0]}=..."
      )
  setup.validate_config(config)
  return config


def with_data(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  source: str | None = None,
  split: str | None = None,
) -> tuple[ConfigDict, bool]:
  """The config with which data are evaluated, and whether `source` is another.

  If the data are not what the run began with, a message says so. If `source`
  has no file of the run and no splits of its own, all of it is evaluated, and
  config.data.eval_split names this split. If it has files of the run, a split
  is made as for a run on `source`, and a warning says that this split may
  contain what the run was trained on.

  config: that of load_config. source: where the evaluated data are; by default
  where the run read them. split: what is evaluated, by default
  config.data.eval_split. Raises ValueError if the data are not there, and if
  they have other classes than the run, by whose numbers they would be counted.
  """
  module, key = _source(config), kept_data.evaluated_key(config, split)
  if source is None and key in kept_data.missing(module, config, workdir):
    raise ValueError(
      f"config.data.{key}={config.data[key]!r}; there is no such file or "
      "folder any more: --source=... says where the data of the run are now"
    )
  new = config if source is None else kept_data.moved(config, source, split)
  if source is not None and not kept_data.may_be(module, source):
    raise ValueError(f"{source=}; there is no such file or folder")
  keeps = _keeps(config)
  if keeps and (why := keeps.difference(new, workdir)):
    raise ValueError(f"{workdir=} cannot be evaluated on these data: {why}")
  why = kept_data.difference(module, new, config, workdir, key)
  is_other = bool(why) and source is not None
  shared = []
  if (
    is_other and hasattr(module, "has_splits") and not module.has_splits(source)
  ):
    shared = kept_data.files_of_run(module, new, workdir, key)
    if split is None and not shared:
      new = new.copy_and_resolve_references().unlock()
      new.data.eval_split = module.WHOLE
      new = new.lock()
  part = split or new.data.eval_split
  if why and split is not None:
    # An unknown split is refused before the message.
    module.open_source(new, split)
  if why:
    metrics.log(f"{why}. What is there now is evaluated, the split {part!r}")
  if shared:
    logging.warning(
      "%d files of source=%r are files of the run (%s). The split %r is made "
      "of this source alone, so it may contain what the run was trained on. To "
      "evaluate what the run held out, leave source out",
      len(shared), source, kept_data.shown(shared), part,
    )  # fmt: skip
  return new, is_other


def _source(config):
  return tasks.get(config.task).SOURCE


def _write_kept(config, folder):
  """Writes what a run keeps besides its config and its parameters."""
  if keeps := _keeps(config):
    keeps.write(config, folder)
  kept_data.write(_source(config), config, folder)


def _holds_run(workdir):
  """Whether the folder holds a run, or a config.json that is not that of a run.

  A run without a checkpoint and without a line of a finished step does not
  count: it may be replaced by one with another config.
  """
  folder = pathlib.Path(workdir)
  if saved.steps(workdir):
    return True
  path = folder / "config.json"
  if not path.exists():
    return False
  if (folder / "DONE.json").exists() or (folder / "damaged").exists():
    return True
  try:
    saved.read_config(path)
  except (OSError, ValueError):
    return True
  return any(line["step"] for line in metrics.read(workdir))


def _remove_start(folder, config):
  """Removes what a run that has not finished a step has left in the folder."""
  if not (folder / "config.json").exists():
    return
  metrics.log(f"{folder}: its run has not finished a step, and begins anew")
  given = pathlib.Path(str(config.data.get("tokenizer"))).resolve()
  for name in _OF_A_START:
    for path in folder.glob(name):
      if path.resolve() != given:
        path.unlink()


_OF_A_START = (
  "metrics.jsonl", "non_finite.json", "events.out.tfevents.*",
  "tokenizer.json", "classes.json",
)  # fmt: skip


def _keeps(config):
  return getattr(tasks.get(config.task), "KEEPS", None)


_SHOWN = 10  # fields that an error names


def _compare(workdir, old, new):
  differing = []
  for key in sorted(old.keys() | new.keys()):
    if key.startswith(_CHANGEABLE) or old.get(key) == new.get(key):
      continue
    if key in kept_data.KEYS or _are_files(key, old, new):
      continue  # their contents are compared
    differing.append(
      f"config.{key}={old.get(key)!r}, this one has {new.get(key)!r}"
    )
  if differing:
    more = len(differing) - _SHOWN
    shown = "; ".join(differing[:_SHOWN])
    shown += f"; and {more} more fields differ" * (more > 0)
    raise ValueError(
      f"{workdir=} holds a run with {shown}. Give the values of that run, "
      "choose another workdir, or delete that one"
    )


def _are_files(key, *configs):
  return key == "data.tokenizer" and all(
    isinstance(x.get(key), str) and kept_tokenizer.is_file(x[key])
    for x in configs
  )


def read_config(workdir: str | os.PathLike[str]) -> ConfigDict:
  """Reads the config of a run, locked.

  If config.json is lost or damaged, it reads the newest undamaged copy in a
  checkpoint instead. Raises ValueError if there is no run in `workdir`, or one
  of another format.
  """
  path = pathlib.Path(workdir) / "config.json"
  try:
    contents = saved.read_config(path)
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or f"unreadable: {error}"
    contents, copy = saved.config(workdir)
    if contents is None:
      has_steps = bool(saved.steps(workdir))
      there = "holds checkpoints, but no config" if has_steps else "no run here"
      raise ValueError(
        f"{workdir=}: {there} ({path.name}: {reason}){_runs_below(workdir)}"
      ) from error
    metrics.log(f"{path}: {reason}; its copy in {copy} is used")
  validate_format(contents["format"], workdir)
  return ConfigDict(contents["config"]).lock()


def _runs_below(workdir):
  folder = pathlib.Path(workdir)
  found = [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
  if not found:
    return ""
  shown = ", ".join(str(path.parent) for path in sorted(found)[:5])
  return f"; runs below it: {shown}{', ...' * (len(found) > 5)}"


def load_config(workdir: str | os.PathLike[str]) -> ConfigDict:
  """The config by which a run is used: that of read_config, validated.

  It names the tokenizer that the run keeps, not the one that it began with.
  Raises ValueError as read_config does, if the config is not one of this
  version, and if the tokenizer is missing.
  """
  config = read_config(workdir)
  setup.validate_saved(config, workdir)
  keeps = _keeps(config)
  return keeps.used(config, workdir) if keeps else config


def contents(config: ConfigDict) -> dict[str, Any]:
  """The contents of config.json."""
  return {"format": FORMAT, "config": config.to_dict()}


def validate_format(number: int, workdir: str | os.PathLike[str]) -> None:
  """Raises ValueError if a run or checkpoint has another format than FORMAT."""
  if number != FORMAT:
    raise ValueError(
      f"{workdir=}: holds a run of format {number}, this version reads format "
      f"{FORMAT}; train it again in another workdir, or use the version of "
      "sigattn that trained it"
    )


def done(workdir: str | os.PathLike[str] | None, total_steps: int) -> bool:
  """Whether the run has completed total_steps and written its last evaluation.

  False for a `workdir` of None.
  """
  if workdir is None:
    return False
  path = pathlib.Path(workdir) / "DONE.json"
  try:
    return json.loads(path.read_bytes())["step"] >= total_steps
  except FileNotFoundError:
    return False
  except (OSError, ValueError, KeyError, TypeError):
    metrics.log(f"{path} is unreadable; the run counts as not finished")
    return False


def write_done(
  workdir: str | os.PathLike[str] | None, results: Mapping[str, float]
) -> None:
  """Marks the run as complete.

  results: the last evaluation and its "step". Does nothing if `workdir` is
  None, or if this is not the first process.
  """
  if workdir is not None and not jax.process_index():
    files.write_json(pathlib.Path(workdir) / "DONE.json", results)


def name(overrides: Mapping[str, object]) -> str:
  """A text that tells a run with these config overrides from others.

  {"optim.lr": 1e-3, "seed": 0} becomes "optim.lr=0.001,seed=0", and {} becomes
  "default".
  """
  values = ",".join(f"{key}={value}" for key, value in overrides.items())
  return values.replace("/", "-") or "default"


def folder_name(text: str) -> str:
  """The text as the name of a folder that validate_path accepts.

  Characters that are not accepted are replaced. A hash of the text is then
  added, so that different texts have different names.
  """
  plain = text.replace("/", "-")
  safe = "".join(x for x in plain.translate(_SAFE) if x.isprintable())
  safe = safe.encode()[:_LONGEST_NAME].decode(errors="ignore")
  if safe == plain:
    return safe
  return f"{safe}-{_digest(text)}"


def place_name(place: str) -> str:
  """The name of a source as a part of the name of a file: / becomes -.

  A / at the start and folders named . or .. are left out. A hash of the place
  is then added, so that different places have different names.
  """
  plain = place.replace("/", "-")
  short = "-".join(part for part in place.split("/") if part.strip("."))
  if short == plain:
    return plain
  return f"{short}-{_digest(place)}".lstrip("-")


def _digest(text):
  digest = hashlib.sha256(text.encode(errors="surrogateescape"))
  return digest.hexdigest()[:8]


_SAFE = str.maketrans("[]*?\\", "()---")
_LONGEST_NAME = 80  # bytes


def default(
  config_file: str | os.PathLike[str], overrides: Mapping[str, object]
) -> str:
  """The default folder of a run: runs/<config>/<key=value,...>.

  So the same command resumes its own run, and other overrides get another
  folder. config_file: for example configs/vit.py:imagenet. overrides: for
  example {"optim.lr": 1e-3}.
  """
  file, _, arg = str(config_file).partition(":")
  config = pathlib.Path(file).stem + (f":{arg}" if arg else "")
  return os.path.join("runs", folder_name(config), folder_name(name(overrides)))
