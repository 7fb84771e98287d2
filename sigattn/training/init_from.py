"""Starts a run from the parameters that config.init_from names."""

import pathlib

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from sigattn import pretrained
from sigattn.training import checkpoint, metrics, transfer
from sigattn.training.step import State


def start(config: ConfigDict, state: State) -> State:
  """The state from which a new run starts, given config.init_from.

  config.init_from is a folder with a model of transformers or timm, or the
  folder of one of our runs. From a run it takes the newest checkpoint. If that
  run evaluated an average of its parameters, it takes the average. The log says
  how many arrays were loaded, which keep their initial values, and which fields
  of attention and model differ from those of the run.

  state: the initial state. Raises ValueError as pretrained.start and
  checkpoint.load do.
  """
  if config.init_from is None:
    return state
  params, changed = jax.device_get(state.params), ""
  if pretrained.is_run(config.init_from):
    theirs, their_params, step = checkpoint.load(config.init_from)
    what = f"the run of {theirs.task} at step {step}"
    changed = transfer.differs(config, theirs)
    loaded, fresh = transfer.take(
      config, params, theirs, jax.device_get(their_params)
    )
  else:
    _warn_of_the_tokenizer(config)
    _warn_of_the_normalisation(config)
    what, loaded, fresh = pretrained.start(config, params)
  total = len(jax.tree.leaves(loaded))
  metrics.log(
    f"started from {config.init_from}: {what}, {total - len(fresh)} of {total} "
    "arrays" + "; none keeps its initial value" * (not fresh)
  )
  if changed:
    logging.warning("the model does not compute what the run did: %s", changed)
  optim = config.optim
  metrics.log(
    f"the learning rate rises to config.optim.lr={optim.lr:g} within "
    f"{optim.warmup_steps} updates: fine-tuning usually needs a smaller one "
    "than training from random parameters"
  )
  if fresh:
    metrics.log(f"with their initial values: {', '.join(fresh)}")
  params = jax.tree.map(
    lambda old, new: jax.device_put(new, old.sharding), state.params, loaded
  )
  ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
  return state._replace(params=params, ema=ema)


def _warn_of_the_normalisation(config):
  found = pretrained.values(config.init_from)
  if config.task == "vit" and "data.mean" not in found:
    logging.warning(
      "config.init_from says no mean and no standard deviation of its images: "
      "these of the config must be those with which its model was trained: "
      "'--config.data.mean=%s' '--config.data.std=%s'",
      tuple(config.data.mean), tuple(config.data.std),
    )  # fmt: skip


def _warn_of_the_tokenizer(config):
  folder = pathlib.Path(config.init_from)
  if config.task == "lm" and not (folder / "tokenizer.json").is_file():
    logging.warning(
      "config.init_from has no tokenizer.json: the ids of config.data.tokenizer"
      "=%r must be the ids with which its model was trained",
      config.data.tokenizer,
    )
