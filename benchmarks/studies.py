"""The figures and numbers of RESULTS.md, from the runs of configs/studies.

  python -m benchmarks.studies runs/attention_norm --ran="H100, 2026-11-25"

A folder is named for its study and holds its runs. For each, the last
evaluation of every run goes to benchmarks/studies/STUDY.json, beside the
device and date that --ran says, and a figure to STUDY.png.
"""

import itertools
import pathlib

from absl import app, flags
from matplotlib import figure as figures

from sigattn import metrics, report, telemetry, workdirs

OUT = pathlib.Path(__file__).parent / "studies"


def main(argv):
  for folder in argv[1:]:
    study = pathlib.Path(folder).name
    if study not in FIGURES:
      raise app.UsageError(f"{folder}: no figure; choose from {[*FIGURES]}")
    runs = report.find([folder])
    rows = {
      label: {
        "seed": [run.config["seed"] for run in group],
        "loss": [run.evaluation["loss"] for run in group],
        "accuracy": [run.evaluation["accuracy"] for run in group],
      }
      for label, group in report.by_config(runs).items()
    }
    OUT.mkdir(exist_ok=True)
    workdirs.write_json(
      OUT / f"{study}.json", {"ran": flags.FLAGS.ran, "runs": rows}
    )
    figure = FIGURES[study](runs)
    figure.savefig(OUT / f"{study}.png", dpi=110)
    metrics.log(f"{study}: {len(runs)} runs")


def _figure(width, height, rows=1, columns=1, **options):
  figure = figures.Figure((width, height), layout="constrained")
  axes = figure.subplots(rows, columns, squeeze=False, **options)
  for ax in axes.flat:
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
  return figure, axes


def _kind(config):
  """softmax, b = 0 and so on."""
  if config["attn.kind"] != "sigmoid":
    return config["attn.kind"]
  bias = config["attn.logit_bias"]
  return "b = -log n" if bias in (None, -6.238) else f"b = {bias:g}"


def _split(run, split, value):
  """(steps, values) of a run's lines; value: a function of a line."""
  lines = [line for line in run.lines if line["split"] == split]
  return [x["step"] for x in lines], [value(x) for x in lines]


def _loss(line):
  return line["loss"]


def _attention_v(line):
  """Mean over heads of ||A V|| of an example of n = 512, over sqrt(n)."""
  values = [
    x for name, x in line.items() if name.startswith("attention_v_norm")
  ]
  return sum(values) / len(values) / 512**0.5


def attention_norm(runs):
  places = {"sincos": "sines", "rope": "RoPE", "none": "ALiBi"}
  figure, axes = _figure(10.5, 5.4, 2, 3, sharex=True, sharey="row")
  for run in runs:
    column = list(places).index(run.config["model.positions"])
    label = _kind(run.config)
    style = dict(color=COLORS[label], linewidth=1)
    axes[0, column].semilogy(
      *_split(run, telemetry.SPLIT, _attention_v), **style, label=label
    )
    axes[1, column].plot(*_split(run, "train", _loss), **style)
  for ax, place in zip(axes[0], places.values(), strict=True):
    ax.set_title(place)
  axes[0, 0].set_ylabel("|A V| of a token (rms)")
  axes[1, 0].set(ylabel="training loss", ylim=(1.2, 2.6))
  for ax in axes[1]:
    ax.set_xlabel("step")
  _legend(figure, axes)
  return figure


def layer_scale(runs):
  figure, axes = _figure(7, 3.4)
  norms, scales = ("none", "layernorm"), (None, 1e-4)
  ticks = list(itertools.product(scales, norms))
  kinds = ("softmax", "b = -log n", "b = 0")
  for run in runs:
    config, label = run.config, _kind(run.config)
    place = ticks.index((config["model.layer_scale"], config["attn.qk_norm"]))
    axes[0, 0].plot(
      place + 0.2 * (kinds.index(label) - 1),
      100 * run.evaluation["accuracy"],
      "o",
      color=COLORS[label],
      alpha=0.8,
      label=label,
    )
  names = [f"LayerScale {scale}\nQK norm {norm}" for scale, norm in ticks]
  axes[0, 0].set_xticks(range(len(ticks)), names, fontsize="small")
  axes[0, 0].set_ylabel("held-out accuracy, %")
  _legend(figure, axes)
  return figure


def activations(runs):
  figure, axes = _figure(7, 3.8)
  for run in runs:
    label = _kind(run.config) + SCALED[run.config["attn.row_power"]]
    axes[0, 0].plot(
      *_split(run, "train", _loss),
      color=COLORS[label],
      linewidth=1,
      label=label,
    )
  axes[0, 0].set(xlabel="step", ylabel="training loss", ylim=(1.2, 2.6))
  _legend(figure, axes)
  return figure


def recall(runs):
  """Accuracy on new examples: 16 pairs, every variant; then 8 pairs."""
  figure, axes = _figure(10.5, 3.4, 1, 2, sharex=True, sharey=True)
  kinds = {"softmax": "C1", "sigmoid": "C0", "relu": "C2"}
  for run in runs:
    kind, is_long = run.config["attn.kind"], run.config["data.length"] == 16
    label = _kind(run.config) + SCALED[run.config["attn.row_power"]]
    axes[0, 0 if is_long else 1].plot(
      *_split(run, "train", lambda line: line["accuracy"]),
      color=kinds[kind] if is_long else COLORS[label],
      linewidth=0.9,
      label=kind if is_long else label,
    )
  axes[0, 0].set(ylabel="accuracy", title="16 pairs, all variants")
  axes[0, 1].set(title="8 pairs")
  for ax in axes[0]:
    ax.set_xlabel("step")
  _legend(axes[0, 0], axes[:, :1], loc="center right")
  _legend(figure, axes[:, 1:])
  return figure


def _legend(place, axes, loc="outside right upper"):
  """One for all the axes, with each label once; place: a figure or axes."""
  found = {}
  for ax in axes.flat:
    handles, labels = ax.get_legend_handles_labels()
    found |= dict(zip(labels, handles, strict=True))
  place.legend(found.values(), found, loc=loc, frameon=False)


SCALED = {0.0: "", 0.5: ", rows / sqrt(i)", 1.0: ", rows / i"}
COLORS = {
  "softmax": "C1",
  "b = -log n": "C0",
  "b = 0": "C3",
  "b = -10": "C4",
  "b = 0, rows / sqrt(i)": "C5",
  "b = 0, rows / i": "C6",
  "relu": "C2",
  "relu2": "C8",
}
FIGURES = {
  "activations": activations,
  "attention_norm": attention_norm,
  "layer_scale": layer_scale,
  "recall": recall,
}


if __name__ == "__main__":
  flags.DEFINE_string("ran", None, "Where and when the runs were made.")
  flags.mark_flag_as_required("ran")
  app.run(main)
