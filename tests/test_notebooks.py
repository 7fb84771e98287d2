"""The notebooks run, and their executed copies have the same text.

After a change, run in their folder:
  jupytext --set-kernel=python3 --execute --to=ipynb *.py
"""

import pathlib
import runpy
import sys

import jupytext
import matplotlib
import pytest

from sigattn.training import metrics

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
PRIVATE = (str(pathlib.Path.home()), str(FOLDER.parent), "/tmp/")  # places


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(script, monkeypatch):
  matplotlib.use("agg")
  monkeypatch.chdir(FOLDER)
  monkeypatch.setattr(sys, "path", list(sys.path))
  # A notebook sets the logging, and other tests read what a run prints.
  monkeypatch.setattr(metrics.console, "quiet", False)
  runpy.run_path(str(script))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_copy_is_of_the_script_and_ran_to_its_end(script):
  copy = jupytext.read(script.with_suffix(".ipynb"))
  assert [(c.cell_type, c.source) for c in copy.cells] == [
    (c.cell_type, c.source) for c in jupytext.read(script).cells
  ]
  code = [cell for cell in copy.cells if cell.cell_type == "code"]
  counts = [cell.execution_count for cell in code]
  assert counts == list(range(1, len(code) + 1))
  outputs = [output for cell in code for output in cell.outputs]
  assert {x.output_type for x in outputs} <= {
    "stream", "execute_result", "display_data",
  }  # fmt: skip
  text = str(outputs)
  assert not [place for place in PRIVATE if place in text]


def test_every_copy_has_a_script():
  copies = {path.stem for path in FOLDER.glob("*.ipynb")}
  assert copies == {path.stem for path in SCRIPTS}
