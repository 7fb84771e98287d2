"""The HTML page about a set of runs, whose folders the tests write."""

import html.parser
import json
import math
import re
import types

import pytest

from sigattn.analysis import report_html
from sigattn.training import run_dir

# {degrees of freedom: 97.5 % quantile of Student's t}, from a textbook.
T = {1: 12.706, 2: 4.303, 9: 2.262}


def write_run(folder, kind, seed, accuracy, **config):
  folder.mkdir(parents=True)
  values = {
    "seed": seed,
    "attn": {"kind": kind, "qk_norm": "none"},
    "data": {"eval_split": "test"},
    **config,
  }
  content = {"format": run_dir.FORMAT, "config": values}
  (folder / "config.json").write_text(json.dumps(content))
  lines = []
  for step in (2, 4):
    lines += [
      {"step": step, "split": "train", "loss": 2.0, "grad_norm": 1.0},
      {"step": step, "split": "test", "loss": 1.5, "accuracy": accuracy * step},
      {
        "step": step, "split": "telemetry",
        "entropy/encoder/layer0/head0": 1.0,
        "entropy/encoder/layer0/head1": 3.0,
        "entropy/encoder/layer1/head0": 0.1 * step,
        "grads_norm/head": 0.5, "grads_norm/encoder/layer0": 1e-3,
      },
    ]  # fmt: skip
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def runs(tmp_path):
  write_run(tmp_path / "a", "sigmoid", 0, 0.1)
  write_run(tmp_path / "b", "sigmoid", 1, 0.2)
  write_run(tmp_path / "deep" / "c", "soft<max", 0, 0.125)
  return tmp_path


def test_a_label_names_what_distinguishes(tmp_path):
  for kind, every in (("sigmoid", 3), ("softmax", 7)):
    write_run(tmp_path / kind, kind, 0, 0.1, log={"every_steps": every})
  runs = report_html.find([tmp_path])
  labels = {"attn.kind=sigmoid", "attn.kind=softmax"}
  assert {*report_html.by_config(runs)} == labels
  write_run(tmp_path / "more", "softmax", 0, 0.1, log={"every_steps": 9})
  runs = report_html.find([tmp_path])
  assert {*report_html.by_config(runs)} == {
    "attn.kind=sigmoid,log.every_steps=3",
    "attn.kind=softmax,log.every_steps=7",
    "attn.kind=softmax,log.every_steps=9",
  }


class Tables(html.parser.HTMLParser):
  """The cells of each table, and every tag with its attributes."""

  def __init__(self, text):
    super().__init__()
    self.tables, self.tags, self._cell = [], [], None
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")
      self._cell = tag

  def handle_endtag(self, tag):
    if tag == self._cell:
      self._cell = None

  def handle_data(self, data):
    if self._cell:
      self.tables[-1][-1][-1] += data


def test_page_has_the_differing_values_the_intervals_and_the_figures(runs):
  path = report_html.write([runs])
  assert path == runs / "report" / "index.html"
  text = path.read_text()
  page = Tables(text)
  differences, final = page.tables
  assert differences[0] == ["attn.kind", "runs", "seeds", "folders"]
  assert [row[:3] for row in differences[1:]] == [
    ["sigmoid", "2", "0, 1"], ["soft<max", "1", "0"],
  ]  # fmt: skip
  mean, deviation = 0.6, math.sqrt(2) * 0.2
  half = T[1] * deviation / math.sqrt(2)
  row = ["accuracy", "attn.kind=sigmoid", "4", "2"]
  row += [f"{x:.4f}" for x in (mean, deviation)]
  assert final[3][:6] == row
  low, high = map(float, final[3][6:])
  assert low == pytest.approx(mean - half, abs=1e-3)
  assert high == pytest.approx(mean + half, abs=1e-3)
  assert final[4] == [
    "accuracy", "attn.kind=soft<max", "4", "1", "0.5000", "", "", "",
  ]  # fmt: skip
  # The page loads nothing, and every figure is also saved as a file.
  for tag, attrs in page.tags:
    assert tag not in ("script", "link", "img", "image", "iframe")
    for name in ("src", "href", "xlink:href"):
      assert attrs.get(name, "#").startswith("#")
  assert not re.search(r"url\((?!#)|@import", text)
  names = {"loss", "accuracy", "grad_norm", "entropy", "grads_norm"}
  assert {path.stem for path in path.parent.glob("*.png")} == names
  assert [tag for tag, _ in page.tags].count("svg") == len(names)
  ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
  assert len(ids) == len(set(ids))
  assert {f"#{x}" for x in ids} >= {
    attrs["xlink:href"] for _, attrs in page.tags if "xlink:href" in attrs
  }


@pytest.mark.parametrize("count", [2, 3, 10])
def test_interval_is_students(count):
  values = [float(x) for x in range(count)]
  mean, deviation, low, high = report_html.interval(values)
  assert mean == (count - 1) / 2
  assert deviation == pytest.approx(math.sqrt(count * (count + 1) / 12))
  half = T[count - 1] * deviation / math.sqrt(count)
  assert (low, high) == pytest.approx((mean - half, mean + half), rel=1e-3)


def test_single_group_in_an_explicit_output_folder(tmp_path):
  write_run(tmp_path / "a", "sigmoid", 0, 0.1)
  write_run(tmp_path / "b", "sigmoid", 0, 0.1, total_steps=7)
  path = report_html.write([tmp_path / "a"], tmp_path / "x" / "y")
  assert path == tmp_path / "x" / "y" / "index.html"
  [row] = Tables(path.read_text()).tables[0][1:]
  assert row[0] == "1"
  # A key that only one of the configs has is listed as different.
  assert report_html.differing(report_html.find([tmp_path])) == ["total_steps"]


def test_steps_that_follow_total_steps_do_not_count_as_different(tmp_path):
  for total in (70, 400):
    steps = {"total_steps": total, "log": {"every_steps": -(-total // 15)}}
    steps["optim"] = {"warmup_steps": total // 20}
    write_run(tmp_path / "follow" / str(total), "sigmoid", 0, 0.1, **steps)
    steps["optim"] = {"warmup_steps": total // 20 + 1}
    write_run(tmp_path / "own" / str(total), "sigmoid", 0, 0.1, **steps)
  runs = report_html.find([tmp_path / "follow"])
  assert report_html.differing(runs) == ["total_steps"]
  runs = report_html.find([tmp_path / "own"])
  assert "optim.warmup_steps" in report_html.differing(runs)


def test_run_that_is_behind_its_group_is_left_out(runs):
  path = runs / "b" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join(lines[:3]) + "\n")
  _, rows = report_html._final_table(
    report_html.by_config(report_html.find([runs]))
  )
  assert rows[2] == [
    "accuracy", "attn.kind=sigmoid", 4, "1 of 2", 0.4, None, None, None,
  ]  # fmt: skip


def test_runs_of_one_seed_give_no_interval(runs, capsys):
  write_run(runs / "copy", "sigmoid", 1, 0.2)
  path = report_html.write([runs])
  _, final = Tables(path.read_text()).tables
  assert final[3][:5] == ["accuracy", "attn.kind=sigmoid", "4", "3", "0.6667"]
  assert final[3][5:] == ["", "", ""]
  said = capsys.readouterr().out
  assert "attn.kind=sigmoid: several runs have the seed 1, so they are" in said


def test_folder_without_runs_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"empty: holds no run"):
    report_html.write([tmp_path / "empty"])


@pytest.mark.parametrize("name", ["page.html", "taken"])
def test_page_in_place_of_a_folder_is_refused(name, tmp_path):
  write_run(tmp_path / "run", "softmax", 0, 0.1)
  (tmp_path / "taken").write_text("what somebody needs")
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(ValueError, match=f"{name}'; must be a folder, in which"):
    report_html.run(types.SimpleNamespace(out=tmp_path / name), [tmp_path])
  assert sorted(tmp_path.rglob("*")) == before


ODD = (
  "../../../escaped", "<img src=x onerror=alert(1)>", "$\\frac$", "a\"b",
  "/tmp/absolute", "..", "x" * 300, "-->", "&lt;", "[red]", "loss",
)  # fmt: skip


def test_foreign_names_stay_in_the_folder_and_are_text_in_the_page(tmp_path):
  folder = tmp_path / "some" / "deep" / "run"
  write_run(folder, "<script>alert(1)</script>", 0, 0.1)
  write_run(tmp_path / "some" / "deep" / "other", "softmax", 0, 0.1)
  line = {"step": 6, "split": "test"} | dict.fromkeys(ODD, 1.0)
  with (folder / "metrics.jsonl").open("a") as file:
    for split in ("test", "<b>split"):
      file.write(json.dumps(line | {"split": split}) + "\n")
  before = {*tmp_path.rglob("*")}
  path = report_html.write([tmp_path / "some"])
  made = {*tmp_path.rglob("*")} - before
  assert all(x.is_relative_to(path.parent) for x in made)
  assert len([*path.parent.glob("*.png")]) == len(ODD) + 4
  page = Tables(path.read_text())
  tags = {tag for tag, _ in page.tags}
  assert not tags & {"img", "script", "b"}
  for _, attrs in page.tags:
    assert not {"onerror", "onload", "onclick"} & attrs.keys()
  ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
  assert len(ids) == len(set(ids))
  cells = [row[0] for row in page.tables[1]]
  assert {"../../../escaped", ODD[1], "&lt;"} <= {*cells}
