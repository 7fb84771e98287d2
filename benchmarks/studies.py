"""The figures and numbers of RESULTS.md, from the runs of configs/studies.

  python -m benchmarks.studies runs/attention_norm --ran="H100, 2026-11-25"

A folder is named for its study and holds its runs. For each, the last
evaluation of every run goes to benchmarks/studies/STUDY.json, beside the
device and date that --ran says and the runs that did not end, and a figure to
STUDY.png where the study has one.
"""

import itertools
import json
import pathlib

from absl import app, flags
from matplotlib import figure as figures

from sigattn import metrics, report, telemetry, workdirs

OUT = pathlib.Path(__file__).parent / "studies"


def main(argv):
  for folder in argv[1:]:
    study = pathlib.Path(folder).name
    if study not in STUDIES:
      raise app.UsageError(f"{folder}: no study; choose from {[*STUDIES]}")
    runs = report.find([folder])
    ended = [run for run in runs if _file(run, "DONE.json").exists()]
    cut_off = [
      pathlib.Path(run.workdir).name for run in runs if run not in ended
    ]
    found = {"ran": flags.FLAGS.ran, "cut_off": cut_off}
    found["runs"] = {
      label: {"seed": [run.config["seed"] for run in group]}
      | _columns([_numbers(run) for run in group])
      for label, group in report.by_config(ended).items()
    }
    OUT.mkdir(exist_ok=True)
    workdirs.write_json(OUT / f"{study}.json", found)
    if study in FIGURES:
      FIGURES[study](ended).savefig(OUT / f"{study}.png", dpi=110)
    metrics.log(f"{study}: {len(ended)} runs, {len(cut_off)} cut off")


def _file(run, name):
  return pathlib.Path(run.workdir) / name


def _numbers(run):
  """What is kept of a run: its loss and accuracy, at other lengths too."""
  found = {name: run.evaluation[name] for name in ("loss", "accuracy")}
  return found | {
    f"loss, {name}": x["loss"] for name, x in _other_lengths(run).items()
  }


def _other_lengths(run):
  """What eval.py found: "4 x 256, n of the test" and so on."""
  path = _file(run, "eval.json")
  return (
    json.loads(path.read_text()).get("studies", {}) if path.exists() else {}
  )


def _columns(rows):
  return {name: [row[name] for row in rows] for name in rows[0]}


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


def learning_rate(runs):
  """The last loss by rate, for each width; QK norm in columns."""
  norms = {"none": "no QK norm", "layernorm": "QK norm"}
  figure, axes = _figure(9, 3.6, 1, 2, sharey=True)
  widths = sorted({run.config["model.width"] for run in runs})
  styles = dict(zip(widths, (":", "--", "-"), strict=True))
  lines = {}
  for run in runs:
    config = run.config
    key = config["attn.qk_norm"], _kind(config), config["model.width"]
    point = config["optim.lr"], run.evaluation["loss"]
    lines.setdefault(key, []).append(point)
  for (norm, label, width), points in sorted(lines.items()):
    axes[0, list(norms).index(norm)].semilogx(
      *zip(*sorted(points), strict=True),
      styles[width] + "o",
      color=COLORS[label],
      markersize=3,
      linewidth=1.2,
      label=f"{label}, width {width}",
    )
  for ax, title in zip(axes[0], norms.values(), strict=True):
    ax.set(title=title, xlabel="learning rate")
  axes[0, 0].set_ylabel("held-out loss")
  _legend(figure, axes)
  return figure


def length(runs):
  """Loss at multiples of the training length; positions in columns."""
  places = {
    (True, "rope"): "RoPE and ALiBi",
    (True, "none"): "ALiBi",
    (False, "rope"): "RoPE",
  }
  figure, axes = _figure(10.5, 3.4, 1, 3, sharey=True)
  for run in runs:
    config = run.config
    column = list(places).index(
      (config["attn.alibi"], config["model.positions"])
    )
    points = {}
    for name, found in _other_lengths(run).items():
      times, _, rest = name.partition(" x ")
      points.setdefault("n of the test" in rest, []).append(
        (int(times), found["loss"])
      )
    for of_test, line in points.items():
      label = "softmax" if config["attn.kind"] == "softmax" else "sigmoid"
      if of_test and label == "softmax":
        continue  # It has no n.
      axes[0, column].loglog(
        *zip(*sorted(line), strict=True),
        "--" if of_test else "-",
        color="C0" if label == "sigmoid" else COLORS[label],
        linewidth=1.2,
        label=label + (", n of the test" if of_test else ""),
      )
  for ax, title in zip(axes[0], places.values(), strict=True):
    ax.set(title=title, xlabel="length / training length")
    ax.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    ax.set_yticks([1.2, 1.5, 2, 3], ["1.2", "1.5", "2", "3"])
    ax.minorticks_off()
  axes[0, 0].set_ylabel("held-out loss")
  _legend(figure, axes)
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
  "learning_rate": learning_rate,
  "length": length,
  "recall": recall,
}
STUDIES = (*FIGURES, "hybrid_norm", "logit_bias", "multi_query")


if __name__ == "__main__":
  flags.DEFINE_string("ran", None, "Where and when the runs were made.")
  flags.mark_flag_as_required("ran")
  app.run(main)
