"""The tasks: what to build, what to minimise, what to measure.

A task is a module with
  UNIT                            what the progress bar counts: "images"
  check(config)                   ValueError for a bad value of its own part
  build(config, rngs)             the model, an nnx.Module of nnx.Param alone
  loss(config, model, batch, rng) scalar loss and a dict of scalar metrics
  evaluate(config, model, batch)  a dict of sums over the batch, with "weight"

and may have
  score(config, found)            the sums, made of what evaluate found where
                                  they take more than arrays: NumPy and strings
  results(config, sums)           metrics of the sums over all batches, NumPy
                                  arrays; by default each over the weight
  studies(config)                 {name: config} of what eval.py evaluates too
  real_tokens(config, batch)      bool (B, T): which of the tokens that attend
                                  are no padding, where attention does not know
  labels(config, batch)           what to write beside the tokens that attend:
                                  strings, of a batch of one
"""

import functools
import operator

import jax
from flax import nnx

from sigattn import check as checks
from sigattn import lm, mesh, optim, speech, synthetic, vit
from sigattn.data import loader

TASKS = {"lm": lm, "speech": speech, "synthetic": synthetic, "vit": vit}


def check(config):
  """Refuses a bad value with its path, the value and what would be right.

  Called before any work starts. Raises ValueError.
  """
  checks.choice(config, "task", TASKS)
  checks.choice(config, "dtype", ("float32", "bfloat16", "float16"))
  checks.number(config, "total_steps", low=1)
  checks.number(config, "batch_size", low=1)
  _check_optim(config)
  checks.number(config, "eval.every_steps", low=0)
  checks.number(config, "ckpt.every_steps", low=0)
  checks.number(config, "ckpt.keep", low=1)
  checks.choice(config, "ckpt.best_mode", ("max", "min"))
  checks.number(config, "log.every_steps", low=1)
  checks.number(config, "telemetry.every_steps", low=0)
  checks.number(config, "telemetry.examples", low=1)
  task = TASKS[config.task]
  checks.choice(config, "ckpt.best_metric", task.METRICS)
  mesh.check(config)
  task.check(config)
  loader.check(config)


def _check_optim(config):
  checks.choice(config, "optim.name", optim.OPTIMIZERS)
  checks.choice(config, "optim.schedule", optim.SCHEDULES)
  checks.number(config, "optim.lr", above=0)
  checks.number(config, "optim.end_lr", low=0, high=1)
  checks.number(config, "optim.warmup_steps", low=0)
  for path in ("optim.b1", "optim.b2", "optim.ema_decay"):
    checks.number(config, path, low=0, high=1)
  for path in ("optim.eps", "optim.weight_decay", "optim.clip_norm"):
    checks.number(config, path, low=0)
  checks.number(config, "optim.accumulate", low=1)
  accumulate = config.optim.accumulate
  if config.batch_size % accumulate:
    raise ValueError(
      f"config.optim.accumulate={accumulate}; must divide "
      f"config.batch_size={config.batch_size}"
    )


def init(config):
  """The model's static part and its parameters, a nested dict of arrays.

  Compiled, so that a large model is initialised where it will live.
  """
  task = TASKS[config.task]

  @jax.jit
  def params(key):
    return nnx.to_pure_dict(nnx.state(task.build(config, nnx.Rngs(key))))

  return graphdef(config), params(jax.random.key(config.seed))


def graphdef(config):
  """The model's static part, made without allocating its parameters."""
  task = TASKS[config.task]
  model = nnx.eval_shape(lambda: task.build(config, nnx.Rngs(0)))
  return nnx.graphdef(model)


def model(config, params):
  """The model with the given parameters: callable, for notebooks and tools."""
  return nnx.merge(graphdef(config), params)


def evaluator(config, devices):
  """A function (params, batches) -> metrics, as the task's `results` says.

  devices: the mesh over which each batch is split.
  """
  task = TASKS[config.task]
  static = graphdef(config)

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
    found = results(config, jax.device_get(total))
    return {name: float(value) for name, value in found.items()}

  return evaluate


def studies(config):
  """{name: config} of what eval.py evaluates beside the run's own split."""
  found = getattr(TASKS[config.task], "studies", None)
  return found(config) if found else {}


def _means(config, sums):
  del config
  weight = sums.pop("weight")
  return {name: value / weight for name, value in sums.items()}
