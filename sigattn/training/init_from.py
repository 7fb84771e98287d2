"""Starts a run from the parameters that config.init_from names."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sigattn import pretrained
from sigattn.training import checkpoint, transfer
from sigattn.training.step import State


def start(config: ConfigDict, state: State) -> State:
  """The state from which a new run starts, given config.init_from.

  config.init_from is a folder with a model of transformers or timm, or the
  folder of one of our runs. From a run it takes the newest checkpoint. If that
  run evaluated an average of its parameters, it takes the average.

  state: the initial state. Raises ValueError as pretrained.start and
  checkpoint.load do.
  """
  if config.init_from is None:
    return state
  params = jax.device_get(state.params)
  if pretrained.is_run(config.init_from):
    theirs, their_params, _ = checkpoint.load(config.init_from)
    loaded = transfer.take(config, params, theirs, jax.device_get(their_params))
  else:
    loaded = pretrained.start(config, params)
  params = jax.tree.map(
    lambda old, new: jax.device_put(new, old.sharding), state.params, loaded
  )
  ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
  return state._replace(params=params, ema=ema)
