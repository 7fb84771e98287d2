"""Locates data: embedded files, local folders and Hugging Face names."""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

_EMBEDDED = pathlib.Path(__file__).parent / "embedded"
# The Hub allows no name that begins with a dot; "../texts" is a path.
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


def embedded(name: str, file: str) -> pathlib.Path:
  """Returns the path of an embedded data set's file.

  name: of the data set, for the error. file: its name in
  sigattn/data/embedded. Raises ValueError in an installed package, which
  contains no data.
  """
  path = _EMBEDDED / file
  if not path.is_file():
    raise ValueError(
      f"config.data.source={name!r}; the embedded data are part of a checkout "
      "of the repository, but not of the installed package: work in a "
      "checkout, or give a local folder or a Hugging Face name"
    )
  return path


def local(name: str, key: str = "source") -> pathlib.Path:
  """Returns the path that `name` would be as a file or folder.

  key: the key of config.data, for the error. Raises ValueError if the system
  does not accept the name as a path.
  """
  try:
    path = pathlib.Path(name).expanduser()
    path.exists()
  except (OSError, RuntimeError, ValueError) as error:
    raise ValueError(
      f"config.data.{key}={name!r}; is no path: {error}"
    ) from error
  return path


def is_hub_name(source: str) -> bool:
  """Whether `source` has the form owner/name or owner/name:subset."""
  return bool(_HUB_NAME.fullmatch(source))


def builder(source: str, embedded_names: Collection[str]) -> Any:
  """Returns the `datasets` builder of a local folder or of a Hub name.

  source: the path of a folder, owner/name, or owner/name:subset for a data set
  with several subsets. embedded_names: the names of the embedded data sets,
  for the error. Raises ValueError if the source cannot be read.
  """
  import datasets  # The import takes 2 s; embedded sets do not need it.

  path, subset = local(source), ""
  if path.is_dir():
    name = str(path.resolve())
  elif is_hub_name(source):
    name, _, subset = source.partition(":")
  else:
    raise unknown_source(source, embedded_names)
  try:
    with uncounted() if path.is_dir() else contextlib.nullcontext():
      return datasets.load_dataset_builder(name, subset or None)
  except Exception as error:  # An unusual folder may raise any exception.
    raise ValueError(
      f"config.data.source={source!r}: cannot be read: {error}"
    ) from error


def file_of(source: str, path: str) -> pathlib.Path:
  """Returns the path of a file that a row of a source names.

  A row of a foreign table may name any file of this machine. A file is opened
  only if it is in the source's own folder, to which relative paths refer, or
  where `datasets` keeps what it has downloaded. Raises ValueError for other
  files, and FileNotFoundError if there is no such file.
  """
  import datasets

  folders = [
    datasets.config.HF_DATASETS_CACHE,
    datasets.config.DOWNLOADED_DATASETS_PATH,
    datasets.config.EXTRACTED_DATASETS_PATH,
    datasets.config.constants.HF_HUB_CACHE,
  ]
  own = local(source)
  if own.is_dir():
    folders.insert(0, own.resolve())
    path = os.path.join(folders[0], path)
  # The path is not resolved, because its owner may have links in the folder.
  path = pathlib.Path(os.path.normpath(path))
  if not any(path.is_relative_to(os.path.abspath(x)) for x in folders):
    raise ValueError(
      f"the file {str(path)!r} lies outside of the source's folder"
    )
  if not path.exists():
    # libsndfile says of such a file only "System error".
    raise FileNotFoundError(f"there is no file {str(path)!r}")
  return path


def files(source: str, key: str = "source") -> list[pathlib.Path]:
  """Returns the files of a local source: itself, or all below its folder.

  Hidden files and folders are left out, and links are followed. key: as in
  `local`.
  """
  path = local(source, key).resolve()
  if not path.is_dir():
    return [path]
  found, visited = [], set()
  for folder, folders, names in os.walk(path, followlinks=True):
    real = os.path.realpath(folder)
    if real in visited:  # a link to a folder above it
      folders.clear()
      continue
    visited.add(real)
    folders[:] = [name for name in folders if not name.startswith(".")]
    found += [pathlib.Path(folder, x) for x in names if not x.startswith(".")]
  return [path for path in found if path.is_file()]


def unknown_source(
  source: str,
  embedded_names: Collection[str],
  files: str = "",
  key: str = "source",
) -> ValueError:
  """Returns the error for a source that is of no known kind.

  files: "file or " if a source may also be a single file. key: the key of
  config.data.
  """
  return ValueError(
    f"config.data.{key}={source!r}; there is no such {files}folder: choose an "
    "embedded set "
    f"({sorted(embedded_names)}), a local {files}folder, or a Hugging Face "
    "name: owner/name or owner/name:subset"
  )


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
  """A context in which `datasets` does not tell the Hub what it loads.

  `datasets` counts the uses of its readers, even for local files, by one
  request for each file that is opened. Without a network each request waits for
  seconds.
  """
  import datasets

  before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
  datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
  try:
    yield
  finally:
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


@contextlib.contextmanager
def reading(origin: object) -> Iterator[None]:
  """A context that turns errors of `datasets` into ValueErrors.

  origin: the name of what is read, with which the message begins.
  """
  import datasets

  try:
    yield
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    raise ValueError(f"{origin}: cannot be read: {error}") from error


def splits(builder: Any) -> list[str]:
  """Returns the names of the splits of a `datasets` builder."""
  return [str(x) for x in builder.info.splits or builder.config.data_files]


def validate_split(source: str, split: str, splits: Collection[str]) -> None:
  """Raises ValueError unless `split` is one of the source's splits."""
  if split not in splits:
    raise ValueError(f"{split=} of {source!r}; choose from {sorted(splits)}")


# The training splits of one text or an embedded set. The split "validation" is
# the end of "train".
TRAIN_SPLITS = ("train", "train_without_validation")


def validate_no_validation_in_training(data: ConfigDict) -> None:
  """Raises ValueError for a run that is evaluated on what it trains on.

  data: config.data of a source with TRAIN_SPLITS.
  """
  if (data.train_split, data.eval_split) == ("train", "validation"):
    raise ValueError(
      f"config.data.train_split={data.train_split!r}; must be "
      f"{TRAIN_SPLITS[1]!r} with config.data.eval_split={data.eval_split!r}, "
      "which 'train' ends with"
    )


def table(source: str, builder: Any, split: str) -> Any:
  """Returns a `datasets.Dataset` of the split, or of several joined by +."""
  with reading(f"source {source!r}"):
    builder.download_and_prepare()
    return builder.as_dataset(split)


def is_encoded(feature: Any, kind: type) -> bool:
  """Whether a column holds encoded files: images or recordings.

  feature: the column's type, as `datasets` describes it. kind: datasets.Image
  or datasets.Audio. Other tools write the storage of these types: a struct of
  bytes and path, or only the bytes. That is accepted too.
  """
  if isinstance(feature, dict):
    return {"bytes", "path"} <= feature.keys()
  is_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary")
  return isinstance(feature, kind) or is_bytes


def encoded(value: Any) -> dict[str, Any] | None:
  """The value of a column of `is_encoded` as {"bytes": ..., "path": ...}."""
  return {"bytes": value, "path": None} if isinstance(value, bytes) else value


def column(
  source: str,
  features: dict[str, Any],
  kind: str,
  is_kind: Callable[[Any], bool],
  usual_names: Collection[str],
) -> str:
  """Returns the name of the only column of a kind.

  features: {column: type}, as `datasets` describes them. kind: the name of the
  kind, for the error. is_kind: whether a type is of the kind. If several
  columns are, the one with a usual name is chosen. Raises ValueError if no
  column or several columns remain.
  """
  candidates = [k for k, value in features.items() if is_kind(value)]
  with_usual_name = [name for name in candidates if name in usual_names]
  if len(candidates) == 1 or len(with_usual_name) == 1:
    return (with_usual_name or candidates)[0]
  raise ValueError(
    f"config.data.source={source!r}; needs one column of the kind "
    f"{kind}, or one of them called {' or '.join(usual_names)}; its "
    f"columns are {dict(features)}"
  )
