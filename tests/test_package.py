"""Installs the library as a user does, beside packages with the same names.

It makes a fresh clone, a source distribution of it, a wheel of that, and a
fresh environment.
"""

import os
import pathlib
import subprocess
import sys
import sysconfig
import venv

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*words, **options):
  done = subprocess.run(
    [*map(str, words)], capture_output=True, text=True, check=False, **options
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


class Environment:
  """A fresh environment. Its path begins with stubs of kernels and configs."""

  def __init__(self, folder):
    self.python = folder / "env" / "bin" / "python"
    venv.create(folder / "env")
    self._stubs, self._folder = folder / "stubs", folder
    for name in ("kernels", "configs"):
      (self._stubs / name).mkdir(parents=True)
      (self._stubs / name / "__init__.py").write_text(f"whose = 'other {name}'")

  def install(self, what):
    """Installs a package, with the versions of requirements.txt."""
    lock = ROOT / "requirements.txt"
    # Compiling all modules would take half of the time, and most of them are
    # never imported.
    run(
      sys.executable, "-m", "pip", "--python", self.python, "install",
      "--quiet", "--no-compile", "-c", lock, what,
    )  # fmt: skip

  def run(self, code):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(self._stubs), "JAX_PLATFORMS": "cpu"}
    return run(self.python, "-c", code, cwd=self._folder, env=environment)

  def add_packages_of_the_tests(self):
    """Adds the packages of this process after those of the environment."""
    [site] = self._folder.glob("env/lib/python*/site-packages")
    (site / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")


OPERATION = """
import sys, jax, jax.numpy as jnp, sigattn
x = jnp.ones((1, 16, 2, 8))
out, pull_back = jax.vjp(sigattn.dot_product_attention, x, x, x)
wanted = 16 / (1 + 16 * jnp.exp(-(8**0.5)))
assert abs(out - wanted).max() < 1e-3, out
assert all(jnp.isfinite(g).all() for g in pull_back(out))
from sigattn.kernels.triton import tiles
print("cards", sorted(tiles._table()))
import kernels, configs
assert (kernels.whose, configs.whose) == ("other kernels", "other configs")
heavy = {"flax", "optax", "absl", "ml_collections"} & set(sys.modules)
assert not heavy, heavy
for name in ("SelfAttention", "layers"):
  try:
    __import__("sigattn.layers") if name == "layers" else sigattn.SelfAttention
    raise SystemExit(f"{name} came without flax")
  except ImportError as error:
    assert "pip install 'sigattn[layers]'" in str(error), error
print(sigattn.__version__)
"""

LAYER = """
import jax.numpy as jnp, sigattn
from flax import nnx
layer = sigattn.SelfAttention(16, 2, max_length=8, rngs=nnx.Rngs(0))
assert layer(jnp.ones((1, 8, 16))).shape == (1, 8, 16)
theirs = nnx.MultiHeadAttention(
  2, 16, attention_fn=sigattn.flax_attention_fn, decode=False, rngs=nnx.Rngs(0)
)
assert theirs(jnp.ones((1, 8, 16))).shape == (1, 8, 16)
try:
  import sigattn.training.setup
except ImportError as error:
  assert "pip install 'sigattn[train]'" in str(error), error
"""

EVERYTHING = """
import importlib, importlib.metadata
files = importlib.metadata.files("sigattn")
names = [str(f) for f in files if str(f).endswith(".py")]
assert len(names) > 50 and all(name.startswith("sigattn/") for name in names)
for name in names:
  if not name.endswith("__main__.py"):
    importlib.import_module(
      name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    )
assert not [f for f in files if "embedded" in str(f)]
assert "sigattn/py.typed" in map(str, files)
from sigattn import sweep
from sigattn.data import hub
for refused in (
  lambda: hub.embedded("kjv", "kjv.txt.xz"),
  lambda: sweep.command("x.py", {}, "runs"),
):
  try:
    refused()
    raise SystemExit("not refused")
  except ValueError as error:
    assert "checkout" in str(error), error
"""


@pytest.mark.timeout(900)
def test_wheel_works_alone_and_beside_packages_of_the_same_names(tmp_path):
  clone = tmp_path / "clone"
  run("git", "clone", "--quiet", ROOT, clone)
  run(sys.executable, "-m", "build", "--outdir", tmp_path, clone)
  [wheel] = tmp_path.glob("*.whl")
  assert list(tmp_path.glob("*.tar.gz"))
  environment = Environment(tmp_path)
  environment.install(wheel)
  said = environment.run(OPERATION)
  assert "cards ['100', '120'" in said or "'90'" in said
  environment.install(f"{wheel}[layers]")
  environment.run(LAYER)
  environment.add_packages_of_the_tests()
  environment.run(EVERYTHING)


def test_a_checkout_does_not_hide_the_other_package_called_kernels(tmp_path):
  """python -m does not hide it either, though it puts the checkout first."""
  (tmp_path / "kernels").mkdir()
  (tmp_path / "kernels" / "__init__.py").write_text("whose = 'other'")
  code = "import sigattn.kernels.xla, kernels; print(kernels.whose)"
  said = run(
    sys.executable, "-c", code, cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(tmp_path)},
  )  # fmt: skip
  assert said == "other\n"
