"""One update: it computes loss and gradient, and applies the optimizer.

The step is the same program on one device and on many. Only the shardings of
its arguments differ.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from sigattn import tasks
from sigattn.training import mesh, optim, setup


class State(NamedTuple):
  """Everything that an update changes."""

  step: jax.Array  # int32 scalar, the number of updates done
  params: Any  # nested dict of float32 arrays
  opt_state: Any
  # The exponential average of the parameters, with the same structure; None if
  # neither config.optim.ema_decay nor the task's target_momentum asks for it.
  ema: Any


# Scalars by name, and "norms": the norms of the gradient and of the parameters,
# by top-level module.
Metrics = dict[str, Any]
# (state, batch) -> (gradients, updates, new state, metrics), where the updates
# are what the optimizer adds to the parameters.
Update = Callable[[State, Any], tuple[Any, Any, State, Metrics]]
# (state, batch) -> (the new state, metrics); the old state is donated.
Step = Callable[[State, Any], tuple[State, Metrics]]


def init(
  config: ConfigDict, devices: jax.sharding.Mesh
) -> tuple[State, Update]:
  """The initial State, split over the devices, and its update function."""
  static, params = setup.init(config, devices)
  tx = optim.make(config, params)
  split = mesh.parameters(params, devices)
  shardings = State(
    mesh.replicated(devices),
    split,
    mesh.optimizer(tx, params, devices),
    split if _has_average(config) else None,
  )

  @functools.partial(jax.jit, out_shardings=shardings)
  def state(params):
    ema = jax.tree.map(jnp.copy, params) if _has_average(config) else None
    return State(jnp.zeros((), jnp.int32), params, tx.init(params), ema)

  return state(params), _update(config, static, tx, shardings)


def _has_average(config):
  target = hasattr(tasks.get(config.task), "target_momentum")
  return target or bool(config.optim.ema_decay)


def evaluated(config: ConfigDict, state: State) -> Any:
  """The parameters to evaluate: the average, if config.optim.ema_decay > 0."""
  return state.ema if config.optim.ema_decay else state.params


def jitted(update: Update) -> Step:
  """Jits the step (state, batch) -> (state, metrics); it donates the state."""

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch):
    return update(state, batch)[2:]

  return step


def _update(config, static, tx, shardings):
  task = tasks.get(config.task)
  schedule = optim.schedule(config)
  average = _average(config, task)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def low_gradients(params, batch, rng, *targets):
    targets = [nnx.merge(static, target) for target in targets]
    return task.loss(config, nnx.merge(static, params), batch, rng, *targets)

  def gradients(params, batch, rng, *targets):
    low = optim.lowered(params, config.optim.grad_dtype)
    values, grads = low_gradients(low, batch, rng, *targets)
    # XLA converts when it reads; the gradients in memory keep their dtype.
    return values, optax.tree.cast(grads, jnp.float32)

  def update(state, batch):
    # The initialisation has used the number 0.
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step + 1)
    targets = [state.ema] if hasattr(task, "target_momentum") else []
    (_, metrics), grads = _accumulate(
      lambda *args: gradients(*args, *targets),
      state.params, batch, rng, config.optim.accumulate,
    )  # fmt: skip
    # Without this, each device might add up all gradients and then keep only
    # its part.
    grads = jax.lax.with_sharding_constraint(grads, shardings.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = average(ema, params, state.step)
    metrics = metrics | {
      "lr": schedule(state.step),
      "grad_norm": optax.tree.norm(grads),
      # These are read only if the step is not finite.
      "norms": {
        "gradient": _norms_by_module(grads),
        "parameters": _norms_by_module(state.params),
      },
    }
    new = State(state.step + 1, params, opt_state, ema)
    if config.optim.non_finite == "skip":
      finite = jnp.isfinite(metrics["loss"] + metrics["grad_norm"])
      new = _if(finite, new, state)
    new = jax.lax.with_sharding_constraint(new, shardings)
    return grads, updates, new, metrics

  return update


def _average(config, task):
  """The function (average, params, step) -> the next average."""
  if not hasattr(task, "target_momentum"):
    decay = config.optim.ema_decay
    return functools.partial(optim.average, decay=decay)
  momentum = task.target_momentum(config)
  return lambda ema, params, step: optax.incremental_update(
    params, ema, 1 - momentum(step)
  )


def _norms_by_module(tree):
  return {name: optax.tree.norm(part) for name, part in tree.items()}


def _if(finite, new, old):
  """The new state if `finite`, else the old one with the new counts of steps.

  The counts go on, so that the learning rate still follows the step's number.
  """

  def choose(new, old):
    is_count = jnp.issubdtype(new.dtype, jnp.integer)
    return new if is_count else jnp.where(finite, new, old)

  return jax.tree.map(choose, new, old)


def _accumulate(gradients, params, batch, rng, parts):
  """The mean of gradients(params, batch, rng) over `parts` micro-batches."""
  if parts == 1:
    return gradients(params, batch, rng)
  # A micro-batch has every parts-th example, so that it is spread over all the
  # devices.
  batches = jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
  )

  def add(total, part):
    new = gradients(params, *part)
    return jax.tree.map(lambda t, x: t + x / parts, total, new), None

  xs = (batches, jax.random.split(rng, parts))
  shapes = jax.eval_shape(gradients, params, *jax.tree.map(lambda x: x[0], xs))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, xs)[0]
