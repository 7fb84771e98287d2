"""The tables and pictures of the 85M models, from made-up results."""

import pytest

from benchmarks import lm_85m, lm_85m_report
from benchmarks.lm_85m_report import BEGIN, END


def short(form, lr, loss, diverged_at=None):
  return {
    "form": form, "lr": lr, "seed": 0, "short": True, "tokens": 10485760,
    "validation_loss": loss, "test_loss": None, "tokens_per_second": 4e5,
    "seconds_per_step": 0.16, "commit": "abc1234", "device": "a GPU",
    "diverged_at": diverged_at, "lengths": None, "copying": None, "cloze": None,
    "curves": curves(), "telemetry": {"step": []},
  }  # fmt: skip


def curves(spike=1.0):
  return {
    "step": [*range(10, 210, 10)],
    "loss": [5.0 - 0.1 * i for i in range(20)],
    "grad_norm": [0.5] * 20,
    # The first tenth, in which the learning rate grows, does not count.
    "grad_norm_max": [90.0, 80.0, *[0.5] * 17, 0.5 * spike],
  }


def whole(form, seed, loss, spike, cloze):
  losses = {"loss": loss, "loss@0:16": loss + 1, "loss@16:32": loss}
  telemetry = {"step": [1, 100], "residual_norm": [[1.0, 2.0]]}
  telemetry |= {"attention_v_norm": [[1, 2], [3, 4]], "logit_max": [[1, 2]]}
  return short(form, 4e-3, loss) | {
    "seed": seed, "short": False, "tokens": 100007936, "test_loss": loss + 0.1,
    "lengths": {"1 x 32": losses, "2 x 32": losses | {"loss@32:64": loss + 2}},
    "copying": {"32": {"copied": 0.5, "first": 0.25}},
    "cloze": cloze, "curves": curves(spike), "telemetry": telemetry,
  }  # fmt: skip


ROWS = [
  short("sigmoid", 1e-2, None, diverged_at=70),
  short("sigmoid", 4e-3, 4.25),
  short("softmax", 1e-2, 4.5),
  whole("sigmoid", 0, 3.25, 60.0, None),
  whole("softmax", 1, 3.125, 2.0, {"acc": 0.25}),
  whole("softmax", 0, 3.0, 1.0, {"acc": 0.5}),
]


def test_the_document_has_the_runs_that_there_are(tmp_path):
  results, document = tmp_path / "lm_85m.json", tmp_path / "RESULTS.md"
  document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
  lm_85m.write_rows(results, ROWS)
  for _ in range(2):  # the second time in place of the first
    lm_85m_report.write(results, document, tmp_path / "pictures")
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\na GPU; commit abc1234.")
    assert text.endswith(f"{END}\nafter\n")
  assert (
    "| softmax | 0.004 | 100 M | 3.000; 3.125 | 3.100; 3.225 | 50.0; 25.0 | "
    "1.0; 2.0 | 400,000 | 0.160 |"
  ) in text
  assert (
    "| sigmoid, b = −log n | 0.004 | 100 M | 3.250 | 3.350 |  | 60.0" in text
  )
  assert "| form | 0.004 | 0.01 |" in text
  assert "| softmax |  | 4.500 |" in text
  assert "| sigmoid, b = −log n | 4.250 | diverged at update 70 |" in text
  for name in lm_85m_report.DRAWN:
    assert f"(pictures/{name}.png)" in text
    assert (tmp_path / "pictures" / f"{name}.png").stat().st_size > 10_000
  results.unlink()
  assert lm_85m_report.write(results, document) == []
  assert document.read_text() == f"before\n{BEGIN}\n{END}\nafter\n"


def test_a_whole_run_that_diverged_is_drawn_as_far_as_it_went():
  gone = whole("sigmoid", 0, 3.0, 1.0, None) | {
    "validation_loss": None, "test_loss": None, "lengths": None,
    "copying": None, "diverged_at": 1,
    "curves": lm_85m.curves([]), "telemetry": {"step": []},
  }  # fmt: skip
  rows = [gone, whole("softmax", 0, 3.0, 1.0, None)]
  text = lm_85m_report.tables(rows)
  assert "| diverged at update 1 |" in text
  assert "cloze" not in text  # no row has it
  figures = [draw(rows) for draw in lm_85m_report.DRAWN.values()]
  assert [len(figure.axes) for figure in figures] == [5, 3, 1]


def test_losses_are_drawn_beside_those_of_softmax():
  figure = lm_85m_report.draw_lengths(ROWS)
  _, difference, by_length = figure.axes
  lines = {line.get_label(): line for line in difference.lines}
  # The reference is the mean of both seeds of softmax.
  apart = lines["sigmoid, b = −log n"].get_ydata()
  assert [*apart] == [pytest.approx(3.25 - 3.0625)] * 2
  assert [*by_length.lines[0].get_xdata()] == [32, 64]


def test_the_document_has_the_comments():
  text = lm_85m_report.DOCUMENT.read_text()
  assert text.count(BEGIN) == text.count(END) == 1
