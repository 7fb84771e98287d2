"""Where data lie: embedded files, local folders and Hugging Face names."""

import contextlib
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any

_EMBEDDED = pathlib.Path(__file__).parent / "embedded"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def embedded(name: str, file: str) -> pathlib.Path:
  """The path of an embedded data set's file, in sigattn/data/embedded.

  Raises ValueError in an installed package, which holds no data.
  """
  path = _EMBEDDED / file
  if not path.is_file():
    raise ValueError(
      f"config.data.source={name!r}; the embedded data are part of a checkout "
      "of the repository, not of the installed package: work in a checkout, or "
      "give a local folder or a Hugging Face name"
    )
  return path


def is_hub_name(source: str) -> bool:
  """Whether it has the form of a Hub name: owner/name or owner/name:subset."""
  return bool(_HUB_NAME.fullmatch(source))


def builder(source: str, embedded_names: Collection[str]) -> Any:
  """What in `datasets` knows the files of a folder or of a Hub name.

  source: a path, owner/name, or owner/name:subset where a data set has several.
  embedded_names: of the embedded sets, for the message. ValueError where there
  is nothing that can be read.
  """
  import datasets  # Takes two seconds, which an embedded set need not pay.

  path, subset = pathlib.Path(source).expanduser(), ""
  if source and path.is_dir():
    name = str(path.resolve())
  elif is_hub_name(source):
    name, _, subset = source.partition(":")
  else:
    raise unknown_source(source, embedded_names)
  with reading(source):
    return datasets.load_dataset_builder(name, subset or None)


def unknown_source(
  source: str, embedded_names: Collection[str], files: str = ""
) -> ValueError:
  """The error for a source that is none of those there are.

  files: "file or ", where a source may be one file.
  """
  return ValueError(
    f"config.data.source={source!r}; choose an embedded set "
    f"({sorted(embedded_names)}), a local {files}folder, or a Hugging Face "
    "name: owner/name or owner/name:subset"
  )


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
  """Says which source it was that `datasets` could not read."""
  import datasets

  try:
    yield
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    raise ValueError(f"source {source!r}: cannot be read: {error}") from error


def splits(builder: Any) -> list[str]:
  """The names of the splits that a builder offers."""
  return [str(x) for x in builder.info.splits or builder.config.data_files]


def validate_split(source: str, split: str, splits: Collection[str]) -> None:
  """Raises ValueError unless the source has the split."""
  if split not in splits:
    raise ValueError(f"{split=} of {source!r}; choose from {sorted(splits)}")


def table(source: str, builder: Any, split: str) -> Any:
  """The rows of a split, or of several joined by +."""
  with reading(source):
    builder.download_and_prepare()
    return builder.as_dataset(split)


def column(
  source: str,
  features: dict[str, Any],
  kind: type,
  usual_names: Collection[str],
) -> str:
  """The only column of its kind, or the one with a usual name."""
  candidates = [k for k, value in features.items() if isinstance(value, kind)]
  with_usual_name = [name for name in candidates if name in usual_names]
  if len(candidates) == 1 or len(with_usual_name) == 1:
    return (with_usual_name or candidates)[0]
  raise ValueError(
    f"config.data.source={source!r}; needs one column of the kind "
    f"{kind.__name__}, or one of them called {' or '.join(usual_names)}; its "
    f"columns are {dict(features)}"
  )
