"""Runs commands as new processes, without importing their modules each time.

A server imports the modules once, and forks for each command. The fork runs the
program as __main__, with flags that nothing has defined before. Commands that
compute must not be run so, because JAX's threads do not survive a fork.
"""

import functools
import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]


def forked(*words, **environment):
  """The completed process of `python *words` in the checkout.

  words: the name of a program, or "-m", "sigattn" and a command.
  environment: variables that are added to those of this process.
  """
  server = _server(os.getpid())
  request = {"words": [str(word) for word in words], "env": environment}
  server.stdin.write(json.dumps(request) + "\n")
  server.stdin.flush()
  answer = json.loads(server.stdout.readline())
  return subprocess.CompletedProcess(words, **answer)


@functools.lru_cache(maxsize=1)
def _server(pid):
  del pid  # The key of the cache: a fork of this process needs its own server.
  return subprocess.Popen(
    [sys.executable, "-m", "tests.commands"],
    cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip


def _module(words):
  """The module whose import takes the time of a command."""
  if words[0] != "-m":
    return words[0].removesuffix(".py")
  from sigattn import cli

  return cli.COMMANDS[words[2]].module


def _fork(words, environment, files):
  """The status of the command. It does not return in the fork."""
  if pid := os.fork():
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  for number, file in enumerate(files, 1):
    os.dup2(file.fileno(), number)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.environ |= environment
  signal.alarm(120)  # A command that waits for ever fails its test.
  tempfile.tempdir = None  # It is read again from the environment.
  if words[0] == "-m":
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
  else:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
  sys.exit()


def _serve():
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # What an import prints is no answer.
  for line in sys.stdin:
    request = json.loads(line)
    importlib.import_module(_module(request["words"]))
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as e:
      code = _fork(request["words"], request["env"], (out, e))
      said = [file.seek(0) or file.read() for file in (out, e)]
    answer = {"returncode": code, "stdout": said[0], "stderr": said[1]}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  _serve()
