"""The tables of docs/science.md, made from files like benchmarks.science's."""

import json

import pytest

from benchmarks import science, science_report

HEADER = {
  "command": "python -m benchmarks.science --studies=recall --out=x",
  "commit": "abc1234", "date": "2026-01-02", "jax": "0.11.2",
  "seeds": [0, 1], "lrs": [0.001, 0.002], "curve_every_updates": 50,
}  # fmt: skip


def row(form, **values):
  setting = {"data.length": 16, "data.vocab_size": 64}
  return {"setting": setting | values.pop("setting", {}), "form": form} | values


def trained(form, accuracy, curve):
  return row(
    form,
    lr=0.002,
    updates=150,
    test={"loss": [0.1, 0.2], "accuracy": accuracy},
    curve={"loss": curve, "accuracy": curve},
    device="a GPU",
  )


def test_document_has_the_studies_that_there_are_and_no_others(tmp_path):
  rows = [
    trained("softmax", [1.0, 0.5], [[0.1, 0.92, 1.0], [0.1, 0.2, 0.3]]),
    row("sigmoid", cut_off="not begun", setting={"data.length": 8}),
    row("softplus", error="Traceback\n  File\nMemoryError: all of it\n"),
  ]
  study = HEADER | {"metric": "accuracy", "rows": rows}
  (tmp_path / "recall.json").write_text(json.dumps(study))
  document = tmp_path / "science.md"
  document.write_text(
    f"before\n{science_report.BEGIN}\nold\n{science_report.END}\nafter\n"
  )
  for _ in range(2):  # the second call replaces the tables of the first
    assert science_report.write(tmp_path, document) == ["recall"]
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("### Recall and selective copying") == 1
  assert "| softmax | 0.002 | 100.0, 50.0 | 100, none |" in text
  assert "**8 pairs**" in text
  assert "| sigmoid |  | cut off: not begun |  |" in text
  assert "| softplus |  | failed: MemoryError: all of it |  |" in text
  assert "a GPU, 2026-01-02, commit abc1234" in text
  titles = [study.title for study in science.STUDIES.values()]
  assert sum(f"### {title}\n" in text for title in titles) == 1
  assert (tmp_path / "recall.png").stat().st_size > 1000
  (tmp_path / "recall.json").unlink()
  assert science_report.write(tmp_path, document) == []
  assert "|" not in document.read_text()


def test_losses_at_other_lengths_are_means_over_seeds(tmp_path):
  own = trained("softmax", [0.5, 0.5], [[3.0], [2.0]])
  own |= {
    "setting": {"model.positions": "rope", "attn.window": 255},
    "loss_at": {"256": [1.0, 1.5], "512": [2.0, 2.5]},
    "far_share": {"512": [[0.1, 0.3], [0.5, 0.7]]},
  }
  study = HEADER | {"metric": "loss", "rows": [own]}
  text = science_report.tables("length", study)
  assert "| mean at 256 | mean at 512 | far keys' share at 512 |" in text
  assert "| softmax | 0.002 | 0.100, 0.200 | 1.250 | 2.250 | 40 % |" in text
  assert "**RoPE, a window of 256 tokens**" in text
  [panel] = science_report.draw(study).axes
  assert len(panel.lines) == 2  # a line for each seed
  assert panel.lines[0].get_xdata().tolist() == [256, 512]


@pytest.mark.parametrize("name", science.STUDIES)
def test_settings_of_a_study_have_different_labels(name):
  found = {str(job.changes): job.changes for job in science.jobs(name, 0.0)}
  rows = [{"setting": changes} for changes in found.values()]
  assert len(science_report.settings(rows)) == len(rows)


def test_document_without_its_comments_is_refused(tmp_path):
  document = tmp_path / "science.md"
  document.write_text(science_report.BEGIN)
  with pytest.raises(ValueError, match=r"science\.md: must contain"):
    science_report.write(tmp_path, document)


def test_the_document_has_the_comments():
  text = science_report.DOCUMENT.read_text()
  assert text.count(science_report.BEGIN) == text.count(science_report.END) == 1
