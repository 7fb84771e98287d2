"""The stack of blocks that a config describes, the same for every task.

Reads config.model (width, depth, num_heads, mlp_dim, mlp, norm, norm_kind,
layer_scale, dropout, drop_path, remat) and all of config.attn.
"""

import jax.numpy as jnp

from sigattn import attention, layers
from sigattn import check as checks

N_OF = {"training": "", "test": ", n of the test"}  # how the results say it


def make(
  config,
  *,
  max_length,
  is_causal=False,
  use_bias=True,
  kernel_init=layers.KERNEL_INIT,
  rotate=None,
  rngs,
):
  """The layers.Stack of a config; the arguments are those of its layers."""
  model, attn = config.model, config.attn
  shared = dict(
    use_bias=use_bias, kernel_init=kernel_init, dtype=jnp.dtype(config.dtype)
  )

  def block(rngs):
    attention_layer = layers.SelfAttention(
      model.width,
      model.num_heads,
      max_length=max_length,
      kind=attn.kind,
      num_kv_heads=attn.num_kv_heads,
      logit_bias=attn.logit_bias,
      learn_logit_bias=attn.learn_logit_bias,
      qk_norm=attn.qk_norm,
      alibi=attn.alibi,
      is_causal=is_causal,
      rotate=rotate,
      row_power=attn.row_power,
      implementation=attn.implementation,
      rngs=rngs,
      **shared,
    )
    mlp = layers.Mlp(model.width, model.mlp_dim, model.mlp, rngs=rngs, **shared)
    return layers.Block(
      model.width,
      attention_layer,
      mlp,
      norm=model.norm,
      norm_kind=model.norm_kind,
      layer_scale=model.layer_scale,
      dropout=model.dropout,
      rngs=rngs,
    )

  return layers.Stack(
    model.depth,
    block,
    drop_path=model.drop_path,
    remat=model.remat,
    rngs=rngs,
  )


def check(config, is_causal=False):
  """ValueError for a bad value of what `make` reads."""
  for key in ("width", "depth", "num_heads", "mlp_dim"):
    checks.number(config, f"model.{key}", low=1)
  checks.divides(config, "model.num_heads", "model.width")
  checks.choice(config, "model.mlp", layers.MLPS)
  checks.choice(config, "model.norm", layers.NORM_PLACES)
  checks.choice(config, "model.norm_kind", layers.NORMS)
  checks.number(config, "model.layer_scale", above=0, optional=True)
  checks.finite(config, "model.layer_scale")
  checks.below_one(config, "model.dropout")
  checks.below_one(config, "model.drop_path")
  _check_attention(config)
  checks.number(config, "attn.row_power", low=0)
  checks.finite(config, "attn.row_power")
  if config.attn.row_power and not is_causal:
    raise ValueError(
      f"config.attn.row_power={config.attn.row_power!r}; must be 0 where "
      f"attention is not causal, as in config.task={config.task!r}"
    )


def check_positions(config):
  """ValueError unless the widths fit config.model.positions, sincos or rope."""
  model = config.model
  if model.positions == "rope" and model.width // model.num_heads % 2:
    raise ValueError(
      f"config.model.positions='rope'; needs config.model.width={model.width} "
      f"/ config.model.num_heads={model.num_heads} to be even"
    )
  if model.positions == "sincos" and model.width % 2:
    raise ValueError(
      f"config.model.positions='sincos'; needs config.model.width="
      f"{model.width} to be even"
    )


def check_lengths(config):
  """ValueError for a bad value of what `lengths` reads."""
  factors, owners = config.eval.length_factors, config.eval.n_of
  if not all(isinstance(x, int) and x >= 1 for x in factors):
    raise ValueError(
      f"config.eval.length_factors={factors!r}; must be whole numbers >= 1"
    )
  if not owners or not set(owners) <= set(N_OF):
    raise ValueError(
      f"config.eval.n_of={owners!r}; must be some of {list(N_OF)}"
    )


def lengths(config):
  """[(name, factor, n_of)]: the other lengths that eval.py evaluates.

  Each of config.eval.length_factors times config.data.length, with each of
  config.eval.n_of: sigmoid's n is the training length, or the test's own.
  """
  return [
    (f"{factor} x {config.data.length}{N_OF[n_of]}", factor, n_of)
    for factor in config.eval.length_factors
    for n_of in config.eval.n_of
  ]


def _check_attention(config):
  attn = config.attn
  checks.choice(config, "attn.kind", attention.KINDS)
  checks.choice(config, "attn.qk_norm", layers.QK_NORMS)
  implementations = attention.implementations(attn.kind)
  checks.choice(config, "attn.implementation", implementations, optional=True)
  checks.number(config, "attn.num_kv_heads", low=1, optional=True)
  if attn.num_kv_heads is not None:
    checks.divides(config, "attn.num_kv_heads", "model.num_heads")
  checks.finite(config, "attn.logit_bias")
  unset = {"logit_bias": None, "learn_logit_bias": False}
  for key, value in unset.items():
    if attn.kind == "softmax" and attn[key] != value:
      raise ValueError(
        f"config.attn.{key}={attn[key]!r}; must be {value} with "
        "config.attn.kind='softmax', which a logit bias does not change"
      )
