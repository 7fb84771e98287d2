"""Small language models for the tests of the task and of generation."""

import jax
import numpy as np
from flax import nnx

from configs import lm_sigmoid
from sigattn.tasks import lm
from tests.test_layers import fill

V = 64
ALIBI = {"model.positions": "none"}
SINES = {
  "model.positions": "sincos", "attn.alibi": False, "attn.row_power": 0.5,
}  # fmt: skip
SOFTMAX = {"attn.kind": "softmax"}
GATE = {"attn.forget_gate": True}


def small(depth=1, **values):
  """A config of width 16 with rows of 32 tokens, and plain rows of weights."""
  config = lm_sigmoid.get_config("runlocal")
  config.attn.normalize = False
  config.model.depth = depth
  config.update_from_flattened_dict(values)
  return config


def make(config):
  return fill(lambda: lm.build(config, nnx.Rngs(0)))


def compiled(function, model, *args):
  """function(model, *args), jitted."""
  graphdef, state = nnx.split(model)
  return jax.jit(lambda s, *a: function(nnx.merge(graphdef, s), *a))(
    state, *args
  )


def logits(model, token_BT, segment_ids=None):
  return compiled(
    lambda m, x, s: m(x, segment_ids=s), model, token_BT, segment_ids
  )


def tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, V, shape, np.int32)
