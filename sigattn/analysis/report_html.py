"""Writes an HTML page about any set of runs.

  python -m sigattn report runs/vit_sigmoid [more folders] [--out=folder]

The page covers every run in or below the folders. Runs that differ only in the
seed form one group. The page shows which config values differ, the final
evaluations, the training curves, and the telemetry of runs that have it. It is
one file, needs no network, and can be read on a screen and on paper. It
contains its style sheet. Its figures are SVG in the colour of the text, so that
they follow a light or dark theme. The figures are also saved as PNG.

The confidence interval of a mean is Student's: mean +- t s / sqrt(n), where s
is the standard deviation of n runs and t is the 97.5 % quantile of the t
distribution with n - 1 degrees of freedom.
"""

import collections
import hashlib
import html
import io
import math
import os
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import rich.table
from absl import flags
from matplotlib.figure import Figure

from sigattn.analysis import plots, telemetry
from sigattn.training import files, metrics, run_dir

_RUNS = "The config values that differ between groups, and each group's runs."
_FINAL = (
  "The last evaluation of each run: mean and standard deviation (sd) over the "
  "runs of a group, and the 95 % confidence interval of the mean by Student's "
  "t distribution with n - 1 degrees of freedom for n runs. It is wide for few "
  "runs: of two, it reaches 9 sd to either side of the mean. Runs that have "
  "made fewer steps than others of their group are left out. If two runs of a "
  "group have the same seed, they are not independent: sd and interval are "
  "then left out."
)
_CURVES = (
  "Line: mean over the runs of a group. Band: their range. Thick lines: "
  "held-out data. Thin lines: training, averaged since the previous point."
)
_TELEMETRY = (
  "Line: mean over heads and runs. Band: their range. Colours go from purple "
  "(first layer) to yellow (last layer); other modules of the model are grey."
)

# Config keys, or their prefixes, that do not change what a run learns.
_NOT_LEARNED = (
  "ckpt.", "eval.", "log.", "mesh.", "telemetry.", "attn.implementation",
  "data.num_workers", "model.loss_chunks", "model.max_unrolled", "model.remat",
)  # fmt: skip

# Runs and groups of runs.


class Run(NamedTuple):
  """The contents of one run's folder."""

  workdir: str
  config: dict[str, Any]  # flat: {"attn.kind": "sigmoid", ...}
  lines: list[metrics.Line]  # of metrics.jsonl

  @property
  def evaluation(self) -> metrics.Line | None:
    """The last evaluation on the run's own held-out split, or None."""
    split = self.config.get("data.eval_split")
    name = metrics.evaluation_name(split)
    return metrics.last_evaluation(self.lines, name)


def find(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
  """Reads every run in or below the folders, each run once.

  Raises ValueError for a folder that contains no run.
  """
  paths = {}  # a dict, because the folders may overlap
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
  """The config keys, except the seed, whose values differ between the runs.

  A key that only some of the configs have counts as differing. A number of
  steps that is the same share of total_steps in all runs does not.
  """
  keys = dict.fromkeys(key for run in runs for key in run.config)
  return [
    key
    for key in keys
    if key != "seed"
    and any(run.config.get(key) != runs[0].config.get(key) for run in runs)
    and not _follows_total_steps([run.config for run in runs], key)
  ]


def _follows_total_steps(configs, key):
  """Whether a key such as eval.every_steps is a share of 1/k in all configs."""
  if not key.endswith("_steps") or key == "total_steps":
    return False
  pairs = [(config.get("total_steps"), config.get(key)) for config in configs]
  if not all(isinstance(x, int) for pair in pairs for x in pair):
    return False
  # The configs round down, or up where 0 would be refused.
  return any(
    all(sign * (sign * total // k) == steps for total, steps in pairs)
    for k in range(2, 101)
    for sign in (1, -1)
  )


def by_config(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Groups the runs that differ only in the seed: {label: [Run, ...]}.

  The label names the values that distinguish a group: attn.kind=sigmoid. How a
  run is logged, saved and computed is named only if nothing else tells the
  groups apart.
  """
  keys = differing(runs)

  def groups(keys):
    found = {}
    for run in runs:
      label = run_dir.name({key: run.config.get(key) for key in keys})
      found.setdefault(label if keys else "all", []).append(run)
    return found

  whole = groups(keys)
  short = groups([x for x in keys if not x.startswith(_NOT_LEARNED)])
  return short if len(short) == len(whole) else whole


def interval(
  values: Sequence[float],
) -> tuple[float, float | None, float | None, float | None]:
  """(mean, standard deviation, low, high) with the 95 % interval of the mean.

  The interval is Student's; the module's docstring has the formula. For a
  single value everything except the mean is None.
  """
  import scipy.stats  # The import takes 0.4 s; only this needs it.

  mean, n = statistics.fmean(values), len(values)
  if n == 1:
    return mean, None, None, None
  deviation = statistics.stdev(values)
  half = scipy.stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n)
  return mean, deviation, mean - half, mean + half


# The page and its parts.


def write(
  folders: Sequence[str | os.PathLike[str]],
  out: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
  """Writes the page and the PNG figures of all runs; returns the page's path.

  Args:
    folders: each run in or below them is included.
    out: the folder to write to; None means `report` in the first folder.

  Raises:
    ValueError: for a folder that contains no run, and if `out` is the name of a
      page, not of a folder.
  """
  return _write(by_config(find(folders)), folders, out)


def _write(groups, folders, out):
  out = _out(folders, out)
  with files.naming(out):
    out.mkdir(parents=True, exist_ok=True)
  lines = {k: [run.lines for run in runs] for k, runs in groups.items()}
  curves = {name: plots.curve(lines, name) for name in _curve_names(groups)}
  layers = {
    name: plots.layers_by_step(lines, name)
    for name in plots.measured_quantities(lines)
  }
  for name, figure in (curves | layers).items():
    path = out / f"{_safe(name)}.png"
    with files.naming(path):
      plots.save(figure, path, "png")
  sections = [
    ("Runs", _RUNS, table(*_runs_table(groups))),
    ("Final evaluation", _FINAL, table(*_final_table(groups))),
    ("Curves", _CURVES, figures(curves)),
  ]
  if layers:
    body = figures(layers, telemetry.QUANTITIES, wide=len(groups) > 1)
    sections.append(("Telemetry, layer by step", _TELEMETRY, body))
  path = out / "index.html"
  title = f"Report of {', '.join(map(str, folders))}"
  count = sum(map(len, groups.values()))
  note = f"{count} runs. Runs that differ only in the seed form one group."
  files.write_text(path, document(title, note, sections))
  return path


def _out(folders, out):
  out = pathlib.Path(out or pathlib.Path(folders[0]) / "report")
  if out.suffix == ".html" or out.is_file():
    raise ValueError(
      f"out={str(out)!r}; must be a folder, in which the page is index.html, "
      "with its pictures beside it"
    )
  return out


def _safe(name):
  """Turns the name of a metric into the name of a file and of an element.

  A metrics.jsonl from elsewhere may contain any names. If a character is
  replaced, a hash is added, so that different names stay different.
  """
  safe = re.sub(r"[^A-Za-z0-9_=-]", "_", name)[:80]
  if safe == name:
    return name
  digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
  return f"{safe}-{digest[:8]}"


def _all_runs(groups):
  return [run for runs in groups.values() for run in runs]


def _curve_names(groups):
  """The metrics to draw: the evaluated ones and the norm of the gradient."""
  names = {}
  for run in _all_runs(groups):
    names |= dict.fromkeys(run.evaluation or ())
  # loss@0:16 and the like are losses by position, too many to draw.
  names = [x for x in names if x not in ("step", "split") and "@" not in x]
  return [*names, "grad_norm"]


def _runs_table(groups):
  """(columns, rows) of a table with one row per group."""
  keys = differing(_all_runs(groups))
  rows = []
  for runs in groups.values():
    values = [str(runs[0].config.get(key)) for key in keys]
    seeds = ", ".join(str(run.config.get("seed")) for run in runs)
    folders = ", ".join(run.workdir for run in runs)
    rows.append([*values, len(runs), seeds, folders])
  return [*keys, "runs", "seeds", "folders"], rows


def _final_table(groups):
  """(columns, rows) of a table with one row per metric and group.

  Only the runs that were evaluated at their group's highest step are included.
  """
  rows_by_metric = {}
  for label, runs in groups.items():
    step = max((run.evaluation or {"step": -1})["step"] for run in runs)
    counted = [
      run for run in runs if run.evaluation and run.evaluation["step"] == step
    ]
    last = [run.evaluation for run in counted]
    seeds = collections.Counter(run.config.get("seed") for run in counted)
    twice = {seed for seed, times in seeds.items() if times > 1}
    if twice:
      metrics.log(
        f"{label}: several runs have the seed {', '.join(map(str, twice))}, so "
        "they are not independent; sd and interval are left out"
      )
    count = (
      f"{len(last)} of {len(runs)}" if len(last) < len(runs) else len(runs)
    )
    for name in last[0] if last else ():
      if name not in ("step", "split"):
        spread = interval([line[name] for line in last])
        if twice:
          spread = spread[0], None, None, None
        rows_by_metric.setdefault(name, []).append(
          [label, step, count, *spread]
        )
  columns = ["metric", "group", "step", "runs", "mean", "sd", "95 % from", "to"]
  rows = [[name, *row] for name, rows in rows_by_metric.items() for row in rows]
  return columns, rows


# HTML.

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff;
  --faint: #666; --line: #d4d4d4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181c; --faint: #a0a0a0;
    --line: #3c4047; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { max-width: 44rem; margin: .4rem 0; }
.note, figcaption { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); }
td.number, th.number { text-align: right; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.figures.wide { grid-template-columns: 100%; }
figure { margin: .4rem 0; }
svg { max-width: 100%; height: auto; }
@media print {
  @page { margin: 16mm; }
  :root { --ink: #000; --paper: #fff; --faint: #444; --line: #bbb; }
  body { margin: 0; max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  h2, p { break-after: avoid; break-inside: avoid; }
  figure, tr { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; }
  svg { max-height: 64mm; }
}
"""


def document(
  title: str, note: str, sections: Sequence[tuple[str, str, str]]
) -> str:
  """The HTML of the whole page.

  sections: (heading, explanation, HTML) of each section.
  """
  parts = [
    f"<section><h2>{html.escape(heading)}</h2>\n"
    f'<p class="note">{html.escape(text)}</p>\n{body}</section>'
    for heading, text, body in sections
  ]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
    f"<body><h1>{html.escape(title)}</h1>\n"
    f'<p class="note">{html.escape(note)}</p>\n'
    + "\n".join(parts)
    + "\n</body></html>\n"
  )


def table(
  columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]
) -> str:
  """The HTML of a table; None makes an empty cell.

  Columns that contain nothing but numbers are aligned to the right.
  """
  numeric = [
    all(isinstance(row[i], (int, float, type(None))) for row in rows)
    for i in range(len(columns))
  ]

  def cells(tag, row):
    return "".join(
      f"<{tag}{' class=number' if number else ''}>{_text(cell)}</{tag}>"
      for cell, number in zip(row, numeric, strict=True)
    )

  body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
  return (
    f'<div class="scroll"><table><thead><tr>{cells("th", columns)}</tr>'
    f"</thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
  )


def _text(cell):
  if cell is None:
    return ""
  if isinstance(cell, float):
    return f"{cell:.4g}" if abs(cell) < 1e-3 else f"{cell:.4f}"
  return html.escape(str(cell))


def figures(
  by_name: Mapping[str, Figure],
  captions: Mapping[str, str] | None = None,
  wide: bool = False,
) -> str:
  """The HTML of figures, which stand side by side if the window is wide enough.

  by_name: {name: figure}. captions: {name: text that follows the name in the
  caption}. wide: gives each figure the full width.
  """
  parts = []
  for name, figure in by_name.items():
    caption = f"{name}: {captions[name]}" if captions else name
    parts.append(
      f"<figure>{_svg(figure, name)}\n"
      f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
  size = " wide" if wide else ""
  return f'<div class="figures{size}">' + "\n".join(parts) + "</div>\n"


def _svg(figure, name):
  """The figure as an SVG element in the colour of the page's text."""
  file = io.StringIO()
  plots.save(figure, file, "svg")
  text = file.getvalue().replace(plots.INK, "currentColor")
  text = text[text.index("<svg") :]
  # The prefix makes the ids unique: the page has several figures.
  text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{_safe(name)}-", text)
  return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


# The command.


def define_flags() -> None:
  """Defines the flags of `python -m sigattn report`."""
  flags.DEFINE_string(
    "out",
    None,
    "The folder to write to; by default `report` in the first of the folders.",
  )


def run(flag_values: flags.FlagValues, folders: list[str]) -> None:
  """Writes the page about the runs in the folders and prints its path.

  If it cannot be written, the final evaluations are printed instead.
  """
  groups = by_config(find(folders))
  try:
    metrics.log(f"report: {_write(groups, folders, flag_values.out)}")
  except OSError as error:
    columns, rows = _final_table(groups)
    final = rich.table.Table(*columns)
    for row in rows:
      final.add_row(*("" if x is None else str(x) for x in row))
    metrics.log(final)
    metrics.log(f"not written: {error.filename}: {error.strerror}")
