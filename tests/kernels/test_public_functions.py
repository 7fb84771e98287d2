"""Functions of kernels/ are short; public ones have types and docstrings."""

import ast
import pathlib

import pytest

import sigattn.kernels.dispatch as dispatch

_ROOT = pathlib.Path(dispatch.__file__).parent
# Functions in Triton's language have their own types (tl.constexpr).
_FILES = sorted(
  path for path in _ROOT.rglob("*.py") if not path.match("triton/*kernel*.py")
)


def _public(node):
  """The public functions and classes of a module and of its classes."""
  for child in node.body:
    kinds = ast.FunctionDef, ast.ClassDef
    if not isinstance(child, kinds) or child.name.startswith("_"):
      continue
    yield child
    if isinstance(child, ast.ClassDef):
      yield from _public(child)


def _untyped(function):
  arguments = function.args
  for x in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
    if x.annotation is None and x.arg not in ("self", "cls"):
      yield x.arg
  if function.returns is None:
    yield "return"


@pytest.mark.parametrize(
  "path", _FILES, ids=lambda path: str(path.relative_to(_ROOT))
)
def test_public_functions_have_types_and_docstrings(path):
  for node in _public(ast.parse(path.read_text())):
    assert ast.get_docstring(node), node.name
    if isinstance(node, ast.FunctionDef):
      assert not list(_untyped(node)), node.name


_NESTING = ast.FunctionDef, ast.If, ast.For, ast.While, ast.With, ast.Try


def _depth(node):
  """How deeply the blocks of a function are nested."""
  return max(
    (
      _depth(child) + isinstance(child, _NESTING)
      for child in ast.iter_child_nodes(node)
    ),
    default=0,
  )


@pytest.mark.parametrize(
  "path",
  sorted((_ROOT / "mosaic").glob("*.py")),
  ids=lambda path: path.name,
)
def test_functions_of_the_hopper_kernels_are_short(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      lines = node.end_lineno - node.lineno + 1
      assert (lines <= 60) & (_depth(node) <= 3), (node.name, lines)
