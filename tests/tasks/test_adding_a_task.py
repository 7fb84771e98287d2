"""A new task needs one file in sigattn/tasks and one line in its TASKS."""

import json
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

TASK = '''
"""Majority: whether a sequence of coins has more ones than zeros."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sigattn import stack
from sigattn.data import loader
from sigattn.validate import choice, whole

UNIT = "sequences"
METRICS = ("loss",)
FIELDS, RULES = stack.FIELDS, stack.RULES


class SOURCE(loader.ExampleSource):
  FIELDS = {
    "data.length": whole(low=1),
    "data.train_split": choice(("train",)),
    "data.eval_split": choice(("test",)),
  }
  RULES = ()
  in_memory = True

  def __init__(self, length):
    self._length = length

  @staticmethod
  def open_source(config, split):
    return SOURCE(config.data.length)

  def __len__(self):
    return 64

  def train(self, indices_B, rng):
    return self.evaluate(indices_B)

  def evaluate(self, indices_B):
    seeds = map(np.random.default_rng, indices_B)
    coin_BT = np.stack([rng.integers(2, size=self._length) for rng in seeds])
    return {"coin": coin_BT, "target": (2 * coin_BT.sum(1) > self._length) * 1}


class Model(nnx.Module):
  def __init__(self, config, rngs):
    self.embed = nnx.Embed(2, config.model.width, rngs=rngs)
    self.stack = stack.make(config, max_length=config.data.length, rngs=rngs)
    self.head = nnx.Linear(config.model.width, 2, rngs=rngs)

  def __call__(self, coin_BT, rng=None):
    return self.head(self.stack(self.embed(coin_BT), rng).mean(1))


def build(config, rngs):
  return Model(config, rngs)


def loss(config, model, batch, rng):
  nats_B = optax.softmax_cross_entropy_with_integer_labels(
    model(batch["coin"], rng), batch["target"]
  )
  return nats_B.mean(), {"loss": nats_B.mean()}


def evaluate(config, model, batch):
  nats_B = optax.softmax_cross_entropy_with_integer_labels(
    model(batch["coin"]), batch["target"]
  )
  weight_B = batch["weight"]
  return {"loss": jnp.vdot(weight_B, nats_B), "weight": weight_B.sum()}
'''

CONFIG = """
from configs import common


def get_config():
  config = common.base()
  config.task = "majority"
  config.total_steps = 3
  config.batch_size = 8
  config.data = dict(
    length=9, train_split="train", eval_split="test", num_workers=0
  )
  config.model = dict(
    width=16, depth=1, num_heads=2, mlp_dim=32, mlp="gelu", norm="pre",
    norm_kind="layernorm", norm_epsilon=None, layer_scale=None, dropout=0.0,
    drop_path=0.0, remat="none",
    max_unrolled=6,
  )
  config.ckpt.best_metric = "loss"
  config.ckpt.best_mode = "min"
  return common.sigmoid(config).lock()
"""


def test_one_file_and_one_line_add_a_task(tmp_path):
  for name in ("sigattn", "kernels", "configs", "train.py", "eval.py"):
    copy = shutil.copy if name.endswith(".py") else shutil.copytree
    options = (
      {}
      if name.endswith(".py")
      else {
        "symlinks": True,
        "ignore": shutil.ignore_patterns("embedded", "__pycache__"),
      }
    )
    copy(ROOT / name, tmp_path / name, **options)
  tasks = tmp_path / "sigattn" / "tasks"
  (tasks / "majority.py").write_text(TASK)
  lines = (tasks / "__init__.py").read_text().splitlines(keepends=True)
  lines.insert(lines.index('  "lm",\n'), '  "majority",\n')
  (tasks / "__init__.py").write_text("".join(lines))
  (tmp_path / "configs" / "majority.py").write_text(CONFIG)

  def command(*words):
    done = subprocess.run(
      [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
      check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr

  code, said = command(
    "train.py", "--config=configs/majority.py", "--workdir=r"
  )
  assert code == 0, said
  done = json.loads((tmp_path / "r" / "DONE.json").read_text())
  assert done["step"] == 3
  code, said = command("eval.py", "--workdir=r")
  assert code == 0, said
  code, said = command(
    "train.py", "--config=configs/majority.py", "--config.data.length=0"
  )
  assert code == 1
  assert "config.data.length=0; must be a whole number >= 1" in said
  (tasks / "majority.py").write_text(TASK.replace("METRICS =", "SCORES ="))
  code, said = command("train.py", "--config=configs/majority.py")
  assert code == 1
  assert "sigattn.tasks.majority has no METRICS; the docstring" in said
  assert "Traceback" not in said
