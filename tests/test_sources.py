"""The sources call nothing that could run code from files that they read."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [
  *(ROOT / "sigattn").rglob("*.py"),
  *(ROOT / "kernels").rglob("*.py"),
  ROOT / "train.py",
  ROOT / "eval.py",
]

# Modules that make objects from bytes, or run them as code.
MODULES = {
  "cloudpickle", "code", "codeop", "dill", "joblib", "marshal", "pickle",
  "runpy", "shelve", "torch", "yaml",
}  # fmt: skip
BUILTINS = {"__import__", "compile", "eval", "exec"}
# Options of other libraries that allow pickled data, remote code or a shell.
ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}
ATTRIBUTES = {("os", "popen"), ("os", "system"), ("subprocess", "getoutput")}


def dangers(tree):
  """Yields (line, name) for each use of a name from the lists above."""
  for node in ast.walk(tree):
    line = getattr(node, "lineno", 0)
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module]
    else:
      names = []
    yield from ((line, x) for x in names if x.split(".")[0] in MODULES)
    if isinstance(node, ast.Name) and node.id in BUILTINS:
      yield line, node.id
    if isinstance(node, ast.Call):
      keywords = {k.arg for k in node.keywords if not _is_false(k.value)}
      yield from ((line, x) for x in sorted(keywords & ARGUMENTS, key=str))
    if isinstance(node, ast.Attribute):
      owner = getattr(node.value, "id", None)
      if (owner, node.attr) in ATTRIBUTES:
        yield line, f"{owner}.{node.attr}"


def _is_false(node):
  return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize(
  "path", SOURCES, ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_that_is_read_can_run_code(path):
  assert not list(dangers(ast.parse(path.read_text())))


@pytest.mark.parametrize(
  "source",
  [
    "import pickle",
    "from yaml import load",
    "eval(x)",
    "exec(x)",
    "f = eval",
    "__import__(x)",
    "np.load(file, allow_pickle=True)",
    "np.load(file, allow_pickle=flag)",
    "load_dataset(name, trust_remote_code=True)",
    "import torch.serialization",
    "subprocess.run(x, shell=True)",
    "os.system(x)",
  ],
)
def test_the_search_finds_what_it_looks_for(source):
  assert list(dangers(ast.parse(source)))


@pytest.mark.parametrize(
  "source", ["model.eval", "np.load(file)", "f(allow_pickle=False)", "jit(f)"]
)
def test_the_search_finds_nothing_else(source):
  assert not list(dangers(ast.parse(source)))
