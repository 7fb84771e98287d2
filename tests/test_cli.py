"""The command line: what it lists, and what it says about wrong words."""

import pathlib
import signal
import subprocess
import sys
import tomllib

import jax
import pytest

from sigattn import cli
from sigattn.training import process
from tests import commands

ROOT = pathlib.Path(__file__).parents[1]


def test_the_commands_are_listed_with_what_they_do(capsys):
  cli.main(["sigattn"])
  said = capsys.readouterr().out
  assert "  generate        continue texts with a language model\n" in said
  assert all(f"  {name}" in said for name in cli.COMMANDS)
  with pytest.raises(SystemExit, match="'generat'; did you mean generate"):
    cli.main(["sigattn", "generat"])


@pytest.mark.parametrize("words", [["sigattn"], ["sigattn", "generate"]])
def test_a_plain_installation_says_in_one_line_what_is_missing(words):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  module, _, function = project["scripts"]["sigattn"].partition(":")
  code = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda x, *y: None if x == "optax" else found(x, *y)
sys.argv = {words}
from {module} import {function}
{function}()
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 1
  [line] = done.stderr.splitlines()
  assert line.startswith("sigattn: this part of sigattn needs optax: pip")


@pytest.mark.parametrize(
  "words", [["-m", "sigattn", "generate"], ["train.py"]], ids=str
)
@pytest.mark.parametrize("flag", ["--help", "--helpfull"])
def test_help_is_no_error(words, flag):
  done = subprocess.run(
    [sys.executable, *words, flag],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, "")
  assert "--workdir" in done.stdout


VIT = "--config=configs/vit.py:runlocal"


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--config=configs/vti.py"], "byol_sigmoid.py, configs/finetune"),
    ([], "--config=... is missing; --help says what it may be; there are"),
    (["--config=README.md"], "--config=README.md; must be a config in Python"),
    (
      [VIT, "--config.total_steps=1e3"],
      "--config.total_steps=1e3; must be a whole number",
    ),
    (
      ["--config=configs/lm.py:runlocal", "--config.eval.length_factors=(2,"],
      "--config.eval.length_factors=(2,; must be values in brackets, such as",
    ),
    # None is a value. If it is a wrong one, the config says so.
    (
      [VIT, "--config.attn.window=None", "--config.optim.lr=None"],
      "config.optim.lr=None; must be a finite number",
    ),
  ],
)
def test_a_wrong_command_line_is_answered_by_what_is_right(words, said):
  done = commands.forked("train.py", *words)
  assert done.returncode == 1
  assert said in done.stderr
  assert "Traceback" not in done.stderr
  assert len(done.stderr.splitlines()) == 1


WRONG = {
  "foo": "train.py: only flags are allowed, not ['foo']; --help lists them",
  "--config.attn=3": "attn=3; is a group of fields: --config.attn.FIELD=VALUE",
  "--normalize": "'normalize'; did you mean --config.attn.normalize?",
  "--workdir=": "train.py: workdir=''; must be a folder",
  "--workdir=README.md/a": "'README.md/a' cannot be written: Not a directory",
  "--config.attn.implementation=triton": "; give --config.attn.implementation="
  "None, which lets the library choose",
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_word_is_answered_in_one_line(word):
  done = commands.forked("train.py", VIT, word)
  assert done.returncode == 1
  [line] = done.stderr.splitlines()
  assert WRONG[word] in line


def test_exhausted_memory_is_one_line_that_says_what_to_lower():
  with (
    pytest.raises(SystemExit, match=r"^a: .* memory: lower b \(RESOURCE_EXHA"),
    cli.refusing("a"),
    process.saying_what_to_lower("lower all"),
    process.saying_what_to_lower("lower b"),
  ):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")


STOPPED = """
import os, signal
from sigattn import cli

cli.start(lambda given: os.kill(os.getpid(), signal.SIGINT))
"""


def test_ctrl_c_ends_a_program_with_one_line():
  done = subprocess.run(
    [sys.executable, "-c", STOPPED],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (130, "-c: stopped\n")
  # During the imports it ends without a trace.
  for program in ("train.py", "eval.py"):
    run = subprocess.Popen(
      [sys.executable, "-X", "importtime", program, "--config=no"],
      cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = iter(run.stderr)
    assert any("jax" in line for line in said)
    run.send_signal(signal.SIGINT)
    assert "Traceback" not in "".join(said)
    assert run.wait(60) == -signal.SIGINT


TWICE = """
from sigattn import cli

def show(given):
  print(given.config.eval.length_factors, given["config"].override_values)

cli.start(show, shared=("config",))
"""


def test_of_a_tuple_that_is_given_twice_the_last_counts():
  words = [f"--config.eval.length_factors={x}" for x in ("(2, 4)", "(3,)")]
  done = subprocess.run(
    [sys.executable, "-c", TWICE, "--config=configs/lm.py:runlocal", *words],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert done.stdout == "(3,) {'eval.length_factors': (3,)}\n"


def test_a_warning_is_one_plain_line():
  script = "from absl import logging\nfrom sigattn import cli\n"
  script += "cli.start(lambda given: logging.warning('%d files', 3))"
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert done.stderr == "warning: 3 files\n"


LOST = """
import os, signal, sys
from sigattn import cli, interrupt


class Collected:
  def __del__(self):  # Python drops what is raised here.
    os.kill(os.getpid(), signal.SIGINT)


def main(given):
  collected = Collected()
  del collected
  print(interrupt.received())
  if "raise" in sys.argv[0]:
    raise RuntimeError("MLIR: KeyboardInterrupt")
  interrupt.check()


cli.start(main)
"""


@pytest.mark.parametrize("name", ["check", "raise"])
def test_ctrl_c_in_a_callback_is_not_lost(name):
  program = f"import sys; sys.argv[0] = {name!r}\n{LOST}"
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  found = done.returncode, done.stdout, done.stderr
  assert found == (130, "True\n", f"{name}: stopped\n")
