"""Finds the recordings and transcripts of a local folder, by its layout.

  metadata.csv, metadata.jsonl   beside the recordings, as in `datasets`: a
      column file_name and one of TEXT_COLUMNS. The topmost folder of a
      recording names its split, as in test/a.wav; all others are in train
  *.trans.txt                    LibriSpeech (Panayotov et al., 2015): a line
      "ID TRANSCRIPT" for each ID.flac beside it; the splits are the folders
      directly below, dev-clean for example
  *.tsv and clips/               Common Voice (1912.06670): columns path and
      sentence; each table is a split, train, dev and test for example

`datasets` reads other folders, for example those of parquet files.
"""

import csv
import json
import pathlib
import re
from collections.abc import Mapping, Sequence

from sigattn.data import hub

TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence")
_METADATA = ("metadata.csv", "metadata.jsonl")
# The names of folders that `datasets` treats as splits.
_SPLIT = re.compile(
  r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?)([-._ \d].*)?"
)

# {split: [(path relative to the folder, transcript)]}
Recordings = Mapping[str, Sequence[tuple[str, str]]]


def find(source: str) -> Recordings | None:
  """Returns the recordings of a folder; None for folders that `datasets` reads.

  No recording is opened, so a name may be that of a missing file. Raises
  ValueError for a table that cannot be read or that lacks a column.
  """
  folder = hub.local(source)
  if not folder.is_dir():
    return None
  for layout in (_metadata, _librispeech, _common_voice):
    splits = {}
    for split, path, text in layout(folder):
      splits.setdefault(split, []).append((path, text))
    if splits:
      return splits
  return None


def _metadata(folder):
  for name in _METADATA:
    for table in _tables(folder, f"**/{name}"):
      rows = _jsonl(table) if name.endswith("l") else _csv(table)
      for row in rows:
        names = [x for x in TEXT_COLUMNS if isinstance(row.get(x), str)]
        if not isinstance(row.get("file_name"), str) or len(names) != 1:
          raise ValueError(
            f"{table}: needs a column file_name and one of {TEXT_COLUMNS}; its "
            f"columns are {sorted(map(str, row))}"
          )
        path = table.parent.relative_to(folder) / row["file_name"]
        is_split = len(path.parts) > 1 and _SPLIT.fullmatch(path.parts[0])
        yield path.parts[0] if is_split else "train", str(path), row[names[0]]


def _librispeech(folder):
  for table in _tables(folder, "**/*.trans.txt"):
    place = table.parent.relative_to(folder)
    split = place.parts[0] if place.parts else "train"
    for line in table.read_text(encoding="utf-8").splitlines():
      name, _, text = line.partition(" ")
      if name:
        yield split, str(place / f"{name}.flac"), text


def _common_voice(folder):
  for table in _tables(folder, "*.tsv"):
    for row in _csv(table, delimiter="\t", quoting=csv.QUOTE_NONE):
      if not {"path", "sentence"} <= row.keys():
        break  # another kind of table, for example of durations
      yield (
        table.stem,
        str(pathlib.Path("clips") / row["path"]),
        row["sentence"],
      )


def _tables(folder, pattern):
  """The files of the pattern, without hidden files of operating systems.

  macOS puts ._x beside x, and __MACOSX into its archives.
  """
  return [
    path
    for path in sorted(folder.glob(pattern))
    if not any(
      part.startswith((".", "__")) for part in path.relative_to(folder).parts
    )
  ]


def _csv(table, **options):
  try:
    with table.open(encoding="utf-8-sig", newline="") as file:
      yield from csv.DictReader(file, **options)
  except (csv.Error, UnicodeDecodeError) as error:
    raise ValueError(f"{table}: cannot be read: {error}") from error


def _jsonl(table):
  for line in table.read_text(encoding="utf-8-sig").splitlines():
    if line.strip():
      try:
        yield dict(json.loads(line))
      except (TypeError, ValueError) as error:
        raise ValueError(
          f"{table}: needs a JSON object per line, not {line[:100]!r}"
        ) from error
