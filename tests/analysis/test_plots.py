"""Figures: the lines, images and labels that they contain."""

import io

import numpy as np
import pytest

from sigattn.analysis import plots


def telemetry_lines():
  """The telemetry of a run: two heads in layer 0, one head in layer 1."""
  return [
    {
      "step": step,
      "split": "telemetry",
      "entropy/encoder/layer0/head0": 1.0,
      "entropy/encoder/layer0/head1": 3.0,
      "entropy/encoder/layer1/head0": 0.1 * step,
      "grads_norm/encoder/layer0": 1e-3,
    }
    for step in (2, 4)
  ]


def test_each_layer_is_a_line_over_its_heads():
  groups = {
    "sigmoid": [telemetry_lines(), telemetry_lines()],
    "softmax": [telemetry_lines()],
  }
  figure = plots.layers_by_step(groups, "entropy")
  assert [ax.get_title() for ax in figure.axes] == [*groups]
  drawn = {
    line.get_label(): list(zip(*line.get_data(), strict=True))
    for line in figure.axes[0].lines
  }
  assert drawn == {
    "encoder/layer0": [(2, 2.0), (4, 2.0)],
    "encoder/layer1": [(2, 0.2), (4, 0.4)],
  }


def test_figures_show_every_head():
  weights = np.random.default_rng(0).random((5, 4, 4))
  figure = plots.matrices(weights, ["a", "$", " "], "title")
  shown = [ax.images[0].get_array() for ax in figure.axes]
  assert len(shown) == 5
  np.testing.assert_array_equal(shown[4], weights[4, :3, :3])
  ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
  assert ticks == ["a", "$", "\u2423"]
  image = np.zeros((8, 8, 3), np.uint8)
  figure = plots.overlays(image, weights.reshape(5, 4, 2, 2))
  assert [len(ax.images) for ax in figure.axes] == 5 * [1, 2, 2, 2, 2]


def test_curves_of_the_same_groups_look_alike_in_any_order():
  run = [{"step": 1, "split": x, "loss": 1.0} for x in ("train", "test")]

  def drawn(*labels):
    figure = plots.curve({label: [run] for label in labels}, "loss")
    return {
      line.get_label(): (line.get_color(), line.get_linestyle())
      for line in figure.axes[0].lines
    }

  one = drawn("a", "b")
  assert one == drawn("b", "a")
  assert one["a (test)"] == one["a (train)"] == ("C0", "-")
  assert one["b (test)"] == ("C1", "--")
  assert [*drawn("a" * 200)] == ["train", "test"]


@pytest.mark.filterwarnings("error")  # of plots that have no room
def test_labels_of_any_length_leave_the_plots_their_size():
  run = [{"step": 1, "split": x, "loss": 1.0} for x in ("train", "test")]
  runs = [run + telemetry_lines()]
  for name in (10 * "key=0.001,", 60 * "x"):
    groups = {f"{name}{i}": runs for i in range(3)}
    for figure, least in (
      (plots.curve(groups, "loss"), (3.5, 2.5)),
      (plots.layers_by_step(groups, "entropy"), (2, 1.5)),
    ):
      plots.save(figure, io.BytesIO(), "png")
      for ax in figure.axes:
        size = ax.get_window_extent().size / figure.dpi
        assert (size > least).all(), size
      ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
      assert not any("$" in text for text in ticks)
