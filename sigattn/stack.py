"""Builds the stack of blocks that a config describes, the same for every task.

Reads config.model (width, depth, num_heads, mlp_dim, mlp, norm, norm_kind,
norm_epsilon, layer_scale, dropout, drop_path, remat, max_unrolled) and all of
config.attn.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sigattn import attention, extras

extras.require("train")

from flax import nnx
from ml_collections import ConfigDict

from sigattn import layers, validate
from sigattn.validate import (
  choice,
  divides,
  flag,
  real,
  sequence,
  text,
  whole,
)

# Numbers that are kept are divided by 1 - p, which must not be 0 in float32.
PROBABILITY = real(low=0, high=1 - 1e-6)


def _is_remat(value):
  if not isinstance(value, str):
    return False
  try:
    layers.remat_policy(value)
  except ValueError:
    return False
  return True


FIELDS = {
  "dtype": choice(("float32", "bfloat16", "float16")),
  # No model of today comes near these sizes.
  "model.width": whole(low=1, high=2**17),
  "model.depth": whole(low=1, high=10_000),
  "model.num_heads": whole(low=1, high=2**17),
  "model.mlp_dim": whole(low=1, high=2**20),
  "model.mlp": choice(layers.MLPS),
  "model.norm": choice(layers.NORM_PLACES),
  "model.norm_kind": choice(layers.NORMS),
  "model.norm_epsilon": real(low=1e-20, high=1, optional=True),
  "model.layer_scale": real(low=1e-30, high=1e6, optional=True),
  "model.dropout": PROBABILITY,
  "model.drop_path": PROBABILITY,
  "model.remat": validate.Field(
    _is_remat,
    f"must be none, {', '.join(layers.REMAT)}, or some of "
    f"{', '.join(layers.ACTIVATIONS)}, joined by +",
  ),
  "model.max_unrolled": whole(low=0, high=10_000),
  "attn.kind": choice(attention.KINDS),
  "attn.logit_bias": real(low=-1e6, high=1e6, optional=True),
  "attn.learn_logit_bias": flag(),
  "attn.normalize": flag(),
  "attn.qk_norm": choice(layers.QK_NORMS),
  "attn.alibi": flag(),
  "attn.num_kv_heads": whole(low=1, high=2**17, optional=True),
  "attn.row_power": real(low=0, high=4),
  "attn.forget_gate": flag(),
  "attn.window": whole(low=0, high=2**30, optional=True),
  "attn.implementation": text(optional=True),
}

# What the name of an evaluation says about the n of sigmoid's bias.
_SUFFIXES = {"training": "", "test": ", n of the test"}

# The fields that `eval_lengths` reads, for tasks that evaluate other lengths.
LENGTH_FIELDS = {
  "eval.length_factors": sequence(
    whole(low=1, high=2**20),
    f"whole numbers from 1 to {2**20}",
    empty=True,
    longest=64,
  ),
  "eval.max_length_of": sequence(
    choice(_SUFFIXES), "training or test", longest=2
  ),
}


def _implementation_of_kind(config):
  attn = config.attn
  known = (None, *attention.implementations(attn.kind))
  if attn.implementation not in known:
    raise ValueError(
      f"config.attn.implementation={attn.implementation!r}; with "
      f"config.attn.kind={attn.kind!r} choose from {known}"
    )


def _implementation_runs_here(config):
  """Asks the named implementation whether it computes a short sequence."""
  model, attn = config.model, config.attn
  if attn.implementation is None:
    return
  kv_heads, head_width = attn.num_kv_heads or model.num_heads, model.width
  head_width //= model.num_heads
  heads = jnp.zeros((model.num_heads,))

  def attend(query, key):
    bias = {"logit_bias": heads} if attn.learn_logit_bias else {}
    slopes = {"alibi_slopes": heads} if attn.alibi else {}
    gate = {}
    if attn.forget_gate:
      gate = {"key_logit_bias": jnp.zeros((model.num_heads, key.shape[1]))}
    return attention.dot_product_attention(
      query, key, key, kind=attn.kind, implementation=attn.implementation,
      normalize=attn.normalize, local_window_size=attn.window, **bias,
      **slopes, **gate,
    )  # fmt: skip

  def shape(heads):
    return jax.ShapeDtypeStruct((1, 128, heads, head_width), config.dtype)

  try:
    jax.eval_shape(attend, shape(model.num_heads), shape(kv_heads))
  except (NotImplementedError, RuntimeError, ValueError) as error:
    why, *_ = str(error).split("; pass ")  # advice about an argument
    raise ValueError(
      f"config.attn.implementation={attn.implementation!r}; cannot compute "
      f"this model here: {why}; give --config.attn.implementation=None, which "
      "lets the library choose"
    ) from error


def _no_bias_with_softmax(config):
  unset = {"logit_bias": None, "learn_logit_bias": False}
  for key, value in unset.items():
    if config.attn.kind == "softmax" and config.attn[key] != value:
      raise ValueError(
        f"config.attn.{key}={config.attn[key]!r}; must be {value} with "
        "config.attn.kind='softmax', which a logit bias does not change"
      )


# exp(x) is rounded to 0 in float32 where x is below -87, and the logits of a
# row may lie a little below the bias.
_LEAST_BIAS_OF_NORMALIZED_ROWS = -80


def _bias_leaves_rows_to_normalize(config):
  attn, least = config.attn, _LEAST_BIAS_OF_NORMALIZED_ROWS
  if attn.normalize and (attn.logit_bias or 0) < least:
    raise ValueError(
      f"config.attn.logit_bias={attn.logit_bias!r}; must be at least {least} "
      "with config.attn.normalize=True, because below it all weights of a row "
      "are rounded to 0"
    )


def _no_second_division(config):
  if config.attn.normalize and config.attn.row_power:
    raise ValueError(
      f"config.attn.row_power={config.attn.row_power!r}; must be 0 with "
      "config.attn.normalize=True, which divides the rows already"
    )


def _no_row_power_in_a_window(config):
  if config.attn.row_power and config.attn.window is not None:
    raise ValueError(
      f"config.attn.row_power={config.attn.row_power!r}; must be 0 with "
      f"config.attn.window={config.attn.window!r}, in which rows do not grow"
    )


def _no_second_normalization(config):
  kind = config.attn.kind
  if config.attn.normalize and (why := attention.cannot_normalize(kind)):
    raise ValueError(
      "config.attn.normalize=True; must be False with config.attn.kind="
      f"{kind!r}, {why}"
    )


def not_causal(config: ConfigDict) -> None:
  """Refuses row scaling and forget gates, which need causal attention."""
  for name, off in {"row_power": 0, "forget_gate": False}.items():
    if config.attn[name]:
      raise ValueError(
        f"config.attn.{name}={config.attn[name]!r}; must be {off} where "
        f"attention is not causal, as in config.task={config.task!r}"
      )


def multiple_for_positions(factors: dict[str, int]) -> validate.Rule:
  """A rule: the width must be a multiple that config.model.positions needs.

  factors: {name of positions: factor}. For RoPE the head width must be a
  multiple of the factor, for the others the model width.
  """

  def rule(config):
    model = config.model
    name = model.positions
    head_width = model.width // model.num_heads
    width = head_width if name == "rope" else model.width
    factor = factors.get(name, 1)
    if width % factor:
      of_heads = f" / config.model.num_heads={model.num_heads}"
      raise ValueError(
        f"config.model.positions={name!r}; needs config.model.width="
        f"{model.width}{of_heads if name == 'rope' else ''} to be a multiple "
        f"of {factor}"
      )

  return rule


RULES = (
  divides("model.num_heads", "model.width"),
  divides("attn.num_kv_heads", "model.num_heads"),
  _implementation_of_kind,
  _no_bias_with_softmax,
  _no_second_normalization,
  _bias_leaves_rows_to_normalize,
  _no_second_division,
  _no_row_power_in_a_window,
  _implementation_runs_here,
)


def make(
  config: ConfigDict,
  *,
  max_length: int,
  is_causal: bool = False,
  use_bias: bool = True,
  kernel_init: nnx.Initializer = layers.KERNEL_INIT,
  rotate: Callable[..., jax.Array] | None = None,
  parallel: bool = False,
  rngs: nnx.Rngs,
) -> layers.Stack:
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
      normalize=attn.normalize,
      qk_norm=attn.qk_norm,
      norm_epsilon=model.norm_epsilon,
      alibi=attn.alibi,
      is_causal=is_causal,
      rotate=rotate,
      row_power=attn.row_power,
      forget_gate=attn.forget_gate,
      window=attn.window,
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
      norm_epsilon=model.norm_epsilon,
      layer_scale=model.layer_scale,
      dropout=model.dropout,
      parallel=parallel,
      rngs=rngs,
    )

  return layers.Stack(
    model.depth,
    block,
    drop_path=model.drop_path,
    remat=model.remat,
    max_unrolled=model.max_unrolled,
    rngs=rngs,
  )


def eval_lengths(config: ConfigDict) -> list[tuple[str, int, str]]:
  """The other lengths that eval.py evaluates: [(name, factor, max_length_of)].

  They are config.data.length times each of config.eval.length_factors, each
  with every value of config.eval.max_length_of. This value says whether the
  model's max_length, sigmoid's n, is the length of training or of the test.
  """
  return [
    (f"{factor} x {config.data.length}{_SUFFIXES[owner]}", factor, owner)
    for factor in config.eval.length_factors
    for owner in config.eval.max_length_of
  ]
