"""Continues the prompts of a file of JSON lines.

Each line is an object with the field "prompt". Its result is the same object
with two more fields: "text" is the continuation, and "tokens" is the number of
tokens that were drawn for it. Results are written line by line in the order of
the prompts, each as soon as all results before it are written. A run that was
stopped goes on after the results in its file. It writes the same texts as it
would have written without the stop. The file OUT.options.json beside the
results OUT says what made them: the model, and the options that change texts.
Results that something else made are not continued.
"""

import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import rich.progress

from sigattn import interrupt
from sigattn.training import files, metrics

_RESULT = ("text", "tokens")  # the fields that a result adds


class PromptFile:
  """The prompts of one file, and the file of their results."""

  def __init__(
    self, path: str | os.PathLike[str], out: str | os.PathLike[str]
  ) -> None:
    """Reads and validates both files; `out` need not exist.

    Raises:
      ValueError: if a line is no JSON object, has no string "prompt" or already
        has a field of a result, or if a result belongs to another prompt. The
        error names the line. Also if both are the same file, and if `out` is a
        folder or in a folder that does not exist.
      OSError: if a file cannot be read.
    """
    self.path, self.out = path, out
    self._options = f"{out}.options.json"
    self._validate_out()
    self.rows = [_prompt(*line) for line in _lines(path)]
    if not self.rows:
      raise ValueError(f"{path}: has no line")
    # The results in the file. A kill may have cut off the last one.
    self.done, self._bytes = 0, 0
    if os.path.exists(out):
      self._find_results()

  def _validate_out(self):
    out, folder = pathlib.Path(self.out), pathlib.Path(self.out).parent
    why = ""
    if not folder.is_dir():
      why = f"there is no folder {str(folder)!r}"
    elif out.is_dir():
      why = "is a folder; name a file"
    elif out.exists() and out.samefile(self.path):
      why = "is the file of --prompts; name another file for the results"
    if why:
      raise ValueError(f"--out={self.out}: {why}")

  def _validate_made_by(self, made_by):
    """Raises ValueError if something else made the results that there are."""
    if not self.done:
      return
    advice = f"delete {self.out}, or name another --out"
    try:
      with open(self._options, "rb") as file:
        theirs = json.load(file)
      changed = [key for key in made_by if made_by[key] != theirs[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"--out={self.out}: holds {self.done} results, but {self._options}, "
        f"which says what made them, cannot be read: {advice}"
      ) from error
    if changed:
      what = ", ".join(
        f"{key}={theirs[key]!r} and not {made_by[key]!r}" for key in changed
      )
      raise ValueError(
        f"--out={self.out}: its {self.done} results were made with {what} "
        f"({self._options}): repeat the command that made them, {advice}"
      )

  def _find_results(self):
    for where, line in _lines(self.out):
      if not line.endswith(b"\n"):
        break
      result = _object(where, line)
      given = {k: v for k, v in result.items() if k not in _RESULT}
      row = self.rows[self.done] if self.done < len(self.rows) else None
      # Compared as text, because a NaN does not equal itself.
      if len(given) + 2 != len(result) or _json(given) != _json(row):
        raise ValueError(
          f"{where}: is not the result of line {self.done + 1} of {self.path}; "
          "delete the file, or name another --out"
        )
      self.done, self._bytes = self.done + 1, self._bytes + len(line)

  def run(
    self,
    encode: Callable[[list[str]], list[np.ndarray]],
    each: Callable[[list[np.ndarray], int], Iterator[tuple[int, str, int]]],
    made_by: Mapping[str, Any],
  ) -> None:
    """Continues the prompts that have no result yet, and logs the speed.

    encode, each: methods of a Generator. made_by: what decides the texts, as
    values of JSON by name. Raises ValueError for a prompt that cannot be
    encoded, and if something else made the results that there are, before
    anything is written. Raises OSError if the file of results cannot be
    written. On Ctrl-C its KeyboardInterrupt says how many results there are.
    """
    self._validate_made_by(made_by)
    begun, total = self.done, len(self.rows)
    prompts = self._encoded(encode)
    files.write_json(self._options, made_by)
    if begun:
      metrics.log(f"{self.out} holds {begun} of {total} results already")
    with _Progress(begun, total) as progress:
      try:
        self._write(progress.of(each(prompts, begun)))
      except KeyboardInterrupt:
        raise KeyboardInterrupt(
          f"stopped: {self.out} holds {self.done} of {total} results; the same "
          "command goes on from there"
        ) from None
    metrics.log(
      f"{self.out}: {total - begun} new texts, {progress.tokens:,} tokens, "
      f"{progress.rate()} (with the time to compile)"
    )

  def _encoded(self, encode):
    prompts = [row["prompt"] for row in self.rows[self.done :]]
    try:
      return encode(prompts)
    except ValueError:
      for i, prompt in enumerate(prompts, self.done + 1):
        try:
          encode([prompt])
        except ValueError as error:
          raise ValueError(f"{self.path}, line {i}: {error}") from error
      raise

  def _write(self, results):
    """Writes (index, text, tokens) of each, in the order of the indices."""
    waiting = {}
    with files.naming(self.out), open(self.out, "ab", buffering=0) as file:
      file.truncate(self._bytes)
      for index, text, tokens in results:
        interrupt.check()
        waiting[index] = {"text": text, "tokens": tokens}
        while self.done in waiting:
          row = self.rows[self.done] | waiting.pop(self.done)
          files.append(file, _json(row) + b"\n")
          self.done += 1


def _lines(path):
  """(its name for errors, its bytes) of each line."""
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      yield f"{path}, line {number}", line


_EXAMPLE = 'must be an object such as {"prompt": "In the beginning"}'


def _object(where, line):
  try:
    row = json.loads(line)
    _json(row)
  # A lone surrogate has no encoding, and lists may be nested too deeply.
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{where}: {_EXAMPLE}, but is not a line of JSON in UTF-8: {error}"
    ) from error
  if not isinstance(row, dict):
    raise ValueError(f"{where}: {_EXAMPLE}")
  return row


def _prompt(where, line):
  row = _object(where, line)
  if "prompt" not in row:
    raise ValueError(f'{where}: has no field "prompt", only {sorted(row)}')
  if not isinstance(row["prompt"], str):
    raise ValueError(f"{where}: prompt={row['prompt']!r}; must be a string")
  if taken := [name for name in _RESULT if name in row]:
    raise ValueError(
      f"{where}: has a field {taken[0]!r}, where the result would be written; "
      "rename it"
    )
  return row


def _json(row):
  return json.dumps(row, ensure_ascii=False).encode()


class _Progress:
  """Counts prompts and tokens, and shows a progress bar on a terminal."""

  def __init__(self, done, total):
    self._begin, self.tokens = time.perf_counter(), 0
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.completed}/{task.total} prompts"),
      rich.progress.BarColumn(bar_width=None),
      rich.progress.TextColumn("{task.fields[rate]}"),
      rich.progress.TimeRemainingColumn(),
      console=metrics.console,
      expand=True,
      disable=not metrics.console.is_terminal,
    )
    self._task = self._bar.add_task("", total=total, completed=done, rate="")

  def __enter__(self) -> Self:
    self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.stop()

  def of(self, results):
    for result in results:
      self.tokens += result.tokens
      self._bar.update(self._task, advance=1, rate=self.rate())
      yield result

  def rate(self):
    seconds = time.perf_counter() - self._begin
    return f"{self.tokens / seconds:,.0f} tokens/s"
