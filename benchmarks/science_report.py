"""Writes the tables and pictures of the studies into docs/science.md.

  python -m benchmarks.science_report

It reads the files benchmarks/results/science/STUDY.json, which
`benchmarks.science` wrote, and draws STUDY.png beside each. The tables replace
the text between two comments of docs/science.md. A study without a file is not
listed. A run that was cut off is listed as such.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app
from matplotlib import figure as figures

from benchmarks import science
from sigattn.training import metrics

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "science"
DOCUMENT = ROOT / "docs" / "science.md"
BEGIN = "<!-- begin of what benchmarks.science_report writes -->"
END = "<!-- end of what benchmarks.science_report writes -->"
_LEARNT = 0.9  # the tables list the update that reaches this accuracy


def settings(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
  """{label of a setting: its rows}, from short rows to long ones."""
  groups = {}
  for row in sorted(rows, key=lambda row: row["setting"].get("data.length", 0)):
    groups.setdefault(_label(row["setting"]), []).append(row)
  return groups


def _label(setting):
  """Describes a setting of STUDIES in words."""
  length, size = setting.get("data.length"), setting.get("data.size")
  if "data.vocab_size" in setting:
    return {
      "recall": f"{length} pairs",
      "noisy_recall": f"{length} pairs, {length} distractors",
      "selective_copy": f"{size} of {length} symbols to copy",
    }[setting.get("data.name", "recall")]
  parts = [f"rows of {length:,} tokens"] if length else []
  positions = [
    name
    for name, is_there in (
      ("RoPE", setting.get("model.positions") == "rope"),
      ("ALiBi", setting.get("attn.alibi")),
    )
    if is_there
  ]
  if positions:
    parts.append(" and ".join(positions))
  if "attn.window" in setting:
    parts.append(f"a window of {setting['attn.window'] + 1} tokens")
  return ", ".join(parts) or "the default config"


def _step(curve, every):
  """The update at which a curve of accuracies reaches _LEARNT, as text."""
  steps = [i for i, value in enumerate(curve) if value >= _LEARNT]
  return str(every * (steps[0] + 1)) if steps else "none"


def _cells(row, study):
  """The cells of a row after the form and the learning rate."""
  if "test" not in row:
    if "cut_off" in row:
      return [f"cut off: {row['cut_off']}"]
    return [f"failed: {row['error'].strip().splitlines()[-1]}"]
  if study["metric"] == "accuracy":
    cells = [", ".join(f"{100 * x:.1f}" for x in row["test"]["accuracy"])]
    every = study["curve_every_updates"]
    steps = (_step(x, every) for x in row["curve"]["accuracy"])
    return [*cells, ", ".join(steps)]
  cells = [", ".join(f"{x:.3f}" for x in row["test"]["loss"])]
  for losses in row.get("loss_at", {}).values():
    cells.append(f"{sum(losses) / len(losses):.3f}")
  for shares in row.get("far_share", {}).values():
    values = [x for layers in shares for x in layers]
    cells.append(f"{100 * sum(values) / len(values):.0f} %")
  return cells


def _columns(rows, study):
  if study["metric"] == "accuracy":
    return ["test accuracy, %, each seed", f"update of {_LEARNT:.0%}"]
  columns = ["test loss, nats, each seed"]
  done = next((row for row in rows if "test" in row), {})
  columns += [f"mean at {length}" for length in done.get("loss_at", {})]
  return columns + [
    f"far keys' share at {length}" for length in done.get("far_share", {})
  ]


def tables(name: str, study: dict[str, Any]) -> str:
  """The Markdown of one study: device, command, picture and tables."""
  rows = study["rows"]
  devices = sorted({row["device"] for row in rows if "device" in row})
  seeds = ", ".join(str(x) for x in study["seeds"])
  rates = ", ".join(f"{x:g}" for x in study["lrs"])
  lines = [
    f"### {science.STUDIES[name].title}",
    "",
    f"{', '.join(devices) or 'No run was finished'}, {study['date']}, commit "
    f"{study['commit']}, jax {study['jax']}; seeds {seeds}; learning rates "
    f"{rates}.",
    "",
    f"`{study['command']}`",
    "",
    f"![Study {name}](../benchmarks/results/science/{name}.png)",
  ]
  for label, group in settings(rows).items():
    columns = ["form", "learning rate", *_columns(group, study)]
    lines += ["", f"**{label}**", "", line(columns)]
    lines.append(line(["---"] * len(columns)))
    for row in group:
      rate = f"{row['lr']:g}" if "lr" in row else ""
      cells = [row["form"], rate, *_cells(row, study)]
      lines.append(line(cells + [""] * (len(columns) - len(cells))))
  return "\n".join(lines)


def line(cells: Sequence[str]) -> str:
  """A line of a table in Markdown."""
  return f"| {' | '.join(cells)} |"


def draw(study: dict[str, Any]) -> figures.Figure:
  """Draws losses by setting, losses by length, or curves of training."""
  groups = settings(study["rows"])
  by_setting = study["metric"] == "loss" and not any(
    "loss_at" in row for row in study["rows"]
  )
  trained = {
    label: rows
    for label, rows in groups.items()
    if any("test" in row for row in rows)
  }
  panels = {"": study["rows"]} if by_setting or not trained else trained
  columns = min(len(panels), 2)
  count = -(-len(panels) // columns)
  figure = figures.Figure((5.2 * columns, 3.6 * count), layout="constrained")
  by_length = study["metric"] == "loss" and not by_setting
  axes = figure.subplots(
    count, columns, squeeze=False, sharey=by_length
  ).ravel()
  forms = list(dict.fromkeys(row["form"] for row in study["rows"]))
  for ax, (label, rows) in zip(axes, panels.items(), strict=False):
    for row in rows:
      if "test" in row:
        index = forms.index(row["form"])
        style = dict(color=f"C{index % 10}", label=row["form"], linewidth=1)
        style["linestyle"] = "--" if index >= 10 else "-"
        if by_setting:
          place = [row in group for group in groups.values()].index(True)
          _dots(ax, place + 0.8 * (index + 0.5) / len(forms) - 0.4, row, style)
        else:
          _lines(ax, row, study, style)
    if by_setting:
      names = [
        name.replace(", ", "\n").replace("rows of ", "rows of\n")
        for name in groups
      ]
      ax.set_xticks(range(len(groups)), names, fontsize="small")
      ax.set(ylabel="test loss")
    ax.set_title(label, fontsize="small")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
  for ax in axes[len(panels) :]:
    ax.set_visible(False)
  add_legend(figure)
  return figure


def _dots(ax, place, row, style):
  """A dot for each seed."""
  losses = row["test"]["loss"]
  style = style | {"linestyle": "", "marker": "o", "markersize": 4}
  ax.plot([place] * len(losses), losses, **style)


def _lines(ax, row, study, style):
  """A line for each seed: the loss by length, or the curve of training."""
  if "loss_at" in row:
    lengths = [int(x) for x in row["loss_at"]]
    for losses in zip(*row["loss_at"].values(), strict=True):
      ax.semilogx(lengths, losses, marker="o", markersize=3, **style)
    ax.set_xticks(lengths, lengths)
    ax.minorticks_off()
    ax.set(xlabel="tokens of a row", ylabel="test loss")
    return
  metric, every = study["metric"], study["curve_every_updates"]
  for curve in row["curve"][metric]:
    ax.plot([every * (i + 1) for i in range(len(curve))], curve, **style)
  ax.set(xlabel="update", ylabel=f"training {metric}")


def add_legend(figure: figures.Figure) -> None:
  """Adds one legend below all axes, with each label once."""
  handles = {}
  for ax in figure.axes:
    lines, labels = ax.get_legend_handles_labels()
    handles |= dict(zip(labels, lines, strict=True))
  figure.legend(
    handles.values(), handles.keys(), loc="outside lower center", ncols=2,
    frameon=False, fontsize="small",
  )  # fmt: skip


def write(
  results: pathlib.Path = RESULTS, document: pathlib.Path = DOCUMENT
) -> list[str]:
  """Draws the pictures and replaces the tables of the document.

  Returns the names of the studies that have a file. Raises ValueError if the
  document lacks the two comments.
  """
  parts, drawn = {}, {}
  for name in science.STUDIES:
    file = results / f"{name}.json"
    if file.exists():
      study = json.loads(file.read_text())
      parts[name] = tables(name, study)
      drawn[name] = draw(study)
  put(document, BEGIN, END, "".join(f"\n{x}\n" for x in parts.values()))
  for name, figure in drawn.items():
    figure.savefig(results / f"{name}.png", dpi=110)
  return list(parts)


def put(document: pathlib.Path, begin: str, end: str, middle: str) -> None:
  """Puts a text between two lines of a document, in place of what was there.

  Raises ValueError if the document does not have each of the lines once.
  """
  text = document.read_text()
  if text.count(begin) != 1 or text.count(end) != 1:
    raise ValueError(f"{document}: must contain {begin!r} and {end!r} once")
  before, after = text.split(begin)[0], text.split(end)[1]
  document.write_text(f"{before}{begin}\n{middle}{end}{after}")


def main(argv) -> None:
  """Rewrites docs/science.md."""
  del argv
  metrics.log(f"studies: {', '.join(write()) or 'none'}")


if __name__ == "__main__":
  app.run(main)
