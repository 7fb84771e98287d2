"""Small language models for the tests of the task and of generation."""

import jax
import jax.numpy as jnp
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
LLAMA = {
  "model.norm": "pre", "model.rope_share": 0.5, "model.tied": False,
  "model.logit_cap": 5.0, "attn.alibi": False, "attn.qk_norm": "none",
  "attn.num_kv_heads": 1,
}  # fmt: skip
# What the kernels for 16 bits take.
WIDE = {
  "model.width": 256, "model.mlp_dim": 384, "model.num_heads": 4,
  "dtype": "bfloat16",
}  # fmt: skip


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


def token_step(model, token_B, length_B):
  """(logits, cache) after one token of each row. The cache is full of cosines.

  length_B: the slots of the new tokens.
  """
  model.prepare_to_generate()
  cache = jax.tree.map(
    lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype),
    model.empty_cache(len(token_B), 128),
  )
  return model.decode(token_B, cache, length_B)


def tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, V, shape, np.int32)
