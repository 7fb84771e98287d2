"""Writes the metrics of a run to files and shows them while it trains."""

import contextlib
import errno
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import rich.console
import rich.progress
import rich.table
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from sigattn.training import events, files

# Printed text contains paths and names, in which rich would treat [...] as
# markup and :cat: as a picture.
console = rich.console.Console(markup=False, emoji=False)

# Metrics that are written to the files but are not shown in the progress bar.
_NOT_ON_THE_BAR = ("lr", "grad_norm", "per_second", "data_seconds")

# One line of metrics.jsonl: {"step": 100, "split": "train", "loss": 1.5, ...}.
Line = dict[str, int | float | str]


class Writer:
  """Writes metrics to workdir/metrics.jsonl and to TensorBoard event files.

  It is a context manager. Nothing is written if `workdir` is None, or if this
  is not the first process.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str] | None,
    start: int = 0,
    tensorboard: bool = True,
  ) -> None:
    """Opens the files.

    Args:
      workdir: the folder of the run, or None.
      start: the step that the run resumes from; later lines are dropped.
      tensorboard: whether to write event files too.
    """
    self._file = self._board = None
    self._open_board = lambda: None
    if workdir is None or jax.process_index():
      return  # all processes have the same metrics
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    # A killed run may have written lines after its last checkpoint. It will
    # repeat those steps, and no step may be in the file twice.
    kept = [line for line in read(workdir) if line["step"] <= start]
    # A run that was killed between its last checkpoint and its end repeats the
    # last evaluation.
    self._written = {(x["step"], x["split"]) for x in kept}
    files.write_text(self._path, "".join(map(_as_text, kept)))
    with files.naming(self._path):
      self._file = self._path.open("ab", buffering=0)
    if tensorboard:
      self._open_board = lambda: events.EventFile(workdir, start)

  def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    """Writes one line. Raises OSError, with the path, if it cannot.

    If a killed run has already written the line, it is not written again.

    split: "train", "telemetry", or the evaluation_name of the evaluated split.
    """
    if self._file is None or (step, split) in self._written:
      return
    line = {"step": step, "split": split, **metrics}
    with files.naming(self._path):
      if not os.fstat(self._file.fileno()).st_nlink:
        raise FileNotFoundError(errno.ENOENT, "it was deleted during the run")
      files.append(self._file, _as_text(line).encode())
    # A finished run that is started again writes nothing, and leaves no file.
    self._board = self._board or self._open_board()
    if self._board is not None:
      self._board.write(step, {f"{split}/{k}": v for k, v in metrics.items()})

  def write_non_finite(self, record: Mapping[str, Any]) -> str:
    """Adds a step to non_finite.json; returns the file's path.

    It returns "" if nothing is written. record: the facts about the step, with
    its number "step".
    """
    if self._file is None:
      return ""
    path = self._path.with_name("non_finite.json")
    records = []
    with contextlib.suppress(
      FileNotFoundError, ValueError, TypeError, KeyError
    ):
      # A run that resumes repeats steps.
      old = json.loads(path.read_bytes())
      records = [x for x in old if x["step"] < record["step"]]
    files.write_json(path, [*records[-99:], record])
    return str(path)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    for file in (self._file, self._board):
      if file is not None:
        file.close()


def _as_text(line):
  return json.dumps(line) + "\n"


def read(workdir: str | os.PathLike[str]) -> list[Line]:
  """Reads the lines of workdir/metrics.jsonl; none if there is no such file.

  Lines that are not valid are left out: a killed run may leave an incomplete
  line, and a damaged line may contain anything. A message says how many.
  """
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines, broken = [], []
  for number, text in enumerate(
    path.read_bytes().splitlines() if path.exists() else (), start=1
  ):
    try:
      line = json.loads(text.decode())
    except (ValueError, RecursionError):
      line = None
    if _is_line(line):
      lines.append(line)
    else:
      broken.append((number, text))
  if broken:
    number, text = broken[0]
    count = (
      "1 line that is" if len(broken) == 1 else f"{len(broken)} lines that are"
    )
    log(
      f"{path}: left out {count} not metrics; the first is line {number}: "
      f"{text[:60]!r}"
    )
  return lines


def _is_line(line):
  """Whether a value from a JSON file is a Line."""
  return (
    isinstance(line, dict)
    and type(line.get("step")) is int
    and isinstance(line.get("split"), str)
    and line["split"].isprintable()
    and all(map(str.isprintable, line))
    and all(
      type(value) in (int, float)
      for name, value in line.items()
      if name != "split"
    )
  )


def evaluation_name(split: str) -> str:
  """The name of an evaluated split in metrics.jsonl.

  It differs from the names of the lines that training writes.
  """
  return f"{split} (evaluated)" if split in ("train", "telemetry") else split


def last_evaluation(lines: Sequence[Line], split: str) -> Line | None:
  """The last line of `split`, or None if there is none.

  split: as in the lines. That of an evaluation is evaluation_name(split).
  """
  return next((x for x in reversed(lines) if x["split"] == split), None)


class Mean:
  """Means of metrics over the steps since `reset` was last called."""

  def __init__(
    self, count: int = 0, sums: Mapping[str, float] | None = None
  ) -> None:
    """count, sums: the results of `state` of another Mean."""
    self._sums = dict(sums or {})
    self._count = count

  def state(self) -> dict[str, Any]:
    """The state for a checkpoint: the arguments of a Mean that continues."""
    return {"count": self._count, "sums": self._sums}

  def add(self, metrics: Mapping[str, float]) -> None:
    """Adds the metrics of one step."""
    self._count += 1
    for name, value in metrics.items():
      self._sums[name] = self._sums.get(name, 0.0) + float(value)

  def means(self) -> dict[str, float]:
    """Returns the means."""
    return {name: value / self._count for name, value in self._sums.items()}

  def reset(self) -> None:
    """Forgets all steps."""
    self._count, self._sums = 0, {}


class Progress:
  """Shows step, loss, accuracy, rate and remaining time.

  It is a context manager. On a terminal it draws a progress bar. If the output
  is not a terminal, each call of `line` prints one line instead.

  start, total: the first and last step. unit: the task's unit, such as
  "images".
  """

  def __init__(self, start: int, total: int, unit: str) -> None:
    self._unit = unit
    self._total = total
    self._step = start
    # The time of training steps, without evaluations, checkpoints and
    # compilation, and the examples and steps of that time.
    self._seconds, self._examples, self._steps = 0.0, 0, 0
    self._last_step_time = None
    fixed = rich.table.Column(no_wrap=True)
    columns = (
      rich.progress.TextColumn(
        "step {task.completed}/{task.total}", table_column=fixed
      ),
      rich.progress.BarColumn(bar_width=None),
      rich.progress.TextColumn(
        "{task.fields[text]}", markup=False, table_column=fixed
      ),
    )
    self._bar = rich.progress.Progress(
      *columns, console=console, expand=True, disable=not console.is_terminal
    )
    self._task = self._bar.add_task("", total=total, completed=start, text="")

  def __enter__(self) -> Self:
    self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.stop()

  def pause(self) -> None:
    """Stops the clock until the next step ends; that step is not counted."""
    self._last_step_time = None

  def step(
    self, step: int, metrics: Mapping[str, float], examples: int
  ) -> None:
    """Moves the bar to a finished step, and shows its metrics."""
    now = time.perf_counter()
    if self._last_step_time is not None:
      self._seconds += now - self._last_step_time
      self._examples += examples
      self._steps += 1
    self._last_step_time = now
    self._step = step
    self._bar.update(self._task, completed=step, text=self._text(metrics))

  def rate(self) -> float:
    """Examples per second; 0 until a step has been timed."""
    return self._examples / self._seconds if self._seconds else 0.0

  def _text(self, metrics):
    first = [name for name in ("loss", "accuracy") if name in metrics]
    others = [
      name for name in metrics if name not in (*first, *_NOT_ON_THE_BAR)
    ]
    parts = [f"{name} {metrics[name]:.4f}" for name in first + others]
    if self._steps:
      left = (self._total - self._step) * self._seconds / self._steps
      minutes, seconds = divmod(round(left), 60)
      parts += [f"{self.rate():,.0f} {self._unit}/s"]
      parts += [f"{minutes}:{seconds:02d} left"]
    return "  ".join(parts)

  def line(
    self, label: str, metrics: Mapping[str, float], permanent: bool = False
  ) -> None:
    """Prints one line of the log.

    On a terminal the bar shows the same, so only `permanent` lines are printed.
    """
    if permanent or not console.is_terminal:
      text = self._text(metrics)
      log(f"step {self._step}/{self._total}  {label}  {text}")


class StepLog:
  """Writes the metrics of one step while the devices compute the next.

  Reading the metrics of the current step would make the devices wait.
  """

  def __init__(
    self,
    config: ConfigDict,
    writer: Writer,
    progress: Progress,
    state: Mapping[str, Any] | None = None,
  ) -> None:
    """state: the result of `state` when the run was saved; None for a new run.

    A line is a mean over the steps since the previous line, and a checkpoint
    may be saved between two lines.
    """
    self._config, self._writer, self._progress = config, writer, progress
    self._pending = None
    self._compiled = set()  # shapes of a batch
    state = state or {"mean": {}, "skipped": 0, "in_a_row": 0}
    self._mean = Mean(**state["mean"])
    self._skipped = state["skipped"]  # since the last line
    self._in_a_row = state["in_a_row"]

  def state(self) -> dict[str, Any]:
    """The state for a checkpoint, in JSON's types. Call it after `finish`."""
    return {
      "mean": self._mean.state(),
      "skipped": self._skipped,
      "in_a_row": self._in_a_row,
    }

  def begin(self, batch: Any) -> None:
    """Announces a step on `batch`, arrays whose shapes are compiled once.

    The time of a compilation is not counted. Raises FloatingPointError as
    `step` does.
    """
    shapes = tuple(x.shape for x in jax.tree.leaves(batch))
    if shapes not in self._compiled:
      self._compiled.add(shapes)
      self.finish()

  def step(self, step: int, metrics: Mapping[str, Any], examples: int) -> None:
    """Records a step that was started, and writes the step before it.

    Args:
      step: its number.
      metrics: its scalars and norms, which the devices may still be computing.
      examples: the number of examples in its batch.

    Raises:
      FloatingPointError: if the loss or the gradient of the previous step is
        not finite, and the config does not allow to skip it.
    """
    self._fetch()
    self._pending = step, metrics, examples

  def _fetch(self):
    if self._pending is None:
      return
    step, values, examples = self._pending
    self._pending = None
    values = dict(values)
    norms = values.pop("norms", {})
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
      self._in_a_row = 0
      self._mean.add(values)
    else:
      self._skip_or_raise(step, values, jax.device_get(norms))
    self._progress.step(step, values, examples)
    is_due = due(step, self._config.log.every_steps)
    if is_due or step == self._config.total_steps:
      means = self._mean.means() | {"per_second": self._progress.rate()}
      if self._skipped:
        means["skipped"] = self._skipped
      self._writer.write(step, "train", means)
      self._progress.line("train", means)
    # A run that is made longer later has the same means as one run.
    if is_due:
      self._mean.reset()
      self._skipped = 0

  def _skip_or_raise(self, step, values, norms):
    """Saves and prints what is known about a step that is not finite.

    Raises FloatingPointError if the run must end.
    """
    self._skipped += 1
    self._in_a_row += 1
    record = {
      "step": step,
      # The data's order depends on nothing else.
      "data": {"seed": self._config.seed, "batch": step},
      "metrics": _numbers(values),
      "norms": {name: _numbers(by) for name, by in norms.items()},
    }
    path = self._writer.write_non_finite(record)
    known = (
      f"loss={values['loss']} at step {step} (grad_norm="
      f"{values['grad_norm']:.3g}, lr={values['lr']:.3g})"
    )
    for name, by in norms.items():
      bad = [key for key, norm in by.items() if not math.isfinite(norm)]
      known += f"; {name} not finite in: {', '.join(bad) or 'no module'}"
    if path:
      known += f"; {path} has the norms, --replay={step} runs the step again"
    optim = self._config.optim
    if optim.non_finite == "skip":
      if self._in_a_row < optim.max_skipped:
        log(f"{known}. The update is left out, {self._in_a_row} in a row")
        return
      known += f". config.optim.max_skipped={optim.max_skipped} is reached"
    raise FloatingPointError(known)

  def finish(self) -> None:
    """Waits for the current step, writes its metrics and stops the clock.

    Raises FloatingPointError as `step` does.
    """
    self._fetch()
    self._progress.pause()

  def evaluation(
    self, step: int, split: str, results: Mapping[str, float]
  ) -> None:
    """Writes and prints the results of an evaluation."""
    name = evaluation_name(split)
    self._writer.write(step, name, results)
    self._progress.line(name, results, permanent=True)


def _numbers(values):
  """The values for JSON; numbers that are not finite become strings."""
  return {
    name: float(x) if math.isfinite(x) else str(float(x))
    for name, x in values.items()
  }


def due(step: int, every: int) -> bool:
  """Whether `step` is a multiple of `every`; never for every = 0."""
  return every > 0 and step % every == 0


def log(message: str | rich.table.Table) -> None:
  """Prints a line or a table, above the progress bar if there is one."""
  console.print(message, highlight=False, soft_wrap=True)
  sys.stdout.flush()


@contextlib.contextmanager
def saying_what_is_not_written() -> Iterator[None]:
  """Prints an OSError instead of raising it; the results are printed anyway."""
  try:
    yield
  except OSError as error:
    log(f"not written: {error.filename}: {error.strerror}")


def _is_news(record):
  """False for messages of Orbax that are of no use.

  An error in one of its threads is raised in our thread later. That a folder is
  only read is what we asked for.
  """
  read_only = str(record.msg).startswith("Given directory is read only")
  return "orbax" not in record.pathname or not (record.exc_info or read_only)


class _Console(logging.Handler):
  def emit(self, record: logging.LogRecord) -> None:
    is_warning = record.levelno >= logging.WARNING
    log("warning: " * is_warning + record.getMessage())


def set_up_logs() -> None:
  """Configures logging for command-line programs.

  Shows which attention implementation was chosen and why, what is to be known
  of the data, and the warnings of libraries. --verbosity=info shows the
  libraries' other messages too.
  """
  if not flags.FLAGS["verbosity"].present:
    absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_logger().addFilter(_is_news)
  for name in ("sigattn.kernels", "sigattn.data"):
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.addHandler(_Console())
    logger.propagate = False
