"""The command line: `python -m sigattn COMMAND --flag=value ...`.

`python -m sigattn` lists the commands, and `python -m sigattn COMMAND --help`
lists the flags of one. train.py and eval.py, which need a checkout, parse their
flags by the same function `start`.
"""

import contextlib
import difflib
import importlib
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sigattn import extras, interrupt

extras.require("train")

from absl import app, flags, logging


class Command(NamedTuple):
  """A tool: a module with `define_flags()` and `run(flags[, words])`.

  does: what it does, in one line.
  shared: names of SHARED, the flags that it has besides its own.
  words: what the words beside the flags mean; None if there must be none.
  """

  module: str
  does: str
  shared: Sequence[str] = ()
  words: str | None = None


COMMANDS = {
  "train_tokenizer": Command(
    "sigattn.data.train_tokenizer", "train a tokenizer on your texts"
  ),
  "generate": Command(
    "sigattn.inference.generate",
    "continue texts with a language model",
    ("workdir", "step"),
  ),
  "lm_eval": Command(
    "sigattn.inference.lm_eval",
    "score a language model on tasks of lm-evaluation-harness",
    ("workdir", "step"),
  ),
  "transcribe": Command(
    "sigattn.inference.transcribe",
    "write down what recordings say",
    ("workdir", "step"),
    "recordings",
  ),
  "export": Command(
    "sigattn.inference.export",
    "save a model in the form of transformers",
    ("workdir", "step"),
  ),
  "sweep": Command(
    "sigattn.sweep", "train and compare the runs of a sweep", ("config",)
  ),
  "report": Command(
    "sigattn.analysis.report_html",
    "write a page about runs",
    words="folders of runs",
  ),
  "attention_maps": Command(
    "sigattn.analysis.attention_maps",
    "draw the attention of a held-out example",
    ("workdir", "step", "source"),
  ),
  "theory": Command(
    "sigattn.analysis.theory", "measure the bounds of docs/theory.md"
  ),
}


class _ValueParser(flags.ArgumentParser):
  """A value of a config: what `parser` reads, or the word None.

  A field that must not be None is refused when the config is validated. wanted:
  what an error says is right.
  """

  def __init__(self, parser: flags.ArgumentParser, wanted: str):
    self._parser, self._wanted = parser, wanted
    self.syntactic_help = wanted

  def parse(self, argument):
    if argument == "None":
      return None
    try:
      return self._parser.parse(argument)
    except (TypeError, ValueError):
      raise ValueError(f"must be {self._wanted}") from None

  def flag_type(self):
    return self._parser.flag_type()


def _config_flag():
  from ml_collections import config_flags
  from ml_collections.config_flags import tuple_parser

  for kind, parser, wanted in (
    (int, flags.IntegerParser(), "a whole number"),
    (float, flags.FloatParser(), "a number"),
    (str, flags.ArgumentParser(), "a text"),
    # Of a flag that is given twice, the last value counts, as for numbers.
    # With its own parser, ml_collections would join the tuples.
    (tuple, tuple_parser.TupleParser(), "values in brackets, such as (1, 2)"),
  ):
    config_flags.register_flag_parser_for_type(
      kind, _ValueParser(parser, wanted)
    )
  config_flags.DEFINE_config_file(
    "config",
    None,
    "configs/vit_sigmoid.py, say.",
    lock_config=True,
    allow_overwrite=False,  # a second --config is an error
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


def _source_flag():
  flags.DEFINE_string(
    "source", None, "Other data, or the place to which the run's were moved."
  )


SHARED: dict[str, Callable[[], None]] = {
  "config": _config_flag,
  "workdir": _workdir_flag,
  "step": _step_flag,
  "source": _source_flag,
}


@contextlib.contextmanager
def refusing(name: str, debug: bool = False) -> Iterator[None]:
  """Ends the program with status 1 and one line, if an error is not a bug.

  Such errors are a ValueError for bad input, an OSError for a file that cannot
  be read or written, a FloatingPointError for a loss that is not finite, and a
  MemoryError for a run that does not fit into memory.

  name: of the program, with which the line begins. debug: raises the error, so
  that Python shows its trace.
  """
  try:
    yield
  except (ValueError, FloatingPointError, MemoryError, OSError) as error:
    if debug:
      raise
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
      text = f"{error.filename}: {error.strerror}"
    sys.exit(f"{name}: {text}")


@contextlib.contextmanager
def stopping(name: str) -> Iterator[None]:
  """Ends the program with status 130 and one line after Ctrl-C.

  It does not wait for what JAX still computes. If Python's usual end found such
  a computation, the C++ library would abort the process.

  name: of the program, with which the line begins.
  """
  interrupt.install()
  try:
    with interrupt.unwrapped():
      yield
  except KeyboardInterrupt as error:
    why = str(error) or "stopped"
    print(f"{name}: {why}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)


# In bytes. The programs that were not used for the longest time are deleted.
_MOST_COMPILED = 8 * 2**30


def keep_compiled() -> None:
  """Keeps what XLA compiles, so that later runs of this user find it.

  It is kept in the folder that JAX_COMPILATION_CACHE_DIR names, by default
  sigattn/compiled in the user's cache ($XDG_CACHE_HOME or ~/.cache). An empty
  variable, or JAX_ENABLE_COMPILATION_CACHE=false, turns this off. If the folder
  cannot be made, a message says so.
  """
  import jax

  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(home) / "sigattn" / "compiled"
  try:
    # Programs in this folder are run, so nobody else may write there.
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  except OSError as error:
    print(f"what is compiled is not kept: {error}", file=sys.stderr)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _MOST_COMPILED)


class _Plain(logging.logging.Formatter):
  """Writes a message of absl as "warning: ...", without date and place."""

  def formatMessage(self, record):
    return f"{record.levelname.lower()}: {record.message}"


def _write_plain_warnings():
  """Lets absl write plain lines to sys.stderr.

  It then looks up sys.stderr for each line, so that the line is written above
  a progress bar.
  """
  logging.get_absl_handler().setFormatter(_Plain())
  flags.FLAGS.logtostderr = True


def start(
  run: Callable[..., Any],
  define_flags: Callable[[], None] = lambda: None,
  shared: Sequence[str] = (),
  words: str | None = None,
) -> None:
  """Parses sys.argv, calls run(flags[, words]), and ends the program.

  The arguments are as in Command.
  """
  name = pathlib.Path(sys.argv[0]).name
  before = set(flags.FLAGS)
  for flag in shared:
    SHARED[flag]()
  define_flags()
  for flag in sorted(set(flags.FLAGS) - before):  # what --help shows
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag])

  def main(argv):
    given = argv[1:]
    if given and words is None:
      sys.exit(
        f"{name}: only flags are allowed, not {given}; --help lists them"
      )
    if words is not None and not given:
      sys.exit(f"{name}: name the {words}")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)
    _write_plain_warnings()
    keep_compiled()
    return run(flags.FLAGS, *([given] if words is not None else []))

  def parse(argv):
    with refusing(name):
      try:
        rest = _parsed(argv)
        # A config file that cannot be read fails when it is first used.
        _ = "config" in shared and flags.FLAGS.config.is_locked
      # ml_collections raises all of these for a wrong key or value.
      except (
        flags.Error, AttributeError, LookupError, OSError, SyntaxError,
        TypeError, ValueError,
      ) as error:  # fmt: skip
        if isinstance(error, BrokenPipeError):
          raise
        raise ValueError(_one_line(error, argv)) from error
    return rest

  with stopping(name):
    app.run(main, flags_parser=parse)


def _parsed(argv):
  """Parses the flags, and returns the words beside them.

  absl prints what --help asks for while it parses, and ends the program with
  status 1, as if something were wrong.
  """
  try:
    return flags.FLAGS(argv)
  except SystemExit as end:
    sys.exit(0 if end.code == 1 else end.code)


def _one_line(error, argv):
  """Says what is wrong with the command line, and which name is nearest."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  if isinstance(error, OSError):
    why = re.sub(r".*\[Errno \d+\] ", "", lines[-1])
    return f"--config cannot be read: {why}{_known_configs()}"
  if isinstance(error, SyntaxError):
    return (
      f"--config={_config_file(argv)}; must be a config in Python, such as "
      f"configs/vit_sigmoid.py: {error}"
    )
  if missing := re.search(r"--(\w+) must have a value other than", str(error)):
    there = _known_configs() if missing[1] == "config" else ""
    return f"--{missing[1]}=... is missing; --help says what it may be{there}"
  if twice := re.search(r"flag --config=(.*?): already defined", str(error)):
    first = flags.FLAGS["config"].config_filename
    return (
      f"--config={twice[1]}; --config={first} is given too: give one config. "
      "--config.FIELD=VALUE changes a field of it"
    )
  if wrong := re.search(
    r"flag (--config[\w.]*)=(.*): Failed .* is not a d", str(error)
  ):
    return (
      f"{wrong[1]}={wrong[2]}; is a group of fields: {wrong[1]}.FIELD=VALUE"
    )
  if unknown := re.match(r"Unknown command line flag '(\w+)'", lines[0]):
    other = _other_flag(unknown[1], argv)
    return unknown[0] + other if other else "; ".join(lines)
  if wrong := re.search(r"flag (--[^:]+): .*Non-boolean", str(error)):
    return f"{wrong[1]}; must be true or false"
  if wrong := re.fullmatch(r"flag (--.*?): (must be .*)", str(error)):
    return f"{wrong[1]}; {wrong[2]}"
  said = [line for line in lines if line.startswith("ValueError: ")]
  if said:  # a config's function said it about its argument
    # A config that is made from another one passes its argument on. The error
    # then names the file of the other one.
    file = _config_file(argv).partition(":")[0]
    text = said[-1].removeprefix("ValueError: ")
    return re.sub(r"^configs/\w+\.py:", f"{file}:", text)
  if isinstance(error, (AttributeError, LookupError)):
    return _unknown_field(argv) or "; ".join(lines)
  # If a config's function has a bug, its trace shows where.
  return str(error) if "Traceback" in str(error) else "; ".join(lines)


def _other_flag(name, argv):
  """Names the flag that someone may mean who gives an unknown one."""
  if name == "workdir" and "root" in flags.FLAGS:
    return "; did you mean --root, the folder of all runs?"
  if "config" in flags.FLAGS:
    config = flags.FLAGS["config"].parser.parse(_config_file(argv))
    if paths := _with_leaf(config, name):
      return f"; did you mean --{paths[0]}?"
  return ""


def _known_configs():
  """The end of a sentence, which names the configs of this folder."""
  known = sorted(
    str(path)
    for path in pathlib.Path("configs").glob("*.py")
    if "\ndef get_config(" in path.read_text()
  )
  return f"; there are {', '.join(known)}" if known else ""


def _config_file(argv):
  """The value of --config."""
  words = "\n".join(argv[1:])
  return re.search(r"^--?config[=\n](.*)$", words, re.MULTILINE)[1]


def _unknown_field(argv):
  """Names the field that the command line sets and the config lacks."""
  words = "\n".join(argv[1:])
  config = flags.FLAGS["config"].parser.parse(_config_file(argv))
  paths = re.findall(r"^--?config\.([\w.]+)", words, re.MULTILINE)
  return next(filter(None, (unknown_field(config, x) for x in paths)), "")


def unknown_field(config: Mapping[str, Any], path: str) -> str:
  """Says that a config has no field at a path, and which is nearest.

  Returns "" if it has one.
  """
  node, above = config, "config"
  for key in path.split("."):
    keys = list(node.keys()) if hasattr(node, "keys") else []
    if key not in keys:
      near = difflib.get_close_matches(key, keys, 1)
      near = _with_leaf(config, path) or [f"{above}.{x}" for x in near]
      hint = f"; did you mean {near[0]}?" if near else ""
      return f"{above} has no field {key!r}{hint}"
    node, above = node[key], f"{above}.{key}"
  return ""


def _with_leaf(config, path):
  """The fields, in whatever group, whose last key is that of the path."""
  leaf = path.split(".")[-1]
  groups = {"config": config} | {
    f"config.{key}": value
    for key, value in config.items()
    if hasattr(value, "keys")
  }
  return [f"{name}.{leaf}" for name, group in groups.items() if leaf in group]


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command that the first argument names.

  argv: by default sys.argv.
  """
  argv = list(sys.argv if argv is None else argv)
  if argv[1:2] in ([], ["--help"], ["-h"]):
    print("usage: python -m sigattn COMMAND --flag=value ...\n")
    for name, command in COMMANDS.items():
      print(f"  {name:<16}{command.does}")
    print("\npython -m sigattn COMMAND --help lists the flags of a command.")
    return
  if argv[1] not in COMMANDS:
    nearest = difflib.get_close_matches(argv[1], COMMANDS, 1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"has {[*COMMANDS]}"
    sys.exit(f"sigattn: unknown command {argv[1]!r}; {hint}")
  name = argv[1]
  command = COMMANDS[name]
  with stopping(f"sigattn {name}"):
    module = importlib.import_module(command.module)
  # What --help prints first.
  sys.modules["__main__"].__doc__ = module.__doc__
  sys.argv = [f"sigattn {name}", *argv[2:]]

  def run(*given):
    with refusing(f"sigattn {name}"):
      return module.run(*given)

  start(run, module.define_flags, command.shared, command.words)
