"""The tokenizer that a run keeps in its folder, as tokenizer.json.

With config.data.tokenizer="characters", it contains the alphabet of the texts.
With the name of a file, it is a copy of that file. With "bytes" there is none.
So a run does not change if its source changes, and it can generate texts
without the source.
"""

import logging
import os
import pathlib

from ml_collections import ConfigDict

from sigattn.data import hub, text, token_files, tokenizers

_logger = logging.getLogger(__name__)
_SHOWN = 20  # characters that an error names


def _path(workdir):
  return pathlib.Path(workdir) / token_files.TOKENIZER


def write(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
  """Writes the config's tokenizer into the folder of a run that begins."""
  content = text.tokenizer(config).content
  if content is not None:
    _path(workdir).write_bytes(content)


def used(config: ConfigDict, workdir: str | os.PathLike[str]) -> ConfigDict:
  """The config with the tokenizer of the run's folder, locked.

  Raises ValueError if the folder has none.
  """
  if config.data.tokenizer == "bytes":
    return config
  if not (path := _path(workdir)).is_file():
    raise ValueError(
      f"{workdir=}: has no {path.name}, the tokenizer of the run: restore it "
      "from a copy, or run the command of the run with another --workdir, in "
      "whose folder it writes the same file, and copy that"
    )
  config = config.copy_and_resolve_references()
  config.data.tokenizer = str(path)
  return config.lock()


def resumed(config: ConfigDict, workdir: str | os.PathLike[str]) -> ConfigDict:
  """The config with which a run goes on, locked.

  If the file of config.data.tokenizer is gone, the copy in the run's folder
  takes its place, and the log says so.
  """
  name, path = config.data.tokenizer, _path(workdir)
  if not is_file(name) or hub.local(name, "tokenizer").exists():
    return config
  if not path.is_file():
    return config
  _logger.info(
    "config.data.tokenizer=%r is not there; the run's copy %s is used",
    name, path
  )  # fmt: skip
  return used(config, workdir)


def is_file(name: str) -> bool:
  """Whether a value of config.data.tokenizer names a file."""
  return name not in ("characters", "bytes")


def difference(config: ConfigDict, workdir: str | os.PathLike[str]) -> str:
  """How the config's tokenizer differs from the run's; "" if it does not."""
  ours, path = text.tokenizer(config), _path(workdir)
  name = f"config.data.tokenizer={config.data.tokenizer!r}"
  if not path.is_file():
    lost = (
      f"{name}; there is no {path}: the run reads bytes, or the file was lost"
    )
    return "" if ours.content is None else lost
  theirs = tokenizers.read(path, text.LARGEST_VOCABULARY)
  if ours.content == theirs.content:
    return ""
  if isinstance(ours, tokenizers.Characters) and isinstance(
    theirs, tokenizers.Characters
  ):
    what = _other_characters(set(ours.alphabet), set(theirs.alphabet))
    return f"{name}; the texts have {what} than {path}, the run's tokenizer"
  return f"{name}; differs from {path}, the run's tokenizer"


def _other_characters(ours, theirs):
  parts = []
  for word, some in (("more", ours - theirs), ("fewer", theirs - ours)):
    if some:
      shown = "".join(sorted(some))[:_SHOWN]
      noun = "character" if len(some) == 1 else "characters"
      dots = "..." if len(some) > _SHOWN else ""
      parts.append(f"{len(some)} {noun} {word} ({shown!r}{dots})")
  return " and ".join(parts)
