"""The model that the tests of meshes train, on one device and on eight."""

import itertools

import numpy as np

from configs import lm_sigmoid
from sigattn import tasks
from sigattn.data import text


def config(**values):
  """A language model with all kinds of arrays that a mesh splits."""
  config = lm_sigmoid.get_config("runlocal")
  config.update_from_flattened_dict(
    {
      "model.width": 32,
      "model.depth": 1,
      "model.num_heads": 8,
      "attn.num_kv_heads": 8,
      "attn.learn_logit_bias": True,
      "attn.forget_gate": True,
      **values,
    }
  )
  return config


def run(**values):
  """The same, with an optimizer that does not divide by small numbers."""
  return config(
    **{
      "total_steps": 1,
      "optim.name": "sgd",
      "optim.schedule": "constant",
      "optim.lr": 0.1,
      "optim.warmup_steps": 0,
      "eval.every_steps": 0,
      "eval.length_factors": (),
      **values,
    }
  )


_eval_batches = tasks.eval_batches


def few_eval_batches(config, split):
  """Replaces tasks.eval_batches, and returns two batches instead of all."""
  return [*itertools.islice(_eval_batches(config, split), 2)]


def batch(config):
  """Rows of two documents and padding."""
  rng = np.random.default_rng(0)
  shape = config.batch_size, config.data.length + 1
  segment = 1 + (np.arange(shape[1]) >= rng.integers(5, 20, (shape[0], 1)))
  token = rng.integers(0, text.vocab_size(config), shape)
  token[:, -2:], segment[:, -2:] = -1, 0
  return {"token": token.astype(np.int32), "segment": segment.astype(np.int32)}
