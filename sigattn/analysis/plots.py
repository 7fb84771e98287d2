"""Draws figures of runs: curves of metrics, telemetry, and attention weights.

Runs are given as groups, {label: [lines of one run, lines of another seed,
...]}. The lines are results of sigattn.training.metrics.read.
"""

import itertools
import math
import os
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import IO

import matplotlib as mpl
import numpy as np
from matplotlib import figure as figures

from sigattn.analysis import telemetry
from sigattn.training import metrics

Groups = Mapping[str, Sequence[Sequence[metrics.Line]]]

INK = "#010101"  # of text and axes; report_html replaces it in an SVG
_STYLE = {
  "axes.edgecolor": INK,
  "axes.labelcolor": INK,
  "text.color": INK,
  "xtick.color": INK,
  "ytick.color": INK,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.grid": True,
  "grid.alpha": 0.25,
  "grid.color": "grey",
  "legend.frameon": False,
  "legend.fontsize": "small",
  "text.parse_math": False,  # a metric's name may contain $
  "svg.fonttype": "none",
  "svg.hashsalt": "sigattn",  # the same figure gives the same file
}
_SIZE = 5.2, 3.6  # width and height of one plot in inches
_CURVES = ("loss", "accuracy", "cer", "knn_accuracy", "feature_std")
_DASHES = ("-", "--", ":", "-.")
_LOG_SCALE_RANGE = 30  # largest / smallest value, above which an axis is log


def curves(groups: Groups, path: str | os.PathLike[str]) -> None:
  """Draws the metrics of _CURVES by step into one PNG file."""
  names = [name for name in _CURVES if _has_metric(groups, name)]
  with mpl.rc_context(_STYLE):
    figure, axes = _figure(1, len(names))
    for ax, name in zip(axes[0], names, strict=True):
      _draw_curves(ax, groups, name)
    _add_legend(figure, axes[0], groups)
    figure.savefig(path, dpi=120)


def curve(groups: Groups, name: str) -> figures.Figure:
  """Draws one metric by step, as a line for each group and split.

  A line is the mean over the runs of a group, and a band is their range. Thin
  lines are training, thick lines are held-out data.
  """
  with mpl.rc_context(_STYLE):
    figure, axes = _figure(1, 1)
    _draw_curves(axes[0, 0], groups, name)
    _add_legend(figure, axes[0], groups)
  return figure


def _figure(rows, columns, size=_SIZE, **options):
  width, height = size
  figure = figures.Figure(
    (width * columns, height * rows), layout="constrained"
  )
  return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(
  figure: figures.Figure, file: str | os.PathLike[str] | IO, kind: str
) -> None:
  """Saves a figure to a path or an open file.

  kind: "png" with a white background, or "svg" with a transparent one.
  """
  with mpl.rc_context(_STYLE):
    if kind == "svg":
      figure.savefig(file, format=kind, transparent=True)
    else:
      figure.savefig(file, format=kind, dpi=120)


def _has_metric(groups, name):
  return any(name in line for g in groups.values() for r in g for line in r)


def _draw_curves(axes, groups, name):
  # Sorted, so that all figures of the same groups have the same colours.
  for index, (label, runs) in enumerate(sorted(groups.items())):
    for split in dict.fromkeys(line["split"] for run in runs for line in run):
      points = [
        (line["step"], line[name])
        for run in runs
        for line in run
        if line["split"] == split and name in line
      ]
      held_out = split != "train"
      style = (
        dict(marker="o", markersize=3, linewidth=1.5)
        if held_out
        else dict(linewidth=0.8, alpha=0.5)
      )
      _draw_mean(
        axes, points, held_out, color=f"C{index}",
        label=split if len(groups) == 1 else f"{label} ({split})",
        linestyle=_DASHES[index % len(_DASHES)], **style,
      )  # fmt: skip
  axes.set(xlabel="step", ylabel=name)


def _add_legend(figure, row, groups):
  """Adds a legend in each plot of one group, or below the plots of several.

  The figure then becomes higher by the legend, so that the plots keep their
  size however many lines the legend has.
  """
  if len(groups) == 1:
    for ax in row:
      ax.legend()
    return
  shown = {}
  for ax in row:
    handles, labels = ax.get_legend_handles_labels()
    shown |= dict(zip(labels, handles, strict=True))
  width, height = figure.get_size_inches()
  labels = [_in_lines(label, width) for label in shown]
  lines = sum(1 + label.count("\n") for label in labels)
  figure.set_size_inches(width, height + 0.18 * lines + 0.1)
  figure.legend(shown.values(), labels, loc="outside lower left")


def _in_lines(label, inches):
  """Breaks a label at its commas into lines of this width in inches."""
  spaced = re.sub(r",(?! )", ", ", label)
  return textwrap.fill(spaced, int(11 * inches), break_on_hyphens=False)


def _draw_mean(axes, points, band, *, color, **style):
  """Draws the mean at each step as a line and, if `band`, the range as a band.

  points: (step, value) pairs, several per step; nothing is drawn for none.
  """
  by_step = {}
  for step, value in points:
    by_step.setdefault(step, []).append(value)
  if not by_step:
    return
  steps = sorted(by_step)
  means = [statistics.fmean(by_step[step]) for step in steps]
  axes.plot(steps, means, color=color, **style)
  if band and len(points) > len(steps):
    low = [min(by_step[step]) for step in steps]
    high = [max(by_step[step]) for step in steps]
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


# Telemetry.


def measured_quantities(groups: Groups) -> list[str]:
  """The names in telemetry.QUANTITIES that any of the runs has measured."""
  names = {
    name.partition("/")[0] for line in _telemetry_lines(groups) for name in line
  }
  return [name for name in telemetry.QUANTITIES if name in names]


def _telemetry_lines(groups):
  return [
    line
    for runs in groups.values()
    for run in runs
    for line in run
    if line["split"] == telemetry.SPLIT
  ]


def layers_by_step(groups: Groups, quantity: str) -> figures.Figure:
  """Draws a telemetry quantity by step: a plot per group, a line per layer.

  A line is the mean over heads and runs, and a band is their range. Colours go
  from purple (first layer) to yellow (last layer); other modules are grey.
  """
  groups = {k: v for k, v in groups.items() if _telemetry_lines({k: v})}
  columns = min(len(groups), 3)
  rows = -(-len(groups) // columns)
  with mpl.rc_context(_STYLE):
    figure, axes = _figure(rows, columns, (3.8, 3.0), sharey=True, sharex=True)
    for ax in axes.flat[len(groups) :]:
      ax.remove()
    shown, lowest, highest = {}, math.inf, 0.0
    for ax, (label, runs) in zip(axes.flat, groups.items(), strict=False):
      places = _by_place({label: runs}, quantity)
      for (place, points), style in zip(
        places.items(), _line_styles(places), strict=True
      ):
        _draw_mean(ax, points, True, linewidth=1.2, label=place, **style)
        values = [value for _, value in points]
        lowest, highest = min(lowest, *values), max(highest, *values)
      ax.set_title(_in_lines(label, 3.8), fontsize="small")
      ax.set(xlabel="step")
      handles, names = ax.get_legend_handles_labels()
      shown |= dict(zip(names, handles, strict=True))
    if lowest > 0 and highest > _LOG_SCALE_RANGE * lowest:
      axes[0, 0].set_yscale("log")
      # The default labels are formulas, which _STYLE does not read.
      axes[0, 0].yaxis.set_major_formatter("{x:g}")
    for ax in axes[:, 0]:
      ax.set_ylabel(quantity)
    figure.legend(shown.values(), shown.keys(), loc="outside right upper")
  return figure


def _by_place(groups, quantity):
  """The points of a quantity by layer: {encoder/layer0: [(step, value), ...]}.

  All heads of a layer are in one list.
  """
  places = {}
  for line in _telemetry_lines(groups):
    for name, value in line.items():
      head, _, place = name.partition("/")
      if head == quantity:
        place = re.sub(r"/head\d+$", "", place)
        places.setdefault(place, []).append((line["step"], value))
  return places


def _line_styles(places):
  """One style per place: colours for layers, dashed grey for other modules."""
  layered = [place for place in places if re.search(r"layer\d+$", place)]
  others = [place for place in places if place not in layered]
  shades = np.linspace(0.3, 0.9, len(layered))  # visible on white and on black
  styles = {
    place: dict(color=mpl.colormaps["plasma"](shade))
    for place, shade in zip(layered, shades, strict=True)
  }
  dashes = itertools.cycle(["--", ":", "-.", (0, (6, 1, 1, 1, 1, 1))])
  styles |= {
    place: dict(color="grey", linestyle=dash)
    for place, dash in zip(others, dashes, strict=False)
  }
  return [styles[place] for place in places]


# Attention of one example.


def overlays(
  image_HWC: np.ndarray, attention_LNRC: np.ndarray
) -> figures.Figure:
  """Draws over an image how much attention each patch receives.

  It has one row per layer and one column per head. The brightest patch of a
  plot has the value that its title names.

  image_HWC: uint8. attention_LNRC: the result of the task's patch_attention,
  layers by heads by rows by columns of patches.
  """
  layers, heads = attention_LNRC.shape[:2]
  height, width = image_HWC.shape[:2]
  place = dict(extent=(0, width, height, 0))
  with mpl.rc_context(_STYLE):
    figure, axes = _figure(layers, heads + 1, (1.5, 1.65))
    for layer, row in enumerate(axes):
      for ax in row:
        ax.imshow(image_HWC.squeeze(), cmap="grey", **place)
        ax.set_axis_off()
      row[0].set_title(f"layer {layer}", fontsize="small")
      for head, map_RC in enumerate(attention_LNRC[layer]):
        ax = row[head + 1]
        ax.imshow(map_RC, cmap="inferno", alpha=0.6, vmin=0, **place)
        ax.set_title(f"head {head}, max {map_RC.max():.3g}", fontsize="small")
  return figure


def matrices(
  weights_NTS: np.ndarray, tick_labels: Sequence[str], title: str
) -> figures.Figure:
  """Draws a layer's attention weights: one plot per head, queries by keys.

  Each row is a query and each column is a key. The brightest weight of a plot
  has the value that its title names.

  weights_NTS: of one example; only the first len(tick_labels) tokens are drawn.
  tick_labels: the text of each token. title: of the figure.
  """
  count = len(tick_labels)
  weights_NTS = weights_NTS[:, :count, :count]
  columns = min(len(weights_NTS), 4)
  rows = -(-len(weights_NTS) // columns)
  side = max(2.5, 0.13 * count + 0.6)
  # A blank label would be invisible, so it is shown as U+2423.
  tick_labels = [x if x.strip() else "\u2423" for x in tick_labels]
  with mpl.rc_context(_STYLE | {"axes.grid": False}):
    figure, axes = _figure(rows, columns, (side, side))
    figure.suptitle(_in_lines(title, side * columns))
    for ax in axes.flat[len(weights_NTS) :]:
      ax.remove()
    for head, (ax, weights_TS) in enumerate(
      zip(axes.flat, weights_NTS, strict=False)
    ):
      ax.imshow(weights_TS, cmap="magma", vmin=0)
      ax.set_title(f"head {head}, max {weights_TS.max():.3g}", fontsize="small")
      ticks = dict(fontsize=7, family="monospace", parse_math=False)
      rotation = 90 if max(map(len, tick_labels)) > 1 else 0
      ax.set_xticks(range(count), tick_labels, rotation=rotation, **ticks)
      ax.set_yticks(range(count), tick_labels, **ticks)
      ax.tick_params(length=0)
  return figure


def classes(
  xy_M2: np.ndarray,
  target_M: np.ndarray,
  names: tuple[str, str],
  path: str | os.PathLike[str],
) -> None:
  """Draws points in the colours of their classes into a PNG file.

  names: of the axes.
  """
  with mpl.rc_context(_STYLE):
    figure, [[axes]] = _figure(1, 1, (6, 5))
    for i, target in enumerate(np.unique(target_M)):
      axes.scatter(
        *xy_M2[target_M == target].T,
        s=6,
        linewidths=0,
        color=mpl.colormaps["tab20"](i % 20),
        # A legend of a thousand classes would hide the points.
        label=f"class {target}" if i < 20 else None,
      )
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.legend(markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def image_rows(
  rows: Mapping[str, np.ndarray], path: str | os.PathLike[str]
) -> None:
  """Draws rows of images into a PNG file.

  rows: {name: images (B, H, W, C) with pixels from 0 to 1}, with the same B.
  """
  columns = len(next(iter(rows.values())))
  with mpl.rc_context(_STYLE):
    figure, axes = _figure(len(rows), columns, (0.9, 0.9))
    for line, (name, images) in zip(axes, rows.items(), strict=True):
      for ax, image in zip(line, images, strict=True):
        # imshow takes a grey image without its channel.
        grey = image.shape[-1] == 1
        ax.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
      line[0].set_ylabel(name, fontsize="x-small")
    figure.savefig(path, dpi=120)
