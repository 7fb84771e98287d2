"""The command line: what it lists, and what it says about wrong words."""

import pathlib
import subprocess
import sys

import pytest

from sigattn import cli

ROOT = pathlib.Path(__file__).parents[1]


def test_the_commands_are_listed_with_what_they_do(capsys):
  cli.main(["sigattn"])
  said = capsys.readouterr().out
  assert "  generate        continue texts with a language model\n" in said
  assert all(f"  {name}" in said for name in cli.COMMANDS)
  with pytest.raises(SystemExit, match="'generat'; did you mean generate"):
    cli.main(["sigattn", "generat"])


def test_a_misspelt_config_is_answered_by_those_that_there_are():
  done = subprocess.run(
    [sys.executable, "train.py", "--config=configs/vti.py"],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 1
  assert "there are configs/byol.py, " in done.stderr
  assert "Traceback" not in done.stderr
