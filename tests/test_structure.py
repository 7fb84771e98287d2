"""The structure of the library: allowed imports, and documented functions."""

import ast
import graphlib
import pathlib
import re
import sys
import tomllib

import pytest

from sigattn import extras

ROOT = pathlib.Path(__file__).parents[1]

# {room: the rooms that it may import besides itself}. A room is a folder of
# sigattn/, or a file that is directly in sigattn/.
ARROWS = {
  "kernels": set(),
  "attention": {"kernels"},
  "positions": set(),
  "extras": set(),
  "interrupt": set(),  # Ctrl-C
  "layers": {"attention", "paged", "positions", "extras"},
  "validate": {"extras"},
  "stack": {"attention", "layers", "validate", "extras"},
  "data": {"validate", "extras"},
  "tasks": {
    "token_step",
    "stack",
    "layers",
    "attention",
    "positions",
    "data",
    "validate",
    "extras",
  },
}
ARROWS["pretrained"] = {"layers", "validate", "extras"}
ARROWS["ring"] = {"attention", "kernels"}
ARROWS["paged"] = {"attention", "kernels"}
ARROWS["token_step"] = {
  "attention", "extras", "kernels", "layers", "positions",
}  # fmt: skip
# Only training knows the mesh and the attention on a mesh.
ARROWS["training"] = {
  "pretrained", "tasks", "data", "validate", "extras", "attention", "ring",
  "interrupt",
}  # fmt: skip
_ABOVE_TRAINING = {"training", *ARROWS["training"], *ARROWS["tasks"]}
ARROWS["inference"] = _ABOVE_TRAINING
ARROWS["analysis"] = _ABOVE_TRAINING
ARROWS["sweep"] = {"training", "analysis", "cli"}  # cli: only as a program
ARROWS["cli"] = {"extras", "interrupt"}  # its commands are imported by name
ARROWS["__main__"] = {"cli", "extras"}
# The layers are imported by name.
ARROWS["__init__"] = {"attention", "paged", "ring"}


def sources():
  """{module name: path} of the library."""
  paths = [
    p for p in (ROOT / "sigattn").rglob("*.py") if "kernels" not in p.parts
  ]
  modules = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in paths
  }
  for path in (ROOT / "kernels").rglob("*.py"):
    parts = path.relative_to(ROOT).with_suffix("").parts
    modules[".".join(("sigattn", *parts))] = path
  return {
    name.removesuffix(".__init__"): path for name, path in modules.items()
  } | {"sigattn.__init__": ROOT / "sigattn" / "__init__.py"}


SOURCES = sources()


def imports(path):
  """The full names of all imports of a file, including those in functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        yield whole if whole in SOURCES else node.module


def room(module):
  return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_arrows(module):
  if module == "sigattn":
    return  # the same file as sigattn.__init__
  allowed = {room(module), *ARROWS[room(module)]}
  for name in imports(SOURCES[module]):
    top = name.split(".")[0]
    assert top not in ("kernels", "configs", "benchmarks", "train", "tests")
    if top == "sigattn" and name != "sigattn":
      assert room(name) in allowed, f"{module} imports {name}"


def test_there_is_no_circle():
  graph = {
    module: {
      name
      for name in imports(path)
      # `sweep` starts `cli` as a program, which imports it by name.
      if name in SOURCES and name not in ("sigattn", module)
    }
    for module, path in SOURCES.items()
  }
  order = list(graphlib.TopologicalSorter(graph).static_order())
  assert len(order) >= len(SOURCES) - 1


def test_the_kernels_know_nothing_of_flax_or_configs():
  for module, path in SOURCES.items():
    if room(module) == "kernels":
      tops = {name.split(".")[0] for name in imports(path)}
      assert not tops & {"flax", "optax", "ml_collections", "absl", "grain"}


def public_functions():
  """Yields (module, name, node) for each public function and method."""
  for module, path in SOURCES.items():
    if module == "sigattn.__init__" or path.match("kernels/triton/*kernel*.py"):
      continue  # Triton would read types as constants.
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.FunctionDef):
        yield module, node.name, node
      if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        for inner in node.body:
          if isinstance(inner, ast.FunctionDef):
            yield module, f"{node.name}.{inner.name}", inner


def is_public(name):
  last = name.rpartition(".")[2]
  return not last.startswith("_") or last in ("__init__", "__call__")


def test_public_functions_have_types():
  """ruff's ANN rules ignore a function that has no types at all."""
  bare = []
  for module, name, node in public_functions():
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments = [x for x in arguments if x.arg not in ("self", "cls")]
    typed = all(x.annotation is not None for x in arguments)
    returns = node.returns is not None or name.endswith("__init__")
    if is_public(name) and not (typed and returns):
      bare.append(f"{module}.{name}")
  assert not bare


def described(docstring):
  """The names that the section Args of a docstring explains."""
  section = re.search(r"^Args:\n((?:  .*\n?|\n)+)", docstring, re.MULTILINE)
  if not section:
    return set()
  lines = re.findall(r"^  (\w+(?:, \w+)*):", section[1], re.MULTILINE)
  return {name for line in lines for name in line.split(", ")}


def arguments(node):
  """The names of the arguments of a function or of a class's __init__."""
  if isinstance(node, ast.ClassDef):
    [node] = [x for x in node.body if getattr(x, "name", "") == "__init__"]
  return {x.arg for x in ast.walk(node.args) if isinstance(x, ast.arg)}


def test_the_arguments_that_docstrings_explain_exist():
  """The reference shows them. "key, value: ..." explains two arguments."""
  wrong, right = [], 0
  for module, path in SOURCES.items():
    for node in ast.walk(ast.parse(path.read_text())):
      if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        continue
      names = described(ast.get_docstring(node) or "")
      unknown = names and names - arguments(node)
      right += len(names) - len(unknown)
      wrong += [f"{module}.{node.name}: {name}" for name in unknown]
  assert right > 100
  assert wrong == []


# {import name: name of the distribution}, where the two differ.
DISTRIBUTIONS = {
  "PIL": "pillow",
  "absl": "absl-py",
  "dm_pix": "dm-pix",
  "huggingface_hub": "huggingface-hub",
  "lm_eval": "lm-eval",
  "ml_collections": "ml-collections",
  "orbax": "orbax-checkpoint",
}


def requirements(extra):
  """The distributions that an extra of pyproject.toml installs."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  names = set()
  for line in project["optional-dependencies"][extra]:
    if line.startswith("sigattn["):
      for other in line.removeprefix("sigattn[").removesuffix("]").split(","):
        names |= requirements(other)
    else:
      names.add(line.split("[")[0].split(">")[0].split("=")[0].strip())
  return names


@pytest.mark.parametrize("extra", extras.PACKAGES)
def test_the_extra_that_an_error_names_brings_the_packages(extra):
  wanted = {DISTRIBUTIONS.get(x, x) for x in extras.PACKAGES[extra]}
  assert wanted <= requirements(extra)


# Modules that need another extra than the rest of their room.
SPEECH = {"sigattn.data.speech", "sigattn.tasks.ctc"}
EVAL = {"sigattn.inference.lm_eval"}
SELFSUP = {"sigattn.data.views"}
BASE = {"jax", "jaxlib", "numpy"}


@pytest.mark.parametrize("module", SOURCES)
def test_what_is_imported_is_brought_by_the_extra(module):
  """Otherwise an installation lacks it, and no error says what to install."""
  packages = set(BASE)
  if room(module) == "kernels":
    packages |= {"triton", "jax_triton"}  # triton.unsupported names them
  elif room(module) in ("attention", "layers"):
    packages |= {*extras.PACKAGES["layers"]}
  elif room(module) not in ("__init__", "positions", "extras"):
    packages |= {*extras.PACKAGES["train"]}
  if module in SPEECH:
    packages |= {*extras.PACKAGES["speech"]}
  if module in EVAL:
    packages |= {*extras.PACKAGES["eval"]}
  if module in SELFSUP:
    packages |= {*extras.PACKAGES["selfsup"]}
  for name in imports(SOURCES[module]):
    top = name.split(".")[0]
    if top not in sys.stdlib_module_names and top != "sigattn":
      assert top in packages, f"{module} imports {name}"
