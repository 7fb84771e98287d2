"""Tables and pictures of runs."""

import pathlib
import statistics

import jax
import rich.table

from sigattn import metrics, optim, workdirs


def parameter_table(params):
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


def finish(workdir, split, best_metric, best_mode):
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
  curves({str(workdir): [lines]}, path)
  metrics.log(f"curves: {path}")


def evaluation_table(rows, title=None):
  """A table with a row for each {name: metrics} and a column a metric."""
  names = []
  for row in rows.values():
    names += [name for name in row if name not in names and name != "split"]
  table = rich.table.Table("", *names, title=title)
  for name, row in rows.items():
    table.add_row(name, *(format_value(row.get(key)) for key in names))
  return table


def studies_table(studies):
  """A table with a column for each {name: metrics} and a row a metric."""
  names = dict.fromkeys(key for row in studies.values() for key in row)
  table = rich.table.Table("", *studies)
  for key in names:
    values = (row.get(key) for row in studies.values())
    table.add_row(key, *map(format_value, values))
  return table


def sweep(runs, root, config):
  """Prints a table of a sweep's runs and draws them all in root/sweep.png.

  runs: (what the run changes, its workdir). Runs that differ in the seed alone
  are one row: mean, standard deviation and range of their last evaluation.
  Runs without an evaluation are left out.
  """
  split, groups = config.data.eval_split, {}
  for delta, workdir in runs:
    lines = metrics.read(workdir)
    if any(line["split"] == split for line in lines):
      label = workdirs.name({k: v for k, v in delta.items() if k != "seed"})
      groups.setdefault(label, []).append(lines)
  if not groups:
    return
  table, rows = rich.table.Table("", "runs", title=f"{root}: {split}"), {}
  for label, group in groups.items():
    last = [[x for x in run if x["split"] == split][-1] for run in group]
    names = [key for key in last[0] if key not in ("step", "split")]
    if not rows:
      for key in names:
        table.add_column(key, justify="right")
    rows[label] = {key: [line[key] for line in last] for key in names}
    table.add_row(label, str(len(last)), *map(_spread, rows[label].values()))
  metrics.log(table)
  workdirs.write_json(pathlib.Path(root) / "sweep.json", rows)
  path = pathlib.Path(root) / "sweep.png"
  curves(groups, path)
  metrics.log(f"curves: {path}")


def _spread(values):
  mean = f"{statistics.fmean(values):.4f}"
  if len(values) == 1:
    return mean
  low, high = min(values), max(values)
  return f"{mean} ± {statistics.stdev(values):.4f} ({low:.4f} to {high:.4f})"


def format_value(value):
  if value is None:
    return ""
  return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def curves(groups, path):
  """Draws loss, accuracy and CER against the step, training and held out.

  groups: {label: [lines of one run, of another seed, ...]}: the mean of a
  group's runs is the line, their range the band.
  """
  import matplotlib.figure  # 0.3 s that only a finished run needs

  names = [n for n in ("loss", "accuracy", "cer") if _has(groups, n)]
  figure = matplotlib.figure.Figure(
    figsize=(5.2 * len(names), 3.6), layout="constrained"
  )
  for axes, name in zip(
    figure.subplots(1, len(names), squeeze=False)[0], names, strict=True
  ):
    for index, (label, runs) in enumerate(groups.items()):
      _draw(axes, runs, name, label, f"C{index}")
    axes.set(xlabel="step", ylabel=name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
  figure.savefig(path, dpi=120)


def _has(groups, name):
  return any(name in line for g in groups.values() for r in g for line in r)


def _draw(axes, runs, name, label, color):
  splits = dict.fromkeys(line["split"] for run in runs for line in run)
  for split in splits:
    by_step = {}
    for run in runs:
      for line in run:
        if line["split"] == split and name in line:
          by_step.setdefault(line["step"], []).append(line[name])
    if not by_step:
      continue
    steps = sorted(by_step)
    held_out = split != "train"
    axes.plot(
      steps,
      [statistics.fmean(by_step[step]) for step in steps],
      color=color,
      marker="o" if held_out else "",
      markersize=3,
      linewidth=1.5 if held_out else 0.8,
      alpha=1.0 if held_out else 0.5,
      label=f"{label} ({split})",
    )
    if held_out and len(runs) > 1:
      axes.fill_between(
        steps,
        [min(by_step[step]) for step in steps],
        [max(by_step[step]) for step in steps],
        color=color,
        alpha=0.15,
        linewidth=0,
      )
