"""Writes the tables and pictures of the 85M models into RESULTS.md.

  python -m benchmarks.lm_85m_report

It reads benchmarks/results/lm_85m.json, which `benchmarks.lm_85m` wrote, draws
training.png, lengths.png and copying.png into benchmarks/results/lm_85m/, and
replaces the text between two comments of RESULTS.md by two tables. Without the
file of results, nothing remains between the comments.
"""

import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from absl import app
from matplotlib import figure as figures

from benchmarks import lm_85m, science_report
from configs import lm_85m as configs
from sigattn.training import metrics

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENT = ROOT / "RESULTS.md"
PICTURES = ROOT / "benchmarks" / "results" / "lm_85m"
BEGIN = "<!-- begin of what benchmarks.lm_85m_report writes -->"
END = "<!-- end of what benchmarks.lm_85m_report writes -->"
LABELS = {
  "softmax": "softmax",
  "sigmoid": "sigmoid, b = −log n",
  "normalized": "normalised, b = −log n",
  "normalized_low_bias": "normalised, b = −14",
}
_COLORS = {form: f"C{i}" for i, form in enumerate(LABELS)}
# The line at the length of training.
_TRAINED = dict(color="grey", linewidth=0.7, linestyle=":")
_LINES = ("-", "--", ":")  # of the seeds 0, 1 and 2
# The share of a curve that the search for spikes leaves out, because the first
# gradients are large in every run. The learning rate grows in half of it.
_START = 0.1

Rows = Sequence[dict[str, Any]]


def spike(row: dict[str, Any]) -> float | None:
  """The gradient's largest norm divided by its median, after the start.

  The first tenth of the updates does not count. The result is None if the
  curves of the run have nothing after it.
  """
  curves = row["curves"]
  first = int(_START * len(curves["step"]))
  norms = curves["grad_norm"][first:]
  if not norms:
    return None
  return max(curves["grad_norm_max"][first:]) / statistics.median(norms)


def tables(rows: Rows) -> str:
  """The Markdown of the whole runs, and of the short ones by learning rate."""
  devices = ", ".join(sorted({row["device"] for row in rows}))
  commits = ", ".join(sorted({row["commit"] for row in rows}))
  lines = [f"{devices}; commit {commits}.", "", *_whole_table(rows)]
  short = [row for row in rows if row["short"]]
  rates = sorted({row["lr"] for row in short})
  if rates:
    lines += [
      "",
      f"The validation loss after {lm_85m.SHORT_STEPS} updates, by the "
      "learning rate:",
      "",
      science_report.line(["form", *(f"{rate:g}" for rate in rates)]),
      science_report.line(["---"] * (1 + len(rates))),
    ]
    for form, group in _by_form(short).items():
      cells = {row["lr"]: _loss(row) for row in group}
      cells = [cells.get(rate, "") for rate in rates]
      lines.append(science_report.line([LABELS[form], *cells]))
  return "\n".join(lines)


def _whole_table(rows):
  """The lines of the table. A column without any number is left out."""
  forms = _by_form(_whole(rows))
  columns = {
    "learning rate": lambda row: f"{row['lr']:g}",
    "tokens": lambda row: f"{row['tokens'] / 1e6:.0f} M",
    "validation loss": _loss,
    "test loss": _number("test_loss", "{:.3f}"),
    "cloze, %": lambda row: row["cloze"] and f"{100 * row['cloze']['acc']:.1f}",
    "largest gradient / median": lambda row: (x := spike(row)) and f"{x:.1f}",
    "tokens/s": _number("tokens_per_second", "{:,.0f}"),
    "seconds a step": _number("seconds_per_step", "{:.3f}"),
  }
  table = {}
  for name, cell in columns.items():
    cells = [_joined(map(cell, group)) for group in forms.values()]
    if any(cells):
      table[name] = cells
  yield science_report.line(["form", *table])
  yield science_report.line(["---"] * (1 + len(table)))
  for form, *cells in zip(forms, *table.values(), strict=True):
    yield science_report.line([LABELS[form], *cells])


def _number(name, form):
  return lambda row: None if row[name] is None else form.format(row[name])


def _joined(cells):
  """The cells of a form's runs; only one if they are equal."""
  cells = [cell for cell in cells if cell]
  return cells[0] if len({*cells}) == 1 else "; ".join(cells)


def _present(values):
  return (x for x in values if x is not None)


def _loss(row):
  if row["validation_loss"] is None:
    return f"diverged at update {row['diverged_at']}"
  return f"{row['validation_loss']:.3f}"


def _whole(rows):
  return [row for row in rows if not row["short"]]


def _by_form(rows):
  """{form: its rows by seed}, in the order of the configs."""
  groups = {
    form: sorted(
      (row for row in rows if row["form"] == form), key=lambda x: x["seed"]
    )
    for form in configs.FORMS
  }
  return {form: group for form, group in groups.items() if group}


# Pictures. A form has a colour, and a seed a kind of line.


def draw_training(rows: Rows) -> figures.Figure:
  """Loss, attention's norm and largest logit; each form's gradient below."""
  figure = figures.Figure((12, 6.4), layout="constrained")
  above, below = figure.subfigures(2, 1)
  loss, norm, logit = above.subplots(1, 3)
  forms = _by_form(_whole(rows))
  gradients = below.subplots(1, len(forms), sharey=True, squeeze=False)[0]
  for ax, (form, group) in zip(gradients, forms.items(), strict=True):
    for row in group:
      _draw_curves(loss, ax, row["curves"], _style(row))
      _draw_telemetry(norm, logit, row["telemetry"], _style(row))
    ax.set(title=LABELS[form])
  below.suptitle(
    "norm of the gradient before clipping: a line at the median of neighbouring"
    " updates, and bars up to the largest of them",
    fontsize="medium",
  )
  norm.set(yscale="log", title="|A V|, mean over heads and layers")
  loss.set(title="training loss, nats a token")
  # The first losses are those of a uniform guess, and leave no room for others.
  losses = [row["curves"]["loss"] for row in _whole(rows)]
  loss.set_ylim(top=max((x[len(x) // 20] for x in losses if x), default=None))
  logit.set(title="largest logit with its bias, of all layers")
  return _finished(figure, xlabel="update")


def _draw_curves(loss, gradient, curves, style):
  steps = curves["step"]
  loss.plot(steps, curves["loss"], **style)
  gradient.semilogy(steps, curves["grad_norm"], **style)
  gradient.vlines(
    steps, curves["grad_norm"], curves["grad_norm_max"], linewidth=1,
    color=style["color"], alpha=0.5, linestyle=style["linestyle"],
  )  # fmt: skip


def _draw_telemetry(norm, logit, telemetry, style):
  style = style | {"marker": "."}
  if telemetry["step"]:
    norms = zip(*telemetry["attention_v_norm"], strict=True)
    norm.plot(telemetry["step"], [*map(statistics.fmean, norms)], **style)
    logits = zip(*telemetry["logit_max"], strict=True)
    logit.plot(telemetry["step"], [*map(max, logits)], **style)


def draw_lengths(rows: Rows) -> figures.Figure:
  """Loss by position in long rows, beside softmax, and by the rows' length."""
  figure = figures.Figure((13, 4), layout="constrained")
  by_position, difference, by_length = figure.subplots(1, 3)
  rows = [row for row in _whole(rows) if row["lengths"]]
  reference = [_positions(x, 0) for x in rows if x["form"] == "softmax"]
  for row in rows:
    style = _style(row) | {"marker": "."}
    by_position.semilogx(*_points(_positions(row, -1)), **style)
    own = _positions(row, 0)
    if reference:
      apart = {
        x: y - statistics.fmean(losses[x] for losses in reference)
        for x, y in own.items()
      }
      difference.semilogx(*_points(apart), **style)
    lengths = {_length(x): y["loss"] for x, y in row["lengths"].items()}
    by_length.semilogx(*_points(lengths), **style)
    for ax, marks in (
      (by_position, [*_positions(row, -1)][::2]),
      (difference, [*own][::2]),
      (by_length, [*lengths]),
    ):
      _mark(ax, marks)
    for ax in (by_position, by_length):
      ax.axvline(min(lengths), **_TRAINED)
  by_position.set(
    title="test loss, nats a token",
    xlabel="position in the row, 4 times the training length",
  )
  difference.set(
    title="test loss minus that of softmax",
    xlabel="position in the row, of the training length",
  )
  by_length.set(title="test loss, nats a token", xlabel="tokens of a row")
  return _finished(figure)


def _length(name):
  """The tokens of a row of the variant "2 x 2048"."""
  factor, length = name.split(" x ")
  return int(factor) * int(length)


def _positions(row, index):
  """{the end of a part of the row: loss} of a variant, by its index."""
  losses = list(row["lengths"].values())[index]
  return {
    int(name.split(":")[1]): loss
    for name, loss in losses.items()
    if name.startswith("loss@")
  }


def draw_copying(rows: Rows) -> figures.Figure:
  """The accuracy of copying by distance, and that of the first reading."""
  figure = figures.Figure((7, 4.2), layout="constrained")
  ax = figure.subplots()
  first = {}
  for row in _whole(rows):
    if not row["copying"]:
      continue
    found = {int(x): y for x, y in row["copying"].items()}
    copied = {x: 100 * y["copied"] for x, y in found.items()}
    ax.semilogx(*_points(copied), marker=".", **_style(row))
    for x, y in found.items():
      first.setdefault(x, []).append(100 * y["first"])
  if first:
    means = {x: statistics.fmean(y) for x, y in first.items()}
    ax.semilogx(
      *_points(means), color="grey", linestyle=":", linewidth=1,
      label="at its first reading, mean of all",
    )  # fmt: skip
    _mark(ax, first, rotation=45)
    ax.axvline(configs.get_config("softmax").data.length, **_TRAINED)
  ax.set(
    xlabel="distance of the copy, tokens", ylabel="accuracy at the copy, %"
  )
  return _finished(figure)


def _mark(ax, numbers, **style):
  """Makes whole numbers the only ticks of a logarithmic axis."""
  ax.set_xticks([*numbers], [f"{x:,}" for x in numbers], **style)
  ax.minorticks_off()


def _points(values):
  return [*values], [*values.values()]


def _style(row):
  return dict(
    color=_COLORS[row["form"]],
    label=LABELS[row["form"]] + f", seed {row['seed']}" * (row["seed"] > 0),
    linestyle=_LINES[row["seed"] % len(_LINES)],
    linewidth=1.2,
  )


def _finished(figure, **labels):
  for ax in figure.axes:
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(**labels)
    ax.title.set_size("medium")
  science_report.add_legend(figure)
  return figure


DRAWN: dict[str, Callable[[Rows], figures.Figure]] = {
  "training": draw_training,
  "lengths": draw_lengths,
  "copying": draw_copying,
}
_CAPTIONS = {
  "training": "Loss, norms and logits during training",
  "lengths": "Test loss by position and by length",
  "copying": "Accuracy of copying by distance",
}


def write(
  results: pathlib.Path = lm_85m.RESULTS,
  document: pathlib.Path = DOCUMENT,
  pictures: pathlib.Path = PICTURES,
) -> list[str]:
  """Draws the pictures and rewrites the document's part.

  Returns the names of the runs. Raises ValueError for a document without the
  two comments.
  """
  rows = lm_85m.read_rows(results)
  middle = f"\n{tables(rows)}\n" if rows else ""
  drawn = {}
  for name, draw in DRAWN.items() if _whole(rows) else ():
    path = pictures / f"{name}.png"
    drawn[path] = draw(rows)
    place = path.relative_to(document.parent)
    middle += f"\n![{_CAPTIONS[name]}]({place})\n"
  science_report.put(document, BEGIN, END, middle)
  for path, figure in drawn.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
  return [f"{row['form']} {row['lr']:g} {row['seed']}" for row in rows]


def main(argv) -> None:
  """Rewrites RESULTS.md's part."""
  del argv
  metrics.log(f"runs: {', '.join(write()) or 'none'}")


if __name__ == "__main__":
  app.run(main)
