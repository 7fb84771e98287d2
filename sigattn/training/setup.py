"""Validates a whole config and builds the model that it describes.

`validate_config` rejects a bad config before any work starts. `init` builds a
task's model and its parameters on a mesh, `graphdef` the model without
parameters, and `model` a callable model with given parameters.
"""

import functools
import os
import pathlib
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from sigattn import pretrained, tasks, validate
from sigattn.data import kept_tokenizer, loader
from sigattn.training import mesh, optim, saved, transfer
from sigattn.validate import choice, flag, text, whole

MAX_STEPS = 10**9  # Devices count steps in int32.

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


def _groups_and_mesh_match_parameters(config):
  """Builds the optimizer for the shapes of the parameters."""
  params = shapes(config)
  optim.make(config, params)
  mesh.validate_parameters(config, params)


def _run_of_init_from_fits(config):
  folder = config.init_from
  if folder is None or not pretrained.is_run(folder):
    return
  path = pathlib.Path(folder) / "config.json"
  try:
    theirs = saved.read_config(path)["config"]
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
      f"config.init_from={folder!r}; needs the config of a run: {path.name}: "
      f"{error}"
    ) from error
  theirs = ConfigDict(theirs)
  validate_saved(theirs, folder)
  keeps = getattr(tasks.get(theirs.task), "KEEPS", None)
  if keeps:
    theirs = keeps.used(theirs, folder)
  # A run may begin from one with other classes. Another tokenizer is refused
  # before the shape of its table is compared.
  if keeps is kept_tokenizer and theirs.task == config.task:
    _validate_tokenizer_of_run(config, folder)
  transfer.names(config, shapes(config), theirs, shapes(theirs))


def _validate_tokenizer_of_run(config, folder):
  if difference := kept_tokenizer.difference(config, folder):
    raise ValueError(
      f"config.init_from={folder!r}: {difference}; "
      f"--config.data.tokenizer={os.path.join(folder, 'tokenizer.json')} uses "
      "its tokenizer, for texts that have only characters which it knows"
    )


RULES = (_best_metric_of_the_task,)
# These rules need all other rules to hold.
LAST_RULES = (_groups_and_mesh_match_parameters, _run_of_init_from_fits)


def tables(task: str) -> tuple[dict[str, validate.Field], list[validate.Rule]]:
  """All fields and rules by which the config of a task is validated.

  task: one of tasks.TASKS.
  """
  module = tasks.get(task)
  fields, rules = dict(FIELDS), list(RULES)
  # The rules of the data source come last, because they may have to look up
  # what a data set offers, which takes time.
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
  Call it before any work starts and before anything is written.
  """
  validate_fields(config)
  for rule in tables(config.task)[1]:
    rule(config)


def validate_fields(config: ConfigDict) -> None:
  """Raises ValueError as validate_config does, without the rules.

  So no file is opened.
  """
  validate.fields(config, {"task": FIELDS["task"]})
  validate.fields(config, tables(config.task)[0])


def validate_saved(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
  """Raises ValueError if a run's saved config is not one of this version.

  workdir: the folder of the run, which the error names.
  """
  try:
    validate_fields(config)
  except ValueError as error:
    raise ValueError(
      f"{workdir=}: the saved config is not one of this version: {error}"
    ) from error


def init(
  config: ConfigDict, devices: jax.sharding.Mesh | None = None
) -> tuple[nnx.GraphDef, Any]:
  """The model's static part and its initial parameters, a nested dict.

  The initialisation is compiled, so that each device computes its own part of a
  large model. config.seed determines the random numbers.

  devices: the mesh over which parameters and attention are split; None for a
  single device.
  """
  task, model = tasks.get(config.task), _abstract(config)
  shardings = devices and mesh.parameters(_shapes(model), devices)

  @functools.partial(jax.jit, out_shardings=shardings)
  def params(key):
    return nnx.to_pure_dict(nnx.state(task.build(config, nnx.Rngs(key))))

  static = _graphdef(model, config, devices)
  return static, params(jax.random.key(config.seed))


def shapes(config: ConfigDict) -> Any:
  """The shape of each parameter, a nested dict; nothing is allocated."""
  return _shapes(_abstract(config))


def _shapes(model):
  return nnx.to_pure_dict(nnx.state(model))


def _abstract(config):
  task = tasks.get(config.task)
  return nnx.eval_shape(lambda: task.build(config, nnx.Rngs(0)))


def graphdef(
  config: ConfigDict, devices: jax.sharding.Mesh | None = None
) -> nnx.GraphDef:
  """The model's static part, built without allocating parameters.

  devices: as in init.
  """
  return _graphdef(_abstract(config), config, devices)


def _graphdef(model, config, devices):
  if devices is not None and devices.size > 1:
    for _, module in nnx.iter_modules(model):
      if hasattr(module, "attention_fn"):
        module.attention_fn = mesh.attention_fn(devices, config.mesh.exchange)
  return nnx.graphdef(model)


def model(config: ConfigDict, params: Any) -> nnx.Module:
  """The callable model with the given parameters, a nested dict of arrays."""
  return nnx.merge(graphdef(config), params)
