"""What a run writes and what a person sees while it trains."""

import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Self

import jax
import rich.console
import rich.progress
import rich.table
import tensorboardX
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

console = rich.console.Console()

# In the files and pictures, not in the line that a person follows.
_NOT_ON_THE_BAR = ("lr", "grad_norm", "per_second")

Line = dict[str, int | float | str]  # of metrics.jsonl


class Writer:
  """Metrics as JSON lines and TensorBoard events; nothing with no workdir."""

  def __init__(
    self,
    workdir: str | os.PathLike[str] | None,
    start: int = 0,
    tensorboard: bool = True,
  ):
    """start: the step that the run resumes from; later lines are dropped."""
    self._file = self._board = None
    if workdir is None:
      return
    path = pathlib.Path(workdir) / "metrics.jsonl"
    # A killed run has written beyond its last checkpoint: those steps come
    # again, and must not stand twice.
    kept = [line for line in read(workdir) if line["step"] <= start]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    self._file = path.open("a")
    if tensorboard:
      self._board = tensorboardX.SummaryWriter(
        str(workdir), purge_step=start + 1
      )

  def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    """split: "train", or the name of the split that was evaluated."""
    if self._file is None:
      return
    line = {"step": step, "split": split, **metrics}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    if self._board is not None:
      for name, value in metrics.items():
        self._board.add_scalar(f"{split}/{name}", value, step)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()


def read(workdir: str | os.PathLike[str]) -> list[Line]:
  """The lines of metrics.jsonl as dicts; a line cut off by a kill is left."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines = []
  if path.exists():
    for text in path.read_text().splitlines():
      try:
        lines.append(json.loads(text))
      except json.JSONDecodeError:
        console.print(f"{path}: dropped the unreadable line {text!r}")
  return lines


def last_evaluation(lines: Sequence[Line], split: str) -> Line | None:
  """The last line of `split`, or None if the run was not evaluated on it."""
  return next((x for x in reversed(lines) if x["split"] == split), None)


class Mean:
  """Means of metrics over the steps since they were last taken."""

  def __init__(self) -> None:
    self._sums = {}
    self._count = 0

  def add(self, metrics: Mapping[str, float]) -> None:
    self._count += 1
    for name, value in metrics.items():
      self._sums[name] = self._sums.get(name, 0.0) + float(value)

  def take(self) -> dict[str, float]:
    means = {name: value / self._count for name, value in self._sums.items()}
    self.__init__()
    return means


class Progress:
  """A bar with step, loss, accuracy, rate and time left; lines in a log.

  On a terminal the bar lives; elsewhere each call of `line` prints one line.
  """

  def __init__(self, start: int, total: int, unit: str):
    self._unit = unit
    self._total = total
    self._step = start
    # Time at work: evaluations, checkpoints and compiling do not count.
    self._seconds, self._examples, self._steps = 0.0, 0, 0
    self._last_step_time = None
    fixed = rich.table.Column(no_wrap=True)
    columns = (
      rich.progress.TextColumn(
        "step {task.completed}/{task.total}", table_column=fixed
      ),
      rich.progress.BarColumn(bar_width=None),
      rich.progress.TextColumn("{task.fields[text]}", table_column=fixed),
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
    """Stops the clock; the next step starts it again without being counted."""
    self._last_step_time = None

  def step(
    self, step: int, metrics: Mapping[str, float], examples: int
  ) -> None:
    """Moves the bar; metrics: those of the last finished step."""
    now = time.perf_counter()
    if self._last_step_time is not None:
      self._seconds += now - self._last_step_time
      self._examples += examples
      self._steps += 1
    self._last_step_time = now
    self._step = step
    self._bar.update(self._task, completed=step, text=self._text(metrics))

  def rate(self) -> float:
    """Examples a second."""
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
    """A line of the log; on a terminal the bar says it, unless it must stay."""
    if permanent or not console.is_terminal:
      text = self._text(metrics)
      log(f"step {self._step}/{self._total}  {label}  {text}")


class StepLog:
  """Writes the metrics of the step before, while the devices do the next."""

  def __init__(self, config: ConfigDict, writer: Writer, progress: Progress):
    self._config, self._writer, self._progress = config, writer, progress
    self._mean = Mean()
    self._pending = None

  def step(
    self, step: int, metrics: Mapping[str, jax.Array], examples: int
  ) -> None:
    """A step of so many examples has been given to the devices."""
    self._fetch()
    self._pending = step, metrics, examples

  def _fetch(self):
    if self._pending is None:
      return
    step, values, examples = self._pending
    self._pending = None
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    if not math.isfinite(values["loss"]):
      raise FloatingPointError(
        f"loss={values['loss']} at step {step} "
        f"(grad_norm={values['grad_norm']:.3g}, lr={values['lr']:.3g}); "
        "the newest checkpoint is from before. A lower config.optim.lr, a "
        "smaller config.optim.clip_norm or config.attn.qk_norm=layernorm help"
      )
    self._mean.add(values)
    self._progress.step(step, values, examples)
    if due(step, self._config.log.every_steps):
      means = self._mean.take()
      means["per_second"] = self._progress.rate()
      self._writer.write(step, "train", means)
      self._progress.line("train", means)

  def finish(self) -> None:
    """Waits for the step at work, and stops the clock."""
    self._fetch()
    self._progress.pause()

  def evaluation(
    self, step: int, split: str, results: Mapping[str, float]
  ) -> None:
    """Writes the results of an evaluation."""
    self._writer.write(step, split, results)
    self._progress.line(split, results, permanent=True)


def due(step: int, every: int) -> bool:
  """Whether `step` is one of every `every`; 0 means never."""
  return every > 0 and step % every == 0


def log(message: str | rich.table.Table) -> None:
  """Prints one line for an event, or a table."""
  console.print(message, highlight=False, soft_wrap=True)
  sys.stdout.flush()


class _Console(logging.Handler):
  def emit(self, record: logging.LogRecord) -> None:
    log(record.getMessage())


def set_up_logs() -> None:
  """For programs: which attention runs and why, and libraries' warnings.

  Everything that the libraries have to say comes with --verbosity=info.
  """
  if not flags.FLAGS["verbosity"].present:
    absl_logging.set_verbosity(absl_logging.WARNING)
  logger = logging.getLogger("sigattn.kernels")
  logger.setLevel(logging.INFO)
  logger.addHandler(_Console())
  logger.propagate = False
