"""Evaluates a model on whole splits of the data."""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from sigattn import tasks
from sigattn.data import loader
from sigattn.training import mesh, setup


def evaluator(
  config: ConfigDict, devices: jax.sharding.Mesh
) -> Callable[[Any, Iterable[loader.Batch]], dict[str, float]]:
  """Returns a function (params, batches) -> metrics.

  It adds up what the task's `evaluate` returns for each batch and passes the
  sums to the task's `results`; a task without `results` gets each sum divided
  by the sum of the weights.

  Args:
    config: of the run, or of one of its evaluation variants.
    devices: the mesh over which each batch is split.
  """
  task = tasks.get(config.task)
  static = setup.graphdef(config, devices)
  score = getattr(task, "score", None)
  results = getattr(task, "results", _means)

  # Replicated, because each process reads all of the sums.
  @functools.partial(jax.jit, out_shardings=mesh.replicated(devices))
  def sums(params, batch):
    return task.evaluate(config, nnx.merge(static, params), batch)

  def evaluate(params, batches):
    total = None
    for batch in batches:
      part = sums(params, mesh.put(batch, devices))
      if score is not None:
        part = score(config, jax.device_get(part))
      total = part if total is None else jax.tree.map(operator.add, total, part)
    metrics = results(config, jax.device_get(total))
    return {name: float(value) for name, value in metrics.items()}

  return evaluate


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
