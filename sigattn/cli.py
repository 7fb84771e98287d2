"""The command line: `python -m sigattn COMMAND --flag=value ...`.

`python -m sigattn` lists the commands, `python -m sigattn COMMAND --help` tells
the flags of one. train.py and eval.py, which need a checkout, parse theirs by
the same `start`.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sigattn import extras

extras.require("train")

from absl import app, flags


class Command(NamedTuple):
  """A tool: a module with `define_flags()` and `run(flags[, words])`.

  shared: names of SHARED, the flags that it has besides its own.
  words: what the words beside the flags are; None where there must be none.
  """

  module: str
  shared: Sequence[str] = ()
  words: str | None = None


COMMANDS = {
  "generate": Command("sigattn.inference.generate", ("workdir", "step")),
  "transcribe": Command(
    "sigattn.inference.transcribe", ("workdir", "step"), "recordings"
  ),
  "lm_eval": Command("sigattn.inference.lm_eval", ("workdir", "step")),
  "sweep": Command("sigattn.sweep", ("config",)),
  "report": Command("sigattn.analysis.report_html", words="folders of runs"),
  "attention_maps": Command(
    "sigattn.analysis.attention_maps", ("workdir", "step")
  ),
  "theory": Command("sigattn.analysis.theory"),
  "train_tokenizer": Command("sigattn.data.train_tokenizer"),
}


def _config_flag():
  from ml_collections import config_flags

  config_flags.DEFINE_config_file(
    "config", None, "configs/vit_sigmoid.py, say.", lock_config=True
  )
  flags.mark_flag_as_required("config")


def _workdir_flag():
  flags.DEFINE_string("workdir", None, "The folder of the run.")
  flags.mark_flag_as_required("workdir")


class _StepParser(flags.ArgumentParser):
  """A checkpoint's step: a number, or best."""

  syntactic_help = "a number, or best"

  def parse(self, argument):
    if argument == "best" or isinstance(argument, int):
      return argument
    if argument.isdecimal():
      return int(argument)
    raise ValueError("must be a number, or best")


def _step_flag():
  flags.DEFINE(
    _StepParser(), "step", None, "A number or best; by default the newest."
  )


SHARED: dict[str, Callable[[], None]] = {
  "config": _config_flag,
  "workdir": _workdir_flag,
  "step": _step_flag,
}


@contextlib.contextmanager
def refusing(name: str, debug: bool = False) -> Iterator[None]:
  """Ends the program with 1 and one line for an error that is not a bug.

  That is a ValueError for bad input, an OSError for a file that cannot be read
  or written, and a FloatingPointError for a loss that is not finite.

  name: of the program, which the line begins with. debug: lets the error pass,
  so that its trace is shown.
  """
  try:
    yield
  except (ValueError, FloatingPointError, OSError) as error:
    if debug:
      raise
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
      text = f"{error.filename}: {error.strerror}"
    sys.exit(f"{name}: {text}")


def start(
  run: Callable[..., Any],
  define_flags: Callable[[], None] = lambda: None,
  shared: Sequence[str] = (),
  words: str | None = None,
) -> None:
  """Parses sys.argv, calls run(flags[, words]), and ends the program.

  The arguments are as in Command.
  """
  before = set(flags.FLAGS)
  for flag in shared:
    SHARED[flag]()
  define_flags()
  for flag in sorted(set(flags.FLAGS) - before):  # what --help shows
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag])

  def main(argv):
    given = argv[1:]
    if given and words is None:
      raise app.UsageError(f"not understood: {given}")
    if words is not None and not given:
      raise app.UsageError(f"name the {words}")
    return run(flags.FLAGS, *([given] if words is not None else []))

  app.run(main)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command that the first argument names.

  argv: by default sys.argv.
  """
  argv = list(sys.argv if argv is None else argv)
  usage = "usage: python -m sigattn COMMAND --flag=value ...\n\n" + "\n".join(
    f"  {name}" for name in COMMANDS
  )
  if argv[1:2] in (["--help"], ["-h"]):
    print(usage)
    return
  if len(argv) < 2 or argv[1] not in COMMANDS:
    unknown = f"sigattn: unknown command {argv[1]!r}\n" if argv[1:] else ""
    sys.exit(unknown + usage)
  name = argv[1]
  command = COMMANDS[name]
  module = importlib.import_module(command.module)
  # What --help prints first.
  sys.modules["__main__"].__doc__ = module.__doc__
  sys.argv = [f"sigattn {name}", *argv[2:]]

  def run(*given):
    with refusing(f"sigattn {name}"):
      return module.run(*given)

  start(run, module.define_flags, command.shared, command.words)
