"""Evaluates a model on whole splits of the data."""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from sigattn import tasks
from sigattn.data import loader
from sigattn.training import mesh, setup


def evaluator(
  config: ConfigDict, devices: jax.sharding.Mesh
) -> Callable[[Any, Iterable[loader.Batch]], dict[str, float]]:
  """Returns a function (params, batches) -> metrics.

  It adds up what the task's `evaluate` returns for each batch, and passes the
  sums to the task's `results`. If the task has no `results`, each sum is
  divided by the sum of the weights. If the task has `reference`, `evaluate`
  also gets the features of these examples.

  Args:
    config: of the run, or of one of its evaluation variants.
    devices: the mesh over which each batch is split.
  """
  task = tasks.get(config.task)
  static = setup.graphdef(config, devices)
  score = getattr(task, "score", None)
  results = getattr(task, "results", _means)

  # The sums are replicated, because each process reads all of them.
  @functools.partial(jax.jit, out_shardings=mesh.replicated(devices))
  def sums(params, batch, *bank):
    return task.evaluate(config, nnx.merge(static, params), batch, *bank)

  bank_of = None
  if hasattr(task, "reference"):
    bank_of, examples = represent(config, devices), task.reference(config)

  def evaluate(params, batches):
    bank = [] if bank_of is None else [bank_of(params, examples)]
    total = None
    for batch in batches:
      part = sums(params, mesh.put(batch, devices), *bank)
      if score is not None:
        part = score(config, jax.device_get(part))
      total = part if total is None else jax.tree.map(operator.add, total, part)
    metrics = results(config, jax.device_get(total))
    return {name: float(value) for name, value in metrics.items()}

  return evaluate


def represent(
  config: ConfigDict, devices: jax.sharding.Mesh
) -> Callable[[Any, Iterable[loader.Batch]], dict[str, jax.Array]]:
  """Returns a function (params, batches) -> the features of all examples.

  The features are {"feature": (M, D), "target": (M,), "weight": (M,)}, on every
  device; the weight is 0 for padding. Raises ValueError for a task without
  `represent`.
  """
  task = tasks.get(config.task)
  if not hasattr(task, "represent"):
    raise ValueError(
      f"config.task={config.task!r}; has no features that could be evaluated"
    )
  static = setup.graphdef(config, devices)
  jit = functools.partial(jax.jit, out_shardings=mesh.replicated(devices))

  @jit
  def features(params, batch):
    model = nnx.merge(static, params)
    feature_BD = task.represent(config, model, batch)
    return {"feature": feature_BD} | {k: batch[k] for k in ("target", "weight")}

  @jit
  def join(parts):
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

  def of_all(params, batches):
    return join([features(params, mesh.put(x, devices)) for x in batches])

  return of_all


def variants(config: ConfigDict) -> dict[str, ConfigDict]:
  """The configs that eval.py evaluates in addition to the run's own.

  Returns {name: config}, empty if the task has no `evaluation_variants`.
  """
  task_variants = getattr(tasks.get(config.task), "evaluation_variants", None)
  return task_variants(config) if task_variants else {}


def _means(config, sums):
  del config
  weight = sums.pop("weight")
  return {name: value / weight for name, value in sums.items()}
