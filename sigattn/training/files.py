"""Files of a run: atomic writes, and checksums that reveal damage.

A folder is sealed by checksums.json, which has the SHA-256 of every file in the
folder and is written last:

  {"name": "40", "files": {"params/manifest.ocdbt": "5f3a...", ...}}

The name is that of the folder, so that a copy under another name is detected.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterator

_SEAL = "checksums.json"


def write_json(path: str | os.PathLike[str], value: object) -> None:
  """Writes a JSON file atomically: a kill never leaves half a file."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a file atomically. The OSError of a failure names the file."""
  partial = pathlib.Path(f"{path}.partial")
  with naming(path):
    try:
      partial.write_text(text, encoding="utf-8")
      os.replace(partial, path)
    except OSError:
      with contextlib.suppress(OSError):
        partial.unlink()
      raise


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Adds the file's name to an OSError; that of a failed write has none."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error


def append(file: io.FileIO, data: bytes) -> None:
  """Writes all of the data to a file without a buffer, or raises OSError.

  If the disk is full, the system first writes a part of the data.
  """
  rest = memoryview(data)
  while rest:
    rest = rest[file.write(rest) :]


def seal(
  folder: str | os.PathLike[str], name: str, without: Collection[str] = ()
) -> None:
  """Writes checksums.json of all files in a folder.

  Args:
    folder: its files must not change afterwards.
    name: the name that the folder will have in the end.
    without: names of files that will still change.
  """
  folder = pathlib.Path(folder)
  files = {
    path.relative_to(folder).as_posix(): _checksum(path)
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.relative_to(folder).as_posix() not in without
  }
  write_json(folder / _SEAL, {"name": name, "files": files})


def damage(
  folder: str | os.PathLike[str],
  counts: Callable[[str], bool] = lambda file: True,
) -> str:
  """What is wrong with a sealed folder, as text; empty if nothing is.

  counts: whether a file is to be verified; by default all are.
  """
  folder = pathlib.Path(folder)
  try:
    sealed = json.loads((folder / _SEAL).read_bytes())
    name, files = sealed["name"], dict(sealed["files"])
  except FileNotFoundError:
    return f"{_SEAL} is missing"
  except (OSError, ValueError, KeyError, TypeError):
    return f"{_SEAL} is unreadable"
  if name != folder.name:
    return f"it was saved as {name!r}"
  for file in filter(counts, files):
    try:
      if _checksum(folder / file) != files[file]:
        return f"{file} is not what was saved"
    except FileNotFoundError:
      return f"{file} is missing"
    except (OSError, ValueError) as error:
      return f"{file!r} is unreadable: {error}"
  return ""


def _checksum(path):
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
