"""Metrics of a model over whole splits."""

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
  """A function (params, batches) -> metrics, as the task's `results` says.

  devices: the mesh over which each batch is split.
  """
  task = tasks.get(config.task)
  static = setup.graphdef(config)
  score = getattr(task, "score", None)
  results = getattr(task, "results", _means)

  # Replicated, so that each process has all of it.
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
  """{name: config} of what eval.py evaluates beside the run's own split."""
  task_variants = getattr(tasks.get(config.task), "evaluation_variants", None)
  return task_variants(config) if task_variants else {}


def _means(config, sums):
  del config
  weight = sums.pop("weight")
  return {name: value / weight for name, value in sums.items()}
