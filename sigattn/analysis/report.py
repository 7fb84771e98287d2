"""Tables on the terminal: evaluations, and the runs of a sweep."""

import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import rich.measure
import rich.table
from ml_collections import ConfigDict

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
  lines, name = metrics.read(workdir), metrics.evaluation_name(split)
  evals = [
    line for line in lines if line["split"] == name and best_metric in line
  ]
  if not evals:
    return
  choose = max if best_mode == "max" else min
  best = choose(evals, key=lambda line: line[best_metric])
  title = f"{workdir}: evaluations on {split}"
  for table in evaluation_tables({"best": best, "last": evals[-1]}, title):
    metrics.log(table)
  _draw({str(workdir): [lines]}, pathlib.Path(workdir) / "curves.png")


def _draw(groups, path):
  """Draws the curves of plots.curves and says where they are."""
  # Every start of train.py and of its worker processes would wait 0.5 s for
  # matplotlib.
  from sigattn.analysis import plots

  with metrics.saying_what_is_not_written():
    plots.curves(groups, path)
    metrics.log(f"curves: {path}")


def evaluation_tables(
  rows: Mapping[str, metrics.Line], title: str | None = None
) -> list[rich.table.Table]:
  """Tables with one row per {name: metrics} and one column per metric.

  Each is as wide as the terminal at most.
  """
  names = dict.fromkeys(name for row in rows.values() for name in row)
  columns = {
    name: [_format_value(row.get(name)) for row in rows.values()]
    for name in names
    if name not in ("split", "source")
  }
  return _fitting({"": [*rows]}, columns, title=title)


def variants_tables(
  variants: Mapping[str, metrics.Line],
) -> list[rich.table.Table]:
  """Tables with one column per {name: metrics} and one row per metric.

  Each is as wide as the terminal at most.
  """
  names = [*dict.fromkeys(key for row in variants.values() for key in row)]
  columns = {
    name.replace(", ", ",\n"): [_format_value(row.get(key)) for key in names]
    for name, row in variants.items()
  }
  return _fitting({"": names}, columns)


def _fitting(first, columns, **options):
  """Tables with all of the columns, {header: cells}, in as few as fit.

  Each begins with the columns `first`.
  """
  console = metrics.console
  unlimited = console.options.update(max_width=10**6)
  tables, shown = [], {}
  for name, cells in columns.items():
    longer = _table(first | shown | {name: cells}, options)
    size = rich.measure.Measurement.get(console, unlimited, longer)
    if shown and size.maximum > console.width:
      tables.append(_table(first | shown, options))
      shown = {}
    shown[name] = cells
  return [*tables, _table(first | shown, options)]


def _table(columns, options):
  table = rich.table.Table(*columns, **options)
  for row in zip(*columns.values(), strict=True):
    table.add_row(*row)
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
  split, groups = metrics.evaluation_name(config.data.eval_split), {}
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
  rows = {}
  for label, group in groups.items():
    last = [metrics.last_evaluation(lines, split) for lines in group]
    names = [key for key in last[0] if key not in ("step", "split")]
    rows[label] = {key: [line[key] for line in last] for key in names}
  first = {
    "": [shown[label] for label in rows],
    "runs": [str(len(group)) for group in groups.values()],
  }
  columns = {
    key: [_spread(row[key]) for row in rows.values()]
    for key in next(iter(rows.values()))
  }
  # The range is on a line of its own, so that two metrics fit in 80 columns.
  caption = "mean ± standard deviation, and the range below"
  options = {"title": f"{root}: {split}", "show_lines": True}
  if any(len(group) > 1 for group in groups.values()):
    options["caption"] = caption
  for table in _fitting(first, columns, **options):
    metrics.log(table)
  with metrics.saying_what_is_not_written():
    files.write_json(pathlib.Path(root) / "sweep.json", rows)
    _draw(groups, pathlib.Path(root) / "sweep.png")


def _spread(values):
  """Mean, deviation and range on two lines; a single value as it is."""
  mean = f"{statistics.fmean(values):.4f}"
  if len(values) == 1:
    return mean
  low, high = min(values), max(values)
  return f"{mean} ± {statistics.stdev(values):.4f}\n{low:.4f} to {high:.4f}"


def _format_value(value):
  if value is None:
    return ""
  return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
