"""Tables on the terminal: evaluations, and the runs of a sweep."""

import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import rich.table
from ml_collections import ConfigDict

from sigattn.analysis import plots
from sigattn.training import files, metrics, run_dir


def finish(
  workdir: str | os.PathLike[str],
  split: str,
  best_metric: str,
  best_mode: str,
) -> None:
  """Prints the best and last evaluations of a run and draws curves.png.

  Does nothing if the run was never evaluated on `split`.

  Args:
    workdir: the run's folder; curves.png is written there.
    split: the evaluated split.
    best_metric: the metric that decides which evaluation is the best.
    best_mode: "max" or "min", which values of best_metric are better.
  """
  lines = metrics.read(workdir)
  evals = [
    line for line in lines if line["split"] == split and best_metric in line
  ]
  if not evals:
    return
  choose = max if best_mode == "max" else min
  best = choose(evals, key=lambda line: line[best_metric])
  title = f"{workdir}: evaluations on {split}"
  table = evaluation_table({"best": best, "last": evals[-1]}, title)
  metrics.log(table)
  path = pathlib.Path(workdir) / "curves.png"
  with metrics.saying_what_is_not_written():
    plots.curves({str(workdir): [lines]}, path)
    metrics.log(f"curves: {path}")


def evaluation_table(
  rows: Mapping[str, metrics.Line], title: str | None = None
) -> rich.table.Table:
  """A table with one row per {name: metrics} and one column per metric."""
  names = []
  for row in rows.values():
    names += [name for name in row if name not in names and name != "split"]
  table = rich.table.Table("", *names, title=title)
  for name, row in rows.items():
    table.add_row(name, *(_format_value(row.get(key)) for key in names))
  return table


def variants_table(variants: Mapping[str, metrics.Line]) -> rich.table.Table:
  """A table with one column per {name: metrics} and one row per metric."""
  names = dict.fromkeys(key for row in variants.values() for key in row)
  table = rich.table.Table("", *variants)
  for key in names:
    values = (row.get(key) for row in variants.values())
    table.add_row(key, *map(_format_value, values))
  return table


def sweep(
  runs: Sequence[tuple[Mapping[str, object], str]],
  root: str | os.PathLike[str],
  config: ConfigDict,
) -> None:
  """Prints a table of a sweep's runs and draws their curves.

  Runs that differ only in the seed share a row, which shows the mean, standard
  deviation and range of their last evaluations. Runs without an evaluation are
  left out. Also writes root/sweep.json and root/sweep.png.

  Args:
    runs: (the config values that the run changes, its workdir) of each run.
    root: the folder of the sweep.
    config: the config that all runs share; its data.eval_split is reported.
  """
  split, groups = config.data.eval_split, {}
  shown = {}  # {label: the same on a line for each value}
  for delta, workdir in runs:
    lines = metrics.read(workdir)
    if metrics.last_evaluation(lines, split):
      values = {k: v for k, v in delta.items() if k != "seed"}
      label = run_dir.name(values)
      shown[label] = "\n".join(f"{k}={v}" for k, v in values.items()) or label
      groups.setdefault(label, []).append(lines)
  if not groups:
    return
  table, rows = rich.table.Table(title=f"{root}: {split}"), {}
  table.add_column(no_wrap=True)  # a row is told by the whole of its name
  table.add_column("runs")
  for label, group in groups.items():
    last = [metrics.last_evaluation(lines, split) for lines in group]
    names = [key for key in last[0] if key not in ("step", "split")]
    if not rows:
      for key in names:
        table.add_column(key, justify="right")
    rows[label] = {key: [line[key] for line in last] for key in names}
    table.add_row(
      shown[label], str(len(last)), *map(_spread, rows[label].values())
    )
  metrics.log(table)
  with metrics.saying_what_is_not_written():
    files.write_json(pathlib.Path(root) / "sweep.json", rows)
    path = pathlib.Path(root) / "sweep.png"
    plots.curves(groups, path)
    metrics.log(f"curves: {path}")


def _spread(values):
  """Mean, standard deviation and range as text; a single value as it is."""
  mean = f"{statistics.fmean(values):.4f}"
  if len(values) == 1:
    return mean
  low, high = min(values), max(values)
  return f"{mean} ± {statistics.stdev(values):.4f} ({low:.4f} to {high:.4f})"


def _format_value(value):
  if value is None:
    return ""
  return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
