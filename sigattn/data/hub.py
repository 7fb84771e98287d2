"""Local folders and Hugging Face names, read through `datasets`."""

import contextlib
import pathlib
import re


def builder(source, embedded):
  """What in `datasets` knows the files of a folder or of a Hub name.

  source: a path, owner/name, or owner/name:subset where a data set has several.
  embedded: the names of the embedded sets, for the message. ValueError where
  there is nothing that can be read.
  """
  import datasets  # Takes two seconds, which an embedded set need not pay.

  path, subset = pathlib.Path(source).expanduser(), ""
  if source and path.is_dir():
    name = str(path.resolve())
  elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
    name, _, subset = source.partition(":")
  else:
    raise ValueError(
      f"config.data.source={source!r}; choose an embedded set "
      f"({sorted(embedded)}), a local folder, or a Hugging Face name: "
      "owner/name or owner/name:subset"
    )
  with readable(source):
    return datasets.load_dataset_builder(name, subset or None)


@contextlib.contextmanager
def readable(source):
  """Says which source it was that `datasets` could not read."""
  import datasets

  try:
    yield
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    raise ValueError(
      f"config.data.source={source!r}; cannot be read: {error}"
    ) from error


def splits(builder):
  return [str(x) for x in builder.info.splits or builder.config.data_files]


def check_split(source, split, splits):
  if split not in splits:
    raise ValueError(f"{split=} of {source!r}; choose from {sorted(splits)}")


def table(source, builder, split):
  """The rows of a split, or of several joined by +."""
  with readable(source):
    builder.download_and_prepare()
    return builder.as_dataset(split)


def column(source, features, kind, usual):
  """The only column of its kind, or the one with a usual name."""
  found = [name for name, value in features.items() if isinstance(value, kind)]
  named = [name for name in found if name in usual]
  if len(found) == 1 or len(named) == 1:
    return (named or found)[0]
  raise ValueError(
    f"config.data.source={source!r}; needs one column of the kind "
    f"{kind.__name__}, or one of them called {' or '.join(usual)}; its columns "
    f"are {dict(features)}"
  )
