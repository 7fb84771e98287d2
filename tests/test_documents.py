"""The documents: links, commands, the README's example and its numbers."""

import ast
import functools
import importlib.util
import inspect
import json
import pathlib
import re
import shlex
import statistics
import tomllib
import urllib.parse

import jax
import numpy as np
import pytest
from flax import nnx

import sigattn
from benchmarks import attention
from configs import lm_85m
from sigattn import cli
from sigattn.kernels import problem
from sigattn.validate import value_at

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS.append(ROOT / "benchmarks" / "NOTES.md")
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def fences(text, language):
  """The fenced blocks of code in one language, or in none."""
  blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
  return [block for name, block in blocks if name == language]


def prose(path):
  """A document without its code."""
  text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
  return re.sub(r"`[^`\n]*`", "", text)


@functools.cache
def anchors(path):
  """The anchors that GitHub makes from a document's headings."""
  found = {}
  text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
  for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE):
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
    found[slug] = found.get(slug, -1) + 1
    if found[slug]:
      found[f"{slug}-{found[slug]}"] = 0
  return {*found}


def dead_links(path):
  """The relative links of a document that lead nowhere."""
  links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", prose(path))
  for link in ("".join(pair) for pair in links):
    where, _, anchor = urllib.parse.unquote(link).partition("#")
    if urllib.parse.urlparse(link).scheme:
      continue
    target = (path.parent / where).resolve() if where else path
    exists = target.is_relative_to(ROOT) and target.exists()
    if not exists or (anchor and anchor not in anchors(target)):
      yield link


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_relative_links_lead_somewhere(path):
  assert not [*dead_links(path)]


def test_a_dead_link_is_found(tmp_path, monkeypatch):
  monkeypatch.setitem(globals(), "ROOT", tmp_path)
  path = tmp_path / "a.md"
  path.write_text(
    "# A `b`, c\n[1](#a-b-c) [2](#d) [3](a.md#a-b-c) [4](no.md) [5](a.md#d)\n"
    '[6](https://x.org/y) <img src="no.png"> `[7](no)`\n'
    "```\n# d\n[8](no)\n```\n"
  )
  assert [*dead_links(path)] == ["#d", "no.md", "a.md#d", "no.png"]


# The name that documents use for a config of the reader.
PLACEHOLDER = "..."


def commands(path):
  """The commands of a document that start Python, as lists of words."""
  text = path.read_text()
  lines = re.findall(r"`(python [^`\n]+)`", text)
  for block in fences(text, ""):
    lines += block.replace("\\\n", " ").splitlines()
  for line in lines:
    for command in line.split("&&"):
      if re.match(r"\s*(\S+=\S+ |srun )*\S*python ", command):
        yield shlex.split(command, comments=True)


def config_of(word):
  """The config that --config=configs/FILE.py:ARGUMENT names."""
  name, _, argument = word.removeprefix("--config=").partition(":")
  spec = importlib.util.spec_from_file_location("documented", ROOT / name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument) if argument else module.get_config()


def check_command(words):
  """Raises an error if a script, command, config or field does not exist."""
  program = next(i for i, x in enumerate(words) if x.endswith("python"))
  words = words[program + 1 :]
  if words[0] != "-m":
    assert (ROOT / words[0]).is_file() or words[0] == "spills.py", words[0]
  else:
    name = words[1].split(".")[0]
    assert importlib.util.find_spec(words[1]) or name == "venv", words[1]
    if words[1] == "sigattn" and len(words) > 2 and words[2] != "COMMAND":
      assert words[2] in cli.COMMANDS, words[2]
  files = [word for word in words if word.startswith("--config=")]
  if not files or PLACEHOLDER in files[0]:
    return
  config = config_of(files[0])
  for word in words:
    if word.startswith("--config."):
      value_at(config, word.removeprefix("--config.").partition("=")[0])


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_commands_name_what_exists(path):
  for words in commands(path):
    check_command(words)


@pytest.mark.parametrize(
  ("line", "error"),
  [
    ("python tran.py", AssertionError),
    ("python -m sigattn generat", AssertionError),
    ("python train.py --config=configs/vit.py:imagnet", ValueError),
    ("python train.py --config=configs/vit.py --config.a.b=1", ValueError),
  ],
)
def test_a_wrong_command_is_found(line, error):
  with pytest.raises(error):
    check_command(line.split())


@functools.cache
def run_examples(document):
  """Runs the Python of a document, and returns the names that it defines."""
  names = {"__name__": "example"}
  for block in fences((ROOT / document).read_text(), "python"):
    exec(compile(block, document, "exec"), names)
  return names


@pytest.fixture(
  scope="module", params=["README.md", "docs/operation.md"], ids=str
)
def example(request):
  return run_examples(request.param)


def test_the_example_computes_the_formula(example):
  q, k, v = (np.asarray(example[x], float) for x in ("query", "key", "value"))
  n, d = q.shape[1], q.shape[-1]
  logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(d) - np.log(n)
  weights = np.tril(1 / (1 + np.exp(-logits)))
  out = np.einsum("bnts,bsnh->btnh", weights, v)
  np.testing.assert_allclose(example["out"], out, rtol=2e-3, atol=2e-4)


def test_the_layer_of_the_example_runs(example):
  x = jax.numpy.ones((2, 16, 512))
  assert example["layer"](x).shape == x.shape


def test_the_decoding_step_of_the_example_is_its_row_of_the_whole():
  names = run_examples("docs/operation.md")
  wanted = names["out"][:, 5:6]
  np.testing.assert_allclose(names["step"], wanted, rtol=1e-5, atol=1e-6)
  wanted = names["out"][names["rows"], names["places"]][:, None]
  found = names["step_of_rows"]
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_step_of_pages_of_the_example_is_its_row_of_the_whole():
  names = run_examples("docs/operation.md")
  wanted = names["out"][names["rows"], names["lengths"] - 1][:, None]
  found = names["step_of_pages"]
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_joined_shards_of_the_example_are_the_whole():
  names = run_examples("docs/operation.md")
  arrays = [names[x] for x in ("query", "key", "value")]
  wanted = sigattn.dot_product_attention(
    *arrays, normalize=True, is_causal=True
  )
  np.testing.assert_allclose(names["joined"], wanted, rtol=1e-4, atol=1e-5)
  wanted = sigattn.dot_product_attention(*arrays, kind="softmax")
  found = names["joined_softmax"]
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_both_masks_of_keys_in_the_example_are_the_same():
  names = run_examples("docs/operation.md")
  wanted, found = names["masked"], names["biased"]
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_decoding_of_flax_in_the_example_is_a_row_of_the_whole():
  names = run_examples("docs/jax_nn.md")
  wanted = names["whole"][:, 2:3]
  np.testing.assert_allclose(names["y"], wanted, rtol=1e-4, atol=1e-6)


def test_the_bias_of_the_example_is_trained():
  layer = run_examples("docs/operation.md")["layer"]
  x = jax.random.normal(jax.random.key(0), (1, 4, 512))
  grads = nnx.grad(lambda layer: layer(x).sum())(layer)
  assert grads["attention_fn"]["b"][...].all()


def test_the_readme_is_short():
  assert len(README.read_text().splitlines()) <= 150


def test_ci_runs_the_test_command_of_the_readme():
  [block] = [x for x in fences(README.read_text(), "") if "pytest" in x]
  assert block in (ROOT / ".ci" / "run").read_text()


def rows_below(heading, path=README):
  """The rows of a document's table whose heading begins with this text."""
  text = path.read_text()
  return text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]


def test_the_readmes_arguments_exist():
  parameters = inspect.signature(sigattn.dot_product_attention).parameters
  for row in rows_below("| argument |"):
    names = re.findall(r"`(\w+)`", row.split("|")[1])
    assert names
    assert {*names} <= {*parameters}, row


def test_the_readmes_speeds_are_those_of_the_result_files():
  files = "attention_h100", "attention_h200"
  assert f"attention --table {' '.join(files)}`" in README.read_text()
  lines = [*attention.speedups(files)]
  assert len(lines) == 12
  assert rows_below("| card |") == lines


def test_the_readmes_training_speeds_are_those_of_the_result_file():
  file = ROOT / "benchmarks" / "results" / "train_step_nvidia_h200.json"
  measured = {
    f"{row.get('tokens_per_second') or row.get('images_per_second'):,.0f}"
    for row in json.loads(file.read_text())["rows"]
  }
  _, text = README.read_text().split("On one H200, a language model")
  text, _ = text.split("`python -m benchmarks.train_step`")
  found = re.findall(r"\d+,\d{3}", text)
  assert len(found) == 12
  assert {*found} - measured == {"4,096"}  # the length of a row


def test_the_readmes_losses_of_85_million_parameters_are_those_of_the_file():
  file = ROOT / "benchmarks" / "results" / "lm_85m.json"
  losses = {}
  for row in json.loads(file.read_text())["rows"]:
    if not row["short"]:
      losses.setdefault(row["form"], []).append(row["test_loss"])
  softmax, sigmoid, normalized, low = (
    f"{statistics.mean(losses[form]):.3f}" for form in lm_85m.FORMS
  )
  line = f" {softmax} | {sigmoid} | {normalized}; b = −14: {low} |"
  assert line in README.read_text()


FORMS = ("softmax", "sigmoid", "normalised, b = -log n")
LOW = "normalised, b = -14"
# {heading of a row: (study, values of its setting, length of the rows)}
STUDIES = {
  "text, King James Bible": ("default_language", {}, None),
  "sequences of 8,192": ("gap", {"data.length": 8192}, None),
  "eight times the training length, RoPE alone:": (
    "length", {"attn.window": None}, "2048",
  ),
  "eight times the training length, RoPE alone, a window": (
    "length", {"attn.window": 255}, "2048",
  ),
}  # fmt: skip


@pytest.mark.parametrize("heading", STUDIES)
def test_the_readmes_losses_are_those_of_the_studies(heading):
  study, values, length = STUDIES[heading]
  file = ROOT / "benchmarks" / "results" / "science" / f"{study}.json"
  rows = {
    row["form"]: row["loss_at"][length] if length else row["test"]["loss"]
    for row in json.loads(file.read_text())["rows"]
    if all(row["setting"].get(name) == x for name, x in values.items())
  }
  found = {
    form: f"{statistics.fmean(x):.3f} ± {statistics.stdev(x):.3f}"
    for form, x in rows.items()
  }
  wanted = [found[form] for form in FORMS]
  if study == "length" and not values["attn.window"]:
    wanted[-1] += f"; b = −14: {found[LOW]}"
  [line] = [x for x in rows_below("| held-out") if x.startswith(f"| {heading}")]
  assert [x.strip() for x in line.split("|")[2:-1]] == wanted


def kinds_of_readme():
  [row] = [x for x in rows_below("| argument |") if x.startswith("| `kind` |")]
  return re.findall(r'`"(\w+)"`', row)


def kinds_of_operation():
  rows = rows_below("| kind | φ(z)", ROOT / "docs" / "operation.md")
  return [row.split("|")[1].strip(' `"') for row in rows]


def kinds_of_docstring():
  text = inspect.getdoc(sigattn.dot_product_attention)
  [table] = [x for x in text.split("\n\n") if x.startswith("kind ")]
  return [line.split()[0] for line in table.splitlines()[1:]]


def kinds_of_config():
  text = (ROOT / "configs" / "common.py").read_text()
  [line] = re.findall(r'kind="softmax",  # (.*)', text)
  return re.split(r", | or ", line)


@pytest.mark.parametrize(
  "kinds",
  [kinds_of_readme, kinds_of_operation, kinds_of_docstring, kinds_of_config],
)
def test_documents_name_every_kind(kinds):
  assert sorted(kinds()) == sorted(sigattn.attention.KINDS)


KERNELS = ROOT / "docs" / "kernels.md"


def defined(path):
  """The names in a Python file, with methods as Class.method."""
  names = set()
  for node in ast.parse(path.read_text()).body:
    names |= {getattr(node, "name", None)}
    for target in getattr(node, "targets", ()):
      names |= {getattr(target, "id", None)}
    if isinstance(node, ast.ClassDef):
      names |= {f"{node.name}.{getattr(x, 'name', '')}" for x in node.body}
  return names


def section_about_kinds():
  anchor = problem.HOW_TO_ADD.partition("#")[2]
  assert anchor in anchors(KERNELS)
  text = KERNELS.read_text().partition("## How to add a kind of attention")[2]
  return text.partition("\n## ")[0]


def test_the_places_of_a_kind_exist():
  for row in rows_below("| place | must", KERNELS):
    place = row.split("|")[1]
    file, *names = re.findall(r"`([^`]+)`", place)
    assert {*names} <= defined(ROOT / file), place
    assert names, place


def test_the_code_of_a_kind_is_that_of_the_files():
  [diff] = fences(section_about_kinds(), "diff")
  parts = re.findall(r"^--- (\S+), (\w+)\n((?:\+.*\n)+)", diff, re.MULTILINE)
  assert len(parts) == diff.count("---")
  for file, _, lines in parts:
    assert re.sub(r"^\+", "", lines, flags=re.M) in (ROOT / file).read_text()


def test_the_citation_has_the_version():
  text = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {sigattn.__version__}\n" in text
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert f"\nlicense: {project['license']}\n" in text
