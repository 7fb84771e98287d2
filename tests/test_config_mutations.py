"""Sets every field of every config to values that are wrong or at an edge.

Validation refuses the value and names its path before any work starts, or the
step can be traced with it. Some of the values train a step.
"""

import ast
import copy
import functools
import json
import math
import random
import re

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from configs import (
  byol_sigmoid,
  lm_sigmoid,
  mae_sigmoid,
  simclr_sigmoid,
  speech_sigmoid,
  synthetic_sigmoid,
  vit_sigmoid,
)
from sigattn import tasks
from sigattn.training import mesh, setup, step
from tests.test_configs import leaves

CONFIGS = {
  "vit": vit_sigmoid.get_config("runlocal"),
  "lm": lm_sigmoid.get_config("runlocal"),
  "speech": speech_sigmoid.get_config("runlocal"),
  "synthetic": synthetic_sigmoid.get_config("recall,runlocal"),
}
# Speech's default buckets are long. A shorter one compiles faster.
with CONFIGS["speech"].unlocked():
  CONFIGS["speech"].data.bucket_seconds = (1.25,)
  CONFIGS["speech"].model.depth = 1
FIELDS = [
  (name, path) for name, config in CONFIGS.items() for path in leaves(config)
]
TRAINED = [*CONFIGS]
# Of these configs, only the fields that no other config has are tested. They
# are validated, and no step is traced.
CONFIGS |= {
  "simclr": simclr_sigmoid.get_config("runlocal"),
  "byol": byol_sigmoid.get_config("runlocal"),
  "mae": mae_sigmoid.get_config("runlocal"),
}
for name in ("simclr", "byol", "mae"):
  known = {path for _, path in FIELDS}
  FIELDS += [(name, x) for x in leaves(CONFIGS[name]) if x not in known]
TABLES = {name: setup.tables(name)[0] for name in CONFIGS}

# Validation reads these parts; the step does not.
UNREAD = ("eval.", "ckpt.", "log.", "telemetry.", "data.num_workers")
# The model reads neither these nor the fields of the optimizer.
NOT_OF_THE_MODEL = (*UNREAD, "optim.")

NAN, INFINITY = math.nan, math.inf
WRONG = [
  None, True, False, "abc", "", "nan", "12", b"12", 1j, object(), {}, [], (),
  {"a": 1}, np.float32(0.5), np.array([1, 2]), len,
  NAN, INFINITY, -INFINITY, -1, -1.0, -1e-9, 0, 0.0, -0.0, 1, 1.0, 2, 0.5,
  5e-324, 1e-300, 1e-12, 1e12, 1e300, 10**6, 10**12, 2**31, 2**32, 2**63,
  -(2**63), 10**400, -(10**400), 10**5000,
  (None,), (NAN,), (INFINITY,), (0,), (-1,), (1, 0), (1, 2), ((),), ("a", "b"),
  (1,) * 5000, ((1, 1),), ((0, 1),), ((7, 3), 5), (("a",),), (("a", 1, 2),),
  (("(", 1.0),), (("a", 1.0),), ((".*", -1.0),), ((".*", NAN),),
  ((".*", None),), ((".*", "1"),), ((".*", 1e300),), ((".*", 0.5),),
  ((None, 1.0),), (("a{99999999999}", 1.0),), "\0", "x" * 300, "x" * 5000,
  "~nobody.of.this.name/x", "/dev", "\ud800", " ", "train+", "+",
]  # fmt: skip


def at_the_edges(name, path):
  """Values near the one in the config and near those that its error names."""
  config, wanted = CONFIGS[name], TABLES[name][path].wanted
  now = get(config, path)
  if wanted.startswith("choose from"):
    return ast.literal_eval(wanted.removeprefix("choose from"))
  numbers = [
    ast.literal_eval(x)
    for x in re.findall(r"-?\d[\d.]*(?:e[+-]?\d+)?", wanted.rstrip("."))
  ]
  if isinstance(now, (tuple, list)):
    values = [now[:-1], now * 2, [*now], *([x] for x in now)]
    return [*values, *((x,) for x in numbers), *((x, x) for x in numbers)]
  if isinstance(now, (int, float)) and not isinstance(now, bool):
    numbers += [now, now / 2, 2 * now]
    if isinstance(now, int):
      numbers += [now // 2, now + 1, now - 1]
  whole = [y for x in numbers if x == int(x) for y in (x - 1, x, x + 1)]
  near = [math.nextafter(x, side) for x in numbers for side in (-1e99, 1e99)]
  return [*whole, *map(int, whole), *numbers, *near] or [True, False]


def get(config, path):
  return functools.reduce(lambda node, key: node[key], path.split("."), config)


def mutated(config, path, value):
  """The config with a new value, even if ml_collections would refuse it."""
  config = copy.deepcopy(config).unlock()
  *parents, key = path.split(".")
  with config.ignore_type():
    node = get(config, ".".join(parents)) if parents else config
    node[key] = value
  return config


def refused(config, path):
  """Whether validation refuses the config. The error must name the path."""
  try:
    setup.validate_config(config)
  except ValueError as error:
    message = str(error)
    assert f"config.{path}" in message or path == "task", message
    assert len(message) < 4000
    return True
  return False


def read_parts(config, unread=UNREAD):
  """The fields of a config that are not `unread`, as text."""
  parts = {
    path: get(config, path)
    for path in leaves(config)
    if not path.startswith(unread)
  }
  return json.dumps(parts, sort_keys=True)


@functools.lru_cache(maxsize=16)
def _model(parts):
  del parts  # only the key of the cache; the config is an attribute
  return BUILD(_model.config)


BUILD = setup._abstract


@pytest.fixture(autouse=True)
def models_of_the_same_fields_are_built_once(monkeypatch):
  """Each validation builds the shapes of a model, half of all the time."""

  def build(config):
    _model.config = config
    return _model(read_parts(config, NOT_OF_THE_MODEL))

  monkeypatch.setattr(setup, "_abstract", build)


@functools.lru_cache(maxsize=8)
def _one_example(parts):
  del parts  # only the key of the cache; the config is an attribute
  return {
    key: (x.shape, x.dtype)
    for key, x in next(tasks.train_batches(_one_example.config)).items()
  }


def batch_shapes(config):
  """The shapes of a batch. Only one example is read."""
  one = config.copy_and_resolve_references().unlock()
  one.batch_size = one.optim.accumulate = 1
  _one_example.config = one
  parts = json.dumps(
    [one.data.to_dict(), "augment" in one and one.augment.to_dict()]
  )
  return {
    key: jax.ShapeDtypeStruct((config.batch_size * shape[0], *shape[1:]), dtype)
    for key, (shape, dtype) in _one_example(parts).items()
  }


def trace(config):
  def first(batch):
    state, update = step.init(config, mesh.make())
    return update(state, batch)

  jax.eval_shape(first, batch_shapes(config))


# How many mutations were tried, and with which result.
COUNTS = dict.fromkeys(("tried", "refused", "unread", "traced"), 0)
traced = set()


@pytest.mark.parametrize(("name", "path"), FIELDS)
def test_a_mutation_is_refused_by_its_path_or_traces(name, path):
  # Tracing takes half a second, so a field that tasks share is traced in one of
  # them only.
  owners = [other for other in TRAINED if path in TABLES[other]] or [None]
  budget = int(owners[sum(map(ord, path)) % len(owners)] == name)

  @hypothesis.settings(
    derandomize=True, database=None, deadline=None, max_examples=8
  )
  @hypothesis.given(
    strategies.sampled_from(at_the_edges(name, path))
    | strategies.sampled_from(WRONG)
  )
  def check(value):
    nonlocal budget
    try:
      config = mutated(CONFIGS[name], path, value)
    except OverflowError:  # ml_collections converts an int to a float.
      return
    COUNTS["tried"] += 1
    if refused(config, path):
      COUNTS["refused"] += 1
    elif path.startswith(UNREAD):
      COUNTS["unread"] += 1
    elif budget and (parts := read_parts(config)) not in traced:
      budget -= 1
      traced.add(parts)
      trace(config)
      COUNTS["traced"] += 1

  check()


def is_modest(path, value):
  """Whether a machine with little memory can train with the value."""
  sizes = path.startswith(("model.", "data.", "batch_size", "augment.pad"))
  values = np.atleast_1d(np.asarray(value if sizes else 0, object))
  return not any(
    isinstance(x, (int, float)) and x > 1000 for x in values.ravel()
  )


def drawn_together(name, rng):
  """The config with edge values in five fields, and {path: value}.

  Compiling a step takes nearly all of the time, so five values share a step.
  """
  config, chosen = CONFIGS[name], {}
  paths = [path for path in leaves(config) if not path.startswith(UNREAD)]
  while len(chosen) < 5:
    path = rng.choice([path for path in paths if path not in chosen])
    value = rng.choice(at_the_edges(name, path))
    if not is_modest(path, value):
      continue
    new = mutated(config, path, value)
    if read_parts(new) == read_parts(config):
      continue
    try:
      setup.validate_config(new)
    except ValueError:  # the test above checks the message
      continue
    config, chosen[path] = new, value
  return config, chosen


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_mutations_that_pass_train_a_step(name):
  config, chosen = drawn_together(name, random.Random(0))
  state, update = step.init(config, mesh.make())
  batch = next(tasks.train_batches(config))
  state, metrics = step.jitted(update)(state, batch)
  assert math.isfinite(metrics["loss"]), (name, chosen)
  assert int(state.step) == 1
