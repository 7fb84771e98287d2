"""Makes the figures and numbers of RESULTS.md from the runs of configs/studies.

  python -m benchmarks.studies runs/attention_norm --ran="H100, 2026-11-25"

Each folder has the name of a study and contains its runs. For each study it
writes benchmarks/results/studies/STUDY.json, which holds the last evaluation of
every run and the device and date that --ran names, and a figure, STUDY.png.
Runs that did not reach their last step are not drawn. The JSON file lists them
with the step that they reached.
"""

import itertools
import json
import pathlib
import statistics
from collections.abc import Sequence

from absl import app, flags
from matplotlib import figure as figures

from sigattn.analysis import report_html, telemetry
from sigattn.training import files, metrics

OUT = pathlib.Path(__file__).parent / "results" / "studies"


def main(argv: Sequence[str]) -> None:
  """Writes the JSON and PNG files of the studies whose folders argv lists."""
  for folder in argv[1:]:
    study = pathlib.Path(folder).name
    if study not in FIGURES:
      raise app.UsageError(
        f"{folder}: {study!r} is not a study; choose from {[*FIGURES]}"
      )
    runs = report_html.find([folder])
    results = {
      "ran": flags.FLAGS.ran,
      "runs": {
        k: _row(group) for k, group in report_html.by_config(runs).items()
      },
    }
    finished = [run for run in runs if _is_finished(run)]
    if study in DERIVED:
      results[DERIVED[study].__name__] = DERIVED[study](finished)
    OUT.mkdir(exist_ok=True)
    files.write_json(OUT / f"{study}.json", results)
    figure = FIGURES[study](finished)
    figure.savefig(OUT / f"{study}.png", dpi=110)
    metrics.log(f"{study}: {len(finished)} of {len(runs)} runs finished")


def _is_finished(run):
  last = run.evaluation
  return last is not None and last["step"] == run.config["total_steps"]


def _row(group):
  """The JSON entry of a group of runs that differ only in the seed."""
  finished = [run for run in group if _is_finished(run)]
  row = {
    "seed": [run.config["seed"] for run in finished],
    "loss": [run.evaluation["loss"] for run in finished],
    "accuracy": [run.evaluation["accuracy"] for run in finished],
  }
  cut_off = [run for run in group if not _is_finished(run)]
  if cut_off:
    row["cut_off"] = {
      "seed": [run.config["seed"] for run in cut_off],
      "step": [run.lines[-1]["step"] for run in cut_off],
    }
  return row


def _figure(width, height, rows=1, columns=1, **options):
  figure = figures.Figure((width, height), layout="constrained")
  axes = figure.subplots(rows, columns, squeeze=False, **options)
  for ax in axes.flat:
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
  return figure, axes


def _kind(config):
  """The label of an attention kind, a key of COLORS: "softmax", "b = 0"."""
  if config["attn.kind"] != "sigmoid":
    return config["attn.kind"]
  bias = config["attn.logit_bias"]
  return "b = -log n" if bias in (None, -6.238) else f"b = {bias:g}"


def _series(run, split, value):
  """(steps, values) of a run's lines of one split.

  value: a function of a line.
  """
  lines = [line for line in run.lines if line["split"] == split]
  return [x["step"] for x in lines], [value(x) for x in lines]


def _loss(line):
  return line["loss"]


def _attention_v(line):
  """Mean over layers and heads of |A V| / sqrt(n), for examples of n = 512."""
  values = [
    x for name, x in line.items() if name.startswith("attention_v_norm")
  ]
  return sum(values) / len(values) / 512**0.5


def attention_norm(runs: Sequence[report_html.Run]) -> figures.Figure:
  """Norm of the attention output and training loss, by position encoding."""
  places = {"sincos": "sines", "rope": "RoPE", "none": "ALiBi"}
  figure, axes = _figure(10.5, 5.4, 2, 3, sharex=True, sharey="row")
  for run in runs:
    column = list(places).index(run.config["model.positions"])
    label = _kind(run.config)
    style = dict(color=COLORS[label], linewidth=1)
    axes[0, column].semilogy(
      *_series(run, telemetry.SPLIT, _attention_v), **style, label=label
    )
    axes[1, column].plot(*_series(run, "train", _loss), **style)
  for ax, place in zip(axes[0], places.values(), strict=True):
    ax.set_title(place)
  axes[0, 0].set_ylabel("|A V| of a token (rms)")
  axes[1, 0].set(ylabel="training loss", ylim=(1.2, 2.6))
  for ax in axes[1]:
    ax.set_xlabel("step")
  _legend(figure, axes)
  return figure


def _dots(runs, ticks, tick, value, ylabel, label=_kind):
  """A figure with a dot for each run.

  ticks: {value of tick(config): its label on the axis}. Values that no run has
    are not drawn.
  tick: a function of a run's config. It decides the position on the axis.
  value: a function of an evaluation. It returns the height of the dot.
  label: a function of a config. It returns a key of COLORS.
  """
  figure, axes = _figure(7, 3.4)
  order = list(COLORS).index
  runs = sorted(runs, key=lambda run: order(label(run.config)))
  labels = list(dict.fromkeys(label(run.config) for run in runs))
  present = {tick(run.config) for run in runs}
  ticks = {place: name for place, name in ticks.items() if place in present}
  for run in runs:
    name = label(run.config)
    shift = labels.index(name) - (len(labels) - 1) / 2
    axes[0, 0].plot(
      list(ticks).index(tick(run.config)) + 0.15 * shift,
      value(run.evaluation),
      "o",
      color=COLORS[name],
      alpha=0.8,
      label=name,
    )
  axes[0, 0].set_xticks(range(len(ticks)), ticks.values(), fontsize="small")
  axes[0, 0].set(xlim=(-0.5, len(ticks) - 0.5), ylabel=ylabel)
  axes[0, 0].grid(visible=False, axis="x")
  _legend(figure, axes)
  return figure


def _accuracy(line):
  return 100 * line["accuracy"]


def layer_scale(runs: Sequence[report_html.Run]) -> figures.Figure:
  """Accuracy with and without LayerScale and QK norm."""
  scales = {None: "no LayerScale", 1e-4: "LayerScale 1e-4"}
  return _dots(
    runs,
    {
      (scale, norm): f"{scales[scale]}\n{QK_NORMS[norm]}"
      for scale, norm in itertools.product(scales, QK_NORMS)
    },
    lambda config: (config["model.layer_scale"], config["attn.qk_norm"]),
    _accuracy,
    "held-out accuracy, %",
  )


def multi_query(runs: Sequence[report_html.Run]) -> figures.Figure:
  """Accuracy by the number of key heads."""
  return _dots(
    runs,
    {6: "6 heads of keys", 2: "2 heads", 1: "1 head"},
    lambda config: config["attn.num_kv_heads"],
    _accuracy,
    "held-out accuracy, %",
  )


def logit_bias(runs: Sequence[report_html.Run]) -> figures.Figure:
  """Loss by the initial bias, constant or trained."""
  return _dots(
    runs,
    {-6.238: "from -log n", 0.0: "from 0", -10.0: "from -10"},
    lambda config: config["attn.logit_bias"],
    _loss,
    "held-out loss",
    lambda config: "trained" if config["attn.learn_logit_bias"] else "constant",
  )


def hybrid_norm(runs: Sequence[report_html.Run]) -> figures.Figure:
  """Loss by length, learning rate and placement of the norms."""
  return _dots(
    runs,
    {
      (length, lr, norm): f"n = {length}\nlr {lr:g}\n{norm}"
      for length, lr, norm in itertools.product(
        (128, 2048), (5e-3, 2e-3), ("pre", "hybrid")
      )
    },
    lambda config: (
      config["data.length"],
      config["optim.lr"],
      config["model.norm"],
    ),
    _loss,
    "held-out loss",
  )


def learning_rate(runs: Sequence[report_html.Run]) -> figures.Figure:
  """Loss by learning rate for each width, and sensitivity by width."""
  figure, axes = _figure(11, 3.2, 1, 4)
  widths = (64, 128, 256)
  for (label, width, _), group in _by_width(runs).items():
    kind, qk_norm = label.split(", ")
    axes[0, widths.index(width)].semilogx(
      [run.config["optim.lr"] for run in group],
      [run.evaluation["loss"] for run in group],
      LINES[qk_norm],
      color=COLORS[kind],
      markersize=4,
      label=label,
    )
  for label, values in sensitivity(runs).items():
    kind, qk_norm = label.split(", ")
    axes[0, 3].plot(
      range(len(widths)),
      [statistics.fmean(values[f"width {width}"]) for width in widths],
      LINES[qk_norm],
      color=COLORS[kind],
      markersize=4,
    )
  for ax, width in zip(axes[0], widths, strict=False):
    ax.set(title=f"width {width}", xlabel="learning rate", ylim=(1.2, 2.9))
  axes[0, 0].set_ylabel("held-out loss")
  axes[0, 3].set(title="sensitivity", xlabel="width", ylim=(0, None))
  axes[0, 3].set_xticks(range(len(widths)), widths)
  _legend(figure, axes)
  return figure


def sensitivity(
  runs: Sequence[report_html.Run],
) -> dict[str, dict[str, list[float]]]:
  """The sensitivity to the learning rate, {model: {width: [one per seed]}}.

  Take min(final loss, initial loss) for each learning rate. The sensitivity is
  the mean of these values minus the lowest; see
  configs/studies/learning_rate.py.
  """
  sensitivities = {}
  for (label, width, _), group in _by_width(runs).items():
    final = [min(run.evaluation["loss"], run.lines[0]["loss"]) for run in group]
    value = statistics.fmean(final) - min(final)
    sensitivities.setdefault(label, {}).setdefault(f"width {width}", []).append(
      value
    )
  return sensitivities


def _by_width(runs):
  """{(model, width, seed): the runs, sorted by learning rate}."""
  groups, keys = {}, ("model.width", "optim.lr")
  for run in sorted(runs, key=lambda run: [run.config[x] for x in keys]):
    config = run.config
    label = f"{_kind(config)}, {QK_NORMS[config['attn.qk_norm']]}"
    key = label, config["model.width"], config["seed"]
    groups.setdefault(key, []).append(run)
  return groups


def length(runs: Sequence[report_html.Run]) -> figures.Figure:
  """Loss by the length of the test, for each position encoding."""
  places = {
    (True, "rope"): "ALiBi and RoPE",
    (True, "none"): "ALiBi",
    (False, "rope"): "RoPE",
  }
  figure, axes = _figure(10.5, 3.2, 1, 3)
  for run in runs:
    place = run.config["attn.alibi"], run.config["model.positions"]
    ax = axes[0, list(places).index(place)]
    for whose_n, losses in _losses_by_length(run).items():
      if run.config["attn.kind"] == "softmax" and whose_n == "n of the test":
        continue  # softmax does not depend on n
      name = _kind(run.config)
      ax.semilogx(
        losses.keys(),
        losses.values(),
        "--o" if whose_n == "n of the test" else "-o",
        color=COLORS[name],
        linewidth=1,
        markersize=3,
        label=f"{name}, {whose_n}" if name != "softmax" else name,
      )
  for ax, place in zip(axes[0], places.values(), strict=True):
    ax.set(title=place, xlabel="length of the test")
    ticks = [256, 512, 1024, 2048]
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
  for ax in axes[0, :2]:
    ax.set_ylim(1.18, 1.32)
  axes[0, 0].set_ylabel("held-out loss")
  _legend(figure, axes)
  return figure


def longer(
  runs: Sequence[report_html.Run],
) -> dict[str, dict[str, dict[int, list[float]]]]:
  """Losses at other lengths, {model: {whose n: {length: [one per seed]}}}.

  whose n: "n of the training" or "n of the test", the n of sigmoid attention.
  """
  losses = {}
  for label, group in report_html.by_config(runs).items():
    each = [_losses_by_length(run) for run in group]
    losses[label] = {
      whose_n: {size: [x[whose_n][size] for x in each] for size in sizes}
      for whose_n, sizes in each[0].items()
    }
  return losses


def _losses_by_length(run):
  """{whose n: {length: loss}} from the eval.json of a run."""
  path = pathlib.Path(run.workdir) / "eval.json"
  losses_by_n = {}
  for name, values in json.loads(path.read_text())["variants"].items():
    lengths, _, whose_n = name.partition(", ")
    factor, trained = map(int, lengths.split(" x "))
    losses = losses_by_n.setdefault(whose_n or "n of the training", {})
    losses[factor * trained] = values["loss"]
  return losses_by_n


def activations(runs: Sequence[report_html.Run]) -> figures.Figure:
  """Training loss of each kind of attention."""
  figure, axes = _figure(7, 3.8)
  for run in runs:
    label = _kind(run.config) + SCALED[run.config["attn.row_power"]]
    axes[0, 0].plot(
      *_series(run, "train", _loss),
      color=COLORS[label],
      linewidth=1,
      label=label,
    )
  axes[0, 0].set(xlabel="step", ylabel="training loss", ylim=(1.2, 2.6))
  _legend(figure, axes)
  return figure


def recall(runs: Sequence[report_html.Run]) -> figures.Figure:
  """Training accuracy by step, for 16 pairs (every variant) and for 8 pairs.

  Every training example is new, so this is the accuracy on unseen examples.
  """
  figure, axes = _figure(10.5, 3.4, 1, 2, sharex=True, sharey=True)
  kinds = {"softmax": "C1", "sigmoid": "C0", "relu": "C2"}
  for run in runs:
    kind, is_long = run.config["attn.kind"], run.config["data.length"] == 16
    label = _kind(run.config) + SCALED[run.config["attn.row_power"]]
    axes[0, 0 if is_long else 1].plot(
      *_series(run, "train", lambda line: line["accuracy"]),
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
  """Adds one legend for all the axes. Each label occurs once in it.

  place: the figure or the axes to which the legend is added.
  """
  handle_of = {}
  for ax in axes.flat:
    handles, labels = ax.get_legend_handles_labels()
    handle_of |= dict(zip(labels, handles, strict=True))
  place.legend(handle_of.values(), handle_of, loc=loc, frameon=False)


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
  "constant": "C0",
  "trained": "C3",
}
QK_NORMS = {"none": "no QK norm", "layernorm": "QK norm"}
LINES = {"no QK norm": "--o", "QK norm": "-o"}
DERIVED = {"learning_rate": sensitivity, "length": longer}
FIGURES = {
  "activations": activations,
  "attention_norm": attention_norm,
  "hybrid_norm": hybrid_norm,
  "layer_scale": layer_scale,
  "learning_rate": learning_rate,
  "length": length,
  "logit_bias": logit_bias,
  "multi_query": multi_query,
  "recall": recall,
}


if __name__ == "__main__":
  flags.DEFINE_string("ran", None, "The device and date of the runs.")
  flags.mark_flag_as_required("ran")
  app.run(main)
