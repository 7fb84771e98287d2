"""Builds the optimizer and its schedule from a config, with optax."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from sigattn.validate import (
  choice,
  divides,
  items,
  real,
  regex,
  sequence,
  whole,
  zero_or,
)

OPTIMIZERS = {
  "adamw": lambda c: optax.scale_by_adam(
    b1=c.b1, b2=c.b2, eps=c.eps, mu_dtype=c.mu_dtype
  ),
  "lion": lambda c: optax.scale_by_lion(b1=c.b1, b2=c.b2, mu_dtype=c.mu_dtype),
  "sgd": lambda c: optax.trace(decay=c.b1, accumulator_dtype=c.mu_dtype),
}

# The second moment stays in float32. A step changes it by at most 1 - b2 of
# itself. bfloat16 rounds such a change away at b2 = 0.999, and most of it at
# 0.99.
_DTYPES = ("float32", "bfloat16")


def _rsqrt(optim, steps):
  """lr / sqrt(1 + step / warmup_steps): the warm-up sets the time scale."""
  del steps  # this schedule does not depend on the end
  scale = max(optim.warmup_steps, 1)
  # join_schedules also evaluates this at negative steps, during the warm-up,
  # and drops the results; maximum keeps them finite.
  return lambda step: optim.lr * (1 + jnp.maximum(step, 0) / scale) ** -0.5


SCHEDULES = {  # step 0 is the end of the warm-up
  "cosine": lambda c, steps: optax.cosine_decay_schedule(
    c.lr, steps, alpha=c.end_lr
  ),
  "linear": lambda c, steps: optax.linear_schedule(
    c.lr, c.lr * c.end_lr, steps
  ),
  "rsqrt": _rsqrt,
  "constant": lambda c, steps: optax.constant_schedule(c.lr),
}


_GROUPS = sequence(
  items(regex(), real(low=0, high=1e6)),
  "(regular expression, factor from 0 to 1e6) pairs",
  empty=True,
)
# float32 rounds numbers nearer to 1 to 1 itself. Adam would then compute 0 / 0.
_MEMORY = real(low=0, high=1 - 1e-6)

FIELDS = {
  "optim.name": choice(OPTIMIZERS),
  "optim.lr": real(low=1e-12, high=1e3),
  "optim.schedule": choice(SCHEDULES),
  "optim.warmup_steps": whole(low=0, high=10**9),
  "optim.end_lr": real(low=0, high=1),
  "optim.b1": _MEMORY,
  "optim.b2": _MEMORY,
  # Adam divides by the root of the second moment, which may be 0, plus eps.
  "optim.eps": real(low=1e-30, high=1e3),
  "optim.mu_dtype": choice(_DTYPES),
  "optim.grad_dtype": choice(_DTYPES),
  "optim.weight_decay": real(low=0, high=1e6),
  "optim.decay_groups": _GROUPS,
  "optim.lr_groups": _GROUPS,
  "optim.clip_norm": zero_or(real(low=1e-9, high=1e9)),
  "optim.accumulate": whole(low=1, high=2**20),
  "optim.ema_decay": real(low=0, high=1),
}


def _warmup_ends_in_the_run(config):
  warmup, total = config.optim.warmup_steps, config.total_steps
  if warmup > total:
    raise ValueError(
      f"config.optim.warmup_steps={warmup!r}; must be at most "
      f"config.total_steps={total!r}: the learning rate would never reach "
      "config.optim.lr"
    )


def _gradients_are_as_exact_as_products(config):
  grad_dtype = config.optim.grad_dtype
  if grad_dtype not in ("float32", config.dtype):
    raise ValueError(
      f"config.optim.grad_dtype={grad_dtype!r}; must be float32 with "
      f"config.dtype={config.dtype!r}"
    )


RULES = (
  divides("optim.accumulate", "batch_size"),
  _warmup_ends_in_the_run,
  _gradients_are_as_exact_as_products,
)

Groups = Sequence[tuple[str, float]]  # (regular expression of a path, factor)


def schedule(config: ConfigDict) -> optax.Schedule:
  """The learning rate of update 0, 1, ...: a linear warm-up, then a decay.

  The warm-up takes config.optim.warmup_steps updates and ends at
  config.optim.lr; config.optim.schedule names the decay, one of SCHEDULES.
  """
  optim = config.optim
  warmup = optim.warmup_steps
  decay = SCHEDULES[optim.schedule](optim, max(config.total_steps - warmup, 1))
  if not warmup:
    return decay
  # The rise starts at lr / warmup, because an update at 0 would be wasted.
  rise = optax.linear_schedule(optim.lr / warmup, optim.lr, warmup)
  return optax.join_schedules([rise, decay], [warmup])


def path_name(path: jax.tree_util.KeyPath) -> str:
  """Formats a parameter's path in a pytree as text: blocks/mlp/up/kernel."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def decay_factors(params: Any, groups: Groups) -> Any:
  """The factor on the weight decay for each parameter, a tree like `params`.

  The first pattern of `groups` that matches the whole path of a parameter
  decides; the factor is 0 if none matches. Raises ValueError for a pattern that
  decides for no parameter.
  """
  return _factors(params, groups, "decay_groups", default=0.0)


def lr_factors(params: Any, groups: Groups) -> Any:
  """The factor on the learning rate for each parameter, a tree like `params`.

  It acts like decay_factors, except that the factor is 1 if no pattern matches.
  """
  return _factors(params, groups, "lr_groups", default=1.0)


def _factors(params, groups, key, default):
  """The factor of the first pattern in `groups` that matches, or `default`.

  Raises ValueError for a pattern that decides for no parameter, because a
  misspelt pattern would otherwise change the optimizer without notice.
  """
  used = set()

  def factor(path, _):
    name = path_name(path)
    for pattern, value in groups:
      if re.fullmatch(pattern, name):
        used.add(pattern)
        return float(value)
    return default

  factors = jax.tree_util.tree_map_with_path(factor, params)
  if unused := [pattern for pattern, _ in groups if pattern not in used]:
    names = [
      path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    raise ValueError(
      f"config.optim.{key}: {unused[0]!r} is not the first match of any "
      f"parameter; the parameters are {names}"
    )
  return factors


def _decayed_weights(weight_decay, factors):
  """Adds weight_decay * factor * parameter to each update, as in AdamW."""

  def update(updates, params):
    return jax.tree.map(
      lambda u, p, f: u + weight_decay * f * p if f else u,
      updates,
      params,
      factors,
    )

  return optax.stateless(update)


def _scaled(factors):
  """Multiplies each update by its parameter's factor."""
  return optax.stateless(
    lambda updates, _: jax.tree.map(lambda u, f: f * u, updates, factors)
  )


def make(config: ConfigDict, params: Any) -> optax.GradientTransformation:
  """The optimizer: clips, preconditions, decays, scales by -learning rate.

  The steps are, in this order: clipping by the global norm
  (config.optim.clip_norm, 0 for none), the update of config.optim.name, the
  factors of lr_groups, the weight decay, and the learning rate. The factors
  come before the decay, so they do not change it. In muP the decay does not
  depend on the width.

  Raises ValueError for a pattern in lr_groups or decay_groups that matches no
  parameter.
  """
  optim = config.optim
  chain = []
  if optim.clip_norm:
    chain.append(optax.clip_by_global_norm(optim.clip_norm))
  chain.append(OPTIMIZERS[optim.name](optim))
  if optim.lr_groups:
    chain.append(_scaled(lr_factors(params, optim.lr_groups)))
  if optim.weight_decay:
    factors = decay_factors(params, optim.decay_groups)
    chain.append(_decayed_weights(optim.weight_decay, factors))
  chain.append(optax.scale_by_learning_rate(schedule(config)))
  return optax.chain(*chain)


def lowered(params: Any, dtype: str) -> Any:
  """The parameters, with kernels and the embedding rounded to `dtype`.

  Gradients with respect to them then have that dtype. Matrix products round
  their factors to it anyway, and return it. Biases, the scales of norms and
  other parameters that are used in float32 stay as they are.
  """

  def cast(path, x):
    name = path_name(path).rpartition("/")[2]
    return x.astype(dtype) if name in ("kernel", "embed", "head") else x

  return jax.tree_util.tree_map_with_path(cast, params)


def average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """Updates the exponential average: ema + (1 - d) (params - ema).

  d = min(decay, (1 + step) / (10 + step)). Because d is smaller in the first
  steps, the average forgets the initial parameters even in short runs.
  """
  step = step.astype("float32")
  rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
  return optax.incremental_update(params, ema, rate)
