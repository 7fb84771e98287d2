"""Reports of runs: tables on the terminal, and a page of any set of them.

  python -m sigattn report runs/vit_sigmoid [more folders] [--out=folder]

makes one HTML page, which needs nothing beside itself, and its figures as PNG.
Every run in or below the folders is in it; runs that differ in the seed alone
are one group. The interval is Student's: mean +- t s / sqrt(n), s the standard
deviation of n runs and t the 97.5 % quantile of their n - 1 degrees of freedom.
"""

import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich.table
from absl import flags
from ml_collections import ConfigDict

from sigattn.analysis import plots, report_html, telemetry
from sigattn.training import metrics, optim, run_dir


def parameter_table(params: Any) -> rich.table.Table:
  """A table of the parameters: path, shape, number; and their sum."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  total = sum(leaf.size for _, leaf in leaves)
  table = rich.table.Table("parameter", "shape", "number")
  table.columns[2].justify = "right"
  for path, leaf in leaves:
    shape = "x".join(map(str, leaf.shape))
    table.add_row(optim.path_name(path), shape, f"{leaf.size:,}")
  table.add_section()
  table.add_row("all", "", f"{total:,}")
  return table


def finish(
  workdir: str | os.PathLike[str],
  split: str,
  best_metric: str,
  best_mode: str,
) -> None:
  """Prints the evaluations of a run and draws its curves.png."""
  lines = metrics.read(workdir)
  evals = [line for line in lines if line["split"] == split]
  if not evals:
    return
  choose = max if best_mode == "max" else min
  best = choose(evals, key=lambda line: line[best_metric])
  table = evaluation_table(
    {"best": best, "last": evals[-1]}, title=f"{workdir}: {split}"
  )
  metrics.log(table)
  path = pathlib.Path(workdir) / "curves.png"
  plots.curves({str(workdir): [lines]}, path)
  metrics.log(f"curves: {path}")


def evaluation_table(
  rows: Mapping[str, metrics.Line], title: str | None = None
) -> rich.table.Table:
  """A table with a row for each {name: metrics} and a column a metric."""
  names = []
  for row in rows.values():
    names += [name for name in row if name not in names and name != "split"]
  table = rich.table.Table("", *names, title=title)
  for name, row in rows.items():
    table.add_row(name, *(_format_value(row.get(key)) for key in names))
  return table


def variants_table(variants: Mapping[str, metrics.Line]) -> rich.table.Table:
  """A table with a column for each {name: metrics} and a row a metric."""
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
  """Prints a table of a sweep's runs and draws them all in root/sweep.png.

  runs: (what the run changes, its workdir). Runs that differ in the seed alone
  are one row: mean, standard deviation and range of their last evaluation.
  Runs without an evaluation are left out.
  """
  split, groups = config.data.eval_split, {}
  for delta, workdir in runs:
    lines = metrics.read(workdir)
    if _last(lines, split):
      label = run_dir.name({k: v for k, v in delta.items() if k != "seed"})
      groups.setdefault(label, []).append(lines)
  if not groups:
    return
  table, rows = rich.table.Table("", "runs", title=f"{root}: {split}"), {}
  for label, group in groups.items():
    last = [_last(run, split) for run in group]
    names = [key for key in last[0] if key not in ("step", "split")]
    if not rows:
      for key in names:
        table.add_column(key, justify="right")
    rows[label] = {key: [line[key] for line in last] for key in names}
    table.add_row(label, str(len(last)), *map(_spread, rows[label].values()))
  metrics.log(table)
  run_dir.write_json(pathlib.Path(root) / "sweep.json", rows)
  path = pathlib.Path(root) / "sweep.png"
  plots.curves(groups, path)
  metrics.log(f"curves: {path}")


def _last(lines, split):
  """The last evaluation of a run, or None."""
  return next((x for x in reversed(lines) if x["split"] == split), None)


def _spread(values):
  mean = f"{statistics.fmean(values):.4f}"
  if len(values) == 1:
    return mean
  low, high = min(values), max(values)
  return f"{mean} ± {statistics.stdev(values):.4f} ({low:.4f} to {high:.4f})"


def _format_value(value):
  if value is None:
    return ""
  return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


# The report_html.


class Run(NamedTuple):
  """A run's folder, read."""

  workdir: str
  config: dict[str, Any]  # flat: {"attn.kind": "sigmoid", ...}
  lines: list[metrics.Line]

  @property
  def evaluation(self) -> metrics.Line | None:
    return _last(self.lines, self.config["data.eval_split"])


def find(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
  """Every Run in or below the folders; ValueError for one that has none."""
  paths = {}
  for folder in folders:
    run_folders = [
      path.parent
      for path in sorted(pathlib.Path(folder).rglob("config.json"))
      if (path.parent / "metrics.jsonl").exists()
    ]
    if not run_folders:
      raise ValueError(f"{folder}: holds no run (config.json, metrics.jsonl)")
    paths |= dict.fromkeys(run_folders)
  return [
    Run(
      str(path),
      run_dir.flatten(run_dir.read_config(path)),
      metrics.read(path),
    )
    for path in paths
  ]


def differing(runs: Sequence[Run]) -> list[str]:
  """The keys of the config, but for the seed, that not all runs agree on."""
  keys = dict.fromkeys(key for run in runs for key in run.config)
  return [
    key
    for key in keys
    if key != "seed"
    and any(run.config.get(key) != runs[0].config.get(key) for run in runs)
  ]


def by_config(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """{label: [Run, ...]}: one group are the runs that differ in the seed alone.

  The label says what differs: attn.kind=sigmoid.
  """
  keys, groups = differing(runs), {}
  for run in runs:
    label = run_dir.name({key: run.config.get(key) for key in keys})
    groups.setdefault(label if keys else "all", []).append(run)
  return groups


def interval(
  values: Sequence[float],
) -> tuple[float, float | None, float | None, float | None]:
  """(mean, standard deviation, low, high) with the 95 % interval of the mean.

  Student's t, see the module; one value alone has neither: None.
  """
  import scipy.stats  # 0.4 s that only a page needs

  mean, n = statistics.fmean(values), len(values)
  if n == 1:
    return mean, None, None, None
  deviation = statistics.stdev(values)
  half = scipy.stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n)
  return mean, deviation, mean - half, mean + half


def write(
  folders: Sequence[str | os.PathLike[str]],
  out: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
  """Writes the page of all runs in the folders, and PNGs; returns its path.

  out: a folder, by default `report` in the first of them.
  """
  groups = by_config(find(folders))
  out = pathlib.Path(out or pathlib.Path(folders[0]) / "report")
  out.mkdir(parents=True, exist_ok=True)
  lines = {k: [run.lines for run in runs] for k, runs in groups.items()}
  curves = {name: plots.curve(lines, name) for name in _curve_names(groups)}
  measured = {
    name: plots.layers_by_step(lines, name)
    for name in plots.measured_quantities(lines)
  }
  for name, figure in (curves | measured).items():
    plots.save(figure, out / f"{name}.png", "png")
  sections = [
    ("Runs", _RUNS, report_html.table(*_runs_table(groups))),
    ("Final evaluation", _FINAL, report_html.table(*_final_table(groups))),
    ("Curves", _CURVES, report_html.figures(curves)),
  ]
  if measured:
    wide = len(groups) > 1
    body = report_html.figures(measured, telemetry.QUANTITIES, wide)
    sections.append(("Telemetry, layer by step", _TELEMETRY, body))
  path = out / "index.html"
  title = f"Report of {', '.join(map(str, folders))}"
  count = sum(map(len, groups.values()))
  note = f"Runs: {count}. Those that differ in the seed alone are one group."
  path.write_text(report_html.document(title, note, sections))
  return path


_RUNS = "The values of the config that differ, and the runs of each group."
_FINAL = (
  "The last evaluation of each run: mean and standard deviation (sd) over the "
  "runs of a group, and the 95 % confidence interval of the mean by Student's "
  "t distribution with one degree of freedom less than runs. Runs that have "
  "not come as far as others of their group are left out."
)
_CURVES = (
  "Line: mean over the runs of a group. Band: their range. Thick: held out. "
  "Thin: training, means since the line before."
)
_TELEMETRY = (
  "Line: mean over heads and runs. Band: their range. Layers go from purple to "
  "yellow; other modules of the model are grey."
)


def _curve_names(groups):
  """Metrics to draw: what is evaluated, and the gradient's norm."""
  names = {}
  for run in _all_runs(groups):
    names |= dict.fromkeys(run.evaluation or ())
  names = [x for x in names if x not in ("step", "split") and "@" not in x]
  return [*names, "grad_norm"]


def _all_runs(groups):
  return [run for runs in groups.values() for run in runs]


def _runs_table(groups):
  keys = differing(_all_runs(groups))
  rows = []
  for runs in groups.values():
    values = [str(runs[0].config.get(key)) for key in keys]
    seeds = ", ".join(str(run.config["seed"]) for run in runs)
    places = ", ".join(run.workdir for run in runs)
    rows.append([*values, len(runs), seeds, places])
  return [*keys, "runs", "seeds", "folders"], rows


def _final_table(groups):
  """A row a metric and group, of the runs that have come furthest in it."""
  rows_by_metric = {}
  for label, runs in groups.items():
    step = max((run.evaluation or {"step": -1})["step"] for run in runs)
    last = [
      run.evaluation
      for run in runs
      if run.evaluation and run.evaluation["step"] == step
    ]
    count = (
      f"{len(last)} of {len(runs)}" if len(last) < len(runs) else len(runs)
    )
    for name in last[0] if last else ():
      if name not in ("step", "split"):
        row = [label, step, count, *interval([line[name] for line in last])]
        rows_by_metric.setdefault(name, []).append(row)
  columns = ["metric", "group", "step", "runs", "mean", "sd", "95 % from", "to"]
  rows = [[name, *row] for name, rows in rows_by_metric.items() for row in rows]
  return columns, rows


def define_flags() -> None:
  """The flags of `python -m sigattn report`, besides the folders."""
  flags.DEFINE_string(
    "out", None, "A folder; by default `report` in the first."
  )


def run(flag_values: flags.FlagValues, folders: list[str]) -> None:
  """Writes the page of the runs in the folders, and prints its path."""
  metrics.log(f"report: {write(folders, flag_values.out)}")
