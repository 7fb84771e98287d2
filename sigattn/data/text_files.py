"""Finds and opens the files of a local source of texts.

  .jsonl          a document per line, an object with a column of text
  .json           the same, or one array of such objects
  .parquet        a document per row
  .txt, .md       one document, or with config.data.lines one per line

Texts are UTF-8. Each file may be compressed (.gz, .bz2, .xz). A folder may hold
files of all kinds. A file belongs to a split if it is in a folder with the name
of the split, or has that name itself, with or without a number:

  train.txt, train_3.jsonl, train-00000-of-00010.parquet, train/mine.txt

The names are those in SPLITS. A shard may also have words before the split
(c4-train.00000-of-01024.json.gz), and in a folder `data` any word is a split
(data/train_sft-00000-of-00003.parquet). If no file belongs to a split, all are
in train. Otherwise only those that do are read. `datasets` would also take
training.txt and my-test-2.txt for splits; here a warning names such files.
"""

import bz2
import contextlib
import functools
import glob
import gzip
import io
import itertools
import json
import logging
import lzma
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging as absl_logging

from sigattn.data import hub

_logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".md", ".parquet", ".txt")
_READ_AS = {".md": ".txt"}
_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COMPRESSED = tuple(_OPEN)
# The column that says why a document is no text; empty if it is.
WHY = "why it is no text"
_PLACE = "its file and line"  # a column of texts

SPLITS = {
  "train": "train", "validation": "validation", "valid": "validation",
  "val": "validation", "dev": "validation", "test": "test",
}  # fmt: skip
_SHARD = r"\d+-of-\d+.*"
_SPLIT = re.compile(
  rf"({'|'.join(SPLITS)})([-_. ]?\d*|[-_.]{_SHARD})"
  rf"|.*[-_.]({'|'.join(SPLITS)})[-_.]{_SHARD}"
)
_IN_DATA = re.compile(rf"(\w+)-{_SHARD}")
_LIKE_A_SPLIT = re.compile(
  r"(.*[-_. \d])?(train(ing)?|valid(ation)?|val|dev|test(ing)?|eval(uation)?)"
  r"([-_. \d].*)?"
)

_SHOWN = 10  # names of files in a warning
_FEW = 3  # names that look like those of splits

# {split: {suffix: paths}}
Files = Mapping[str, Mapping[str, Sequence[str]]]


def suffix(path: pathlib.Path) -> str | None:
  """The suffix in SUFFIXES as which a file is read; None for other names.

  A file .md is read as .txt is.
  """
  [*_, last] = ["", *(x for x in path.suffixes if x not in _COMPRESSED)]
  return _READ_AS.get(last, last) if last in SUFFIXES else None


def find(source: str, key: str = "source") -> Files | None:
  """Returns the files of a local source; None for a name of the Hub.

  key: the key of config.data, for the errors. The log names files of other
  kinds in a folder. Raises ValueError for a single file of another kind, and
  for a folder without texts.
  """
  path = hub.local(source, key)
  if path.is_file():
    if (kind := suffix(path)) is None:
      raise ValueError(
        f"config.data.{key}={source!r}; its name must end in one of "
        f"{list(SUFFIXES)}, compressed ({', '.join(_COMPRESSED)}) or not"
      )
    return {"train": {kind: [str(path.resolve())]}}
  return _in_folder(path.resolve(), source, key) if path.is_dir() else None


def _in_folder(path, source, key):
  from datasets import data_files

  try:  # without hidden files, and without config.json and the like
    found = data_files.resolve_pattern("**", glob.escape(str(path)))
  except FileNotFoundError:
    found = []
  texts = [x for x in sorted(map(pathlib.Path, found)) if suffix(x)]
  split_of = {file: _split(file.relative_to(path)) for file in texts}
  if not any(split_of.values()):
    _warn_of_names(texts, path, source)
    split_of = dict.fromkeys(texts, "train")
  files, read = {}, [file for file in texts if split_of[file]]
  for file in read:
    by_kind = files.setdefault(split_of[file], {})
    by_kind.setdefault(suffix(file), []).append(str(file))
  if not files:
    raise ValueError(
      f"config.data.{key}={source!r}; holds no file whose name ends in one of "
      f"{list(SUFFIXES)}, compressed ({', '.join(_COMPRESSED)}) or not"
    )
  for file in read:
    if file.name == "metrics.jsonl" and (file.parent / "config.json").exists():
      raise ValueError(
        f"config.data.{key}={source!r}; must not hold runs, and {file} is of "
        "one: move its folder"
      )
  _warn_of_unread(path, read, texts, source)
  return files


def _warn_of_unread(path, read, texts, source):
  """Names the files of a folder that are not read, by the cause."""
  others = {x for x in path.rglob("*") if x.is_file()} - set(read)
  by_cause = {
    f"with another ending than {', '.join(SUFFIXES)}": {
      x for x in others if not suffix(x)
    },
    "in no split, where the names of others make splits": others & set(texts),
    "that are hidden, or describe a data set": {
      x for x in others - set(texts) if suffix(x)
    },
  }
  parts = []
  for cause, paths in by_cause.items():
    names = sorted(str(x.relative_to(path)) for x in paths)
    if names:
      shown = ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
      parts.append(f"{len(names)} {cause}: {shown}")
  if parts:
    warn_once(
      f"{source!r}: these files of the folder are not read: {'; '.join(parts)}"
    )


def _split(file):
  """The split that a path in a folder of texts names; None if none."""
  for folder in file.parts[:-1]:
    if folder in SPLITS:
      return SPLITS[folder]
  stem = file.name
  for ending in (*_COMPRESSED, *SUFFIXES):
    stem = stem.removesuffix(ending)
  if match := _SPLIT.fullmatch(stem):
    return SPLITS[match[1] or match[3]]
  match = _IN_DATA.fullmatch(stem)
  return match[1] if match and file.parent.name == "data" else None


def _warn_of_names(texts, path, source):
  """Warns of names that look like those of splits, but are none."""
  names = [str(x.relative_to(path)) for x in texts]
  names = [
    name
    for name in names
    if any(map(_LIKE_A_SPLIT.fullmatch, pathlib.Path(name).parts))
  ]
  if names:
    warn_once(
      f"{source!r}: {', '.join(names[:_FEW])}"
      f"{' and others' * (len(names) > _FEW)} "
      f"{'is' if len(names) == 1 else 'are'} read like all other files, and "
      "not as a split: only files and folders with the names "
      f"{', '.join(SPLITS)} are splits, such as test.txt"
    )


@functools.lru_cache(maxsize=4096)
def warn_once(message: str) -> None:
  """Warns only once, although the files are read again and again."""
  absl_logging.warning("%s", message)


@functools.lru_cache(maxsize=64)
def inform_once(message: str) -> None:
  """Logs an ordinary line, only once."""
  _logger.info("%s", message)


def open_files(
  files: Mapping[str, Sequence[str]], column: str, lines: bool
) -> list[tuple[str, Any]]:
  """Opens the files of a split: [(suffix, datasets.IterableDataset)].

  files: {suffix: paths}. lines: whether each line of a .txt is a document.
  """
  import datasets

  def load(kind, paths, **more):
    with hub.uncounted():
      return datasets.load_dataset(
        kind.removeprefix("."),
        data_files={"train": [*map(glob.escape, paths)]},
        split="train",
        streaming=True,
        **more,
      )

  def texts(paths, column, lines):
    string = datasets.Value("string")
    return datasets.IterableDataset.from_generator(
      _texts,
      datasets.Features({column: string, WHY: string, _PLACE: string}),
      {"paths": list(paths), "column": column, "lines": lines},
    )

  opened = []
  for kind, paths in files.items():
    # `examples` parses the lines of .jsonl. In many files they differ in
    # columns and types, which the builder `json` refuses.
    if kind in (".jsonl", ".txt"):
      is_json = kind == ".jsonl"
      own = texts(paths, "text" if is_json else column, lines or is_json)
      opened.append((kind, own))
      continue
    stream = load(kind, paths)
    if kind == ".parquet" and column in (stream.features or ()):
      # The other columns take time, and may differ from file to file.
      stream = load(kind, paths, columns=[column])
    opened.append((kind, stream))
  return opened


def _texts(paths, column, lines):
  """Yields {column: text or None, WHY: why it is None} of a file or a line."""
  for path in paths:
    opener = _OPEN.get(pathlib.Path(path).suffix, open)
    decoded = _decoded_lines if lines else _decoded
    with opener(path, "rb") as file:
      for number, (text, why) in enumerate(decoded(file, path), 1):
        place = f"{path}: line {number}" if lines else path
        yield {column: text, WHY: why and f"{path}: {why}", _PLACE: place}


@contextlib.contextmanager
def _naming(path):
  try:
    yield
  except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
    raise OSError(f"{path}: is damaged: {error}") from error


# "utf-8-sig" drops the mark that Windows writes.


def _decoded(file, path):
  """Yields once: the text, with newlines as in Unix, and why there is none."""
  with _naming(path):
    content = file.read()
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    yield None, f"byte {error.start}, {_no_utf8(content[error.start])}"
  else:
    yield text.replace("\r\n", "\n").replace("\r", "\n"), ""


def _decoded_lines(file, path):
  # Bytes that are no UTF-8 become halves of surrogate pairs.
  reader = io.TextIOWrapper(
    file, encoding="utf-8-sig", errors="surrogateescape"
  )
  for number in itertools.count(1):
    with _naming(path):
      line = reader.readline()
    if not line:
      return
    try:
      line.encode()
    except UnicodeEncodeError as error:
      byte = line[error.start].encode(errors="surrogateescape")[0]
      yield None, f"line {number}, {_no_utf8(byte)}"
    else:
      yield line.removesuffix("\n"), ""


def _no_utf8(byte):
  # A text in UTF-16 begins with 0xff and 0xfe.
  encoding = "UTF-16" if byte in (0xFE, 0xFF) else "LATIN1"
  return (
    f"0x{byte:02x}: is no text in UTF-8; convert the file (iconv -f {encoding} "
    "-t UTF-8, say) or remove it"
  )


def examples(
  kind: str, rows: Iterator[dict[str, Any]]
) -> Iterator[tuple[str, Any]]:
  """The documents of an opened file, usually dicts of columns.

  Each comes with its place, "FILE: line 3", which is "" if only the builder of
  `datasets` knows it. kind: the suffix. A line of a .jsonl may hold another
  JSON value, which is then yielded. A line that is not JSON is no text.
  """
  if kind != ".jsonl":
    yield from ((row.get(_PLACE, ""), row) for row in rows)
    return
  for row in rows:
    line, place = row["text"], row[_PLACE]
    if line is None:
      yield place, row
    elif line.strip():
      try:
        yield place, json.loads(line)
      except ValueError as error:
        shown = line if len(line) <= 300 else line[:300] + "..."
        why = f"{place} is not JSON: {getattr(error, 'msg', error)}"
        yield place, {WHY: f"{why}: {shown!r}"}
