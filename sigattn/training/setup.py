"""Validates a whole config and builds the model that it describes.

`validate_config` rejects a bad config before any work starts. `init` builds a
task's model and its parameters, `graphdef` the model without parameters, and
`model` a callable model with given parameters.
"""

from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from sigattn import pretrained, tasks, validate
from sigattn.data import loader
from sigattn.training import mesh, optim
from sigattn.validate import choice, flag, text, whole

MAX_STEPS = 10**9  # The devices count steps in int32.

FIELDS = {
  "task": choice(tasks.TASKS),
  "total_steps": whole(low=1, high=MAX_STEPS),
  "optim.non_finite": choice(("raise", "skip")),
  "optim.max_skipped": whole(low=1, high=MAX_STEPS),
  "eval.every_steps": whole(low=0, high=MAX_STEPS),
  "ckpt.every_steps": whole(low=0, high=MAX_STEPS),
  "ckpt.keep": whole(low=1, high=MAX_STEPS),
  "ckpt.best_metric": text(),
  "ckpt.best_mode": choice(("max", "min")),
  "log.every_steps": whole(low=1, high=MAX_STEPS),
  "log.tensorboard": flag(),
  "telemetry.every_steps": whole(low=0, high=MAX_STEPS),
  "telemetry.examples": whole(low=1, high=2**16),
}


def _best_metric_of_the_task(config):
  metrics = tasks.get(config.task).METRICS
  if config.ckpt.best_metric not in metrics:
    raise ValueError(
      f"config.ckpt.best_metric={config.ckpt.best_metric!r}; choose from "
      f"{sorted(metrics)}"
    )


def _groups_match_parameters(config):
  """Builds the optimizer, of parameters that are not allocated."""
  task = tasks.get(config.task)
  model = nnx.eval_shape(lambda: task.build(config, nnx.Rngs(0)))
  optim.make(config, nnx.to_pure_dict(nnx.state(model)))


RULES = (_best_metric_of_the_task,)
LAST_RULES = (_groups_match_parameters,)  # They need all others to hold.


def tables(task: str) -> tuple[dict[str, validate.Field], list[validate.Rule]]:
  """All fields and rules that the config of a task is validated with.

  task: one of tasks.TASKS.
  """
  module = tasks.get(task)
  fields, rules = dict(FIELDS), list(RULES)
  # The data source's rules come last, because they may have to look up what a
  # data set offers, which takes a while.
  for part in (optim, mesh, loader, module, pretrained, module.SOURCE):
    rules += part.RULES
  rules += LAST_RULES
  # The source's fields come before the task's, which depend on some of them.
  for part in (optim, mesh, loader, module.SOURCE, module, pretrained):
    fields |= part.FIELDS
  return fields, rules


def validate_config(config: ConfigDict) -> None:
  """Raises ValueError if any value of the config is wrong.

  The message names the path of the value, the value, and what would be right.
  To be called before any work starts and before anything is written.
  """
  validate.fields(config, {"task": FIELDS["task"]})
  validate.fields(config, *tables(config.task))


def init(config: ConfigDict) -> tuple[nnx.GraphDef, Any]:
  """The model's static part and its initial parameters, a nested dict.

  The initialisation is compiled, so that a large model is made directly on the
  device. Its random numbers follow from config.seed.
  """
  task = tasks.get(config.task)

  @jax.jit
  def params(key):
    return nnx.to_pure_dict(nnx.state(task.build(config, nnx.Rngs(key))))

  return graphdef(config), params(jax.random.key(config.seed))


def graphdef(config: ConfigDict) -> nnx.GraphDef:
  """The model's static part, built without allocating parameters."""
  task = tasks.get(config.task)
  return nnx.graphdef(nnx.eval_shape(lambda: task.build(config, nnx.Rngs(0))))


def model(config: ConfigDict, params: Any) -> nnx.Module:
  """The callable model with the given parameters, a nested dict of arrays."""
  return nnx.merge(graphdef(config), params)
