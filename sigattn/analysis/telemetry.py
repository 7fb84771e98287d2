"""Measures what attention and the optimizer do during a run.

With config.telemetry.every_steps = k, telemetry is measured just before the
first update and before every k-th update. It is written to the run's metrics as
a line of the split "telemetry". Separate compiled programs measure it, so the
training step compiles and computes exactly the same as without telemetry. Each
number is named quantity/place, for example entropy/encoder/layer0/head3.

QUANTITIES describes the quantities. Those of attention are measured for each
layer and head, and those of the residual stream for each layer. Both are
measured on the first config.telemetry.examples held-out examples. Those of the
update are measured for each top-level module of the model and for each layer of
a stack.

A denotes the weights (T, S) by which the layer multiplies the values V,
including the factor of config.attn.row_power. A block adds to the residual
stream x (T, D) twice, x + y. attn_added_norm and mlp_added_norm are |y|, where
y includes LayerScale and the second norm of the hybrid placement. residual_norm
is |x| after the block, and with post-norm after its last norm.

Entropy: the rows of softmax are distributions. For the other kinds each row is
first divided by its sum, so that e^entropy is the effective number of keys that
the row attends to. A row of zeros has entropy 0.

Saturated weights no longer follow their logit z. For sigmoid and softmax these
are the weights with A > 0.99 before the factor of row_power, where
d log A / dz = 1 - A < 0.01. For the ReLU kinds they are the weights with A = 0,
where the gradient is 0.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from sigattn import attention, layers, tasks
from sigattn.data import loader
from sigattn.training import mesh, setup
from sigattn.training.step import State

SPLIT = "telemetry"
QUANTITIES = {
  "attention_norm": "Frobenius norm |A| of an example's weights A",
  "attention_v_norm": "|A V|",
  "projection_norm": "|A V W_out|, a head's part of the output, without bias",
  "row_sum_mean": "mean sum of a row of A; 1 for softmax",
  "row_sum_max": "largest sum of a row of A",
  "logit_max": "largest logit z of a visible pair: q k / sqrt(H) and biases",
  "logit_std": "standard deviation of z over the visible pairs",
  "entropy": "mean entropy of a row of A divided by its sum, in nats",
  "saturated": "fraction of the weights that no longer follow their logit",
  "attn_added_norm": "norm of what attention adds to the residual stream",
  "mlp_added_norm": "norm of what the MLP adds to the residual stream",
  "residual_norm": "norm of the residual stream after the block",
  "params_norm": "norm of the parameters before the update",
  "grads_norm": "norm of the gradient before clipping",
  "updates_norm": "norm of what the update adds to the parameters",
  "mu_norm": "norm of Adam's or Lion's first moment after the update",
  "nu_norm": "norm of Adam's second moment after the update",
  "trace_norm": "norm of SGD's momentum after the update",
}

_MOMENTS = ("mu", "nu", "trace")  # names in the state of optax
_SATURATED = 0.99


def is_due(config: ConfigDict, step: int) -> bool:
  """Whether telemetry is due at update number `step`, counted from 1."""
  every = config.telemetry.every_steps
  return every > 0 and (step == 1 or step % every == 0)


def make(
  config: ConfigDict,
  update: Callable[[State, Any], tuple[Any, Any, State]],
  batches: Iterable[loader.Batch],
  devices: jax.sharding.Mesh,
) -> Callable[[State, Any], dict[str, float]]:
  """Returns a function (state, batch) -> {quantity/place: float}.

  Args:
    config: of the run.
    update: (state, batch) -> (gradients, updates, new state), as a training
      step computes them.
    batches: held-out batches, of which only the first is used.
    devices: the mesh.
  """
  jit = functools.partial(jax.jit, out_shardings=mesh.replicated(devices))
  held_out = functools.cache(lambda: mesh.put(next(iter(batches)), devices))

  @jit
  def update_norms(state, batch):
    grads, updates, new = update(state, batch)
    stacks = _stacks(setup.model(config, state.params))
    trees = {"params": state.params, "grads": grads, "updates": updates}
    for name in _MOMENTS:
      if (moment := optax.tree.get(new.opt_state, name)) is not None:
        trees[name] = moment
    return {f"{k}_norm": norms(tree, stacks) for k, tree in trees.items()}

  @jit
  def attention_statistics(params, batch):
    batch = jax.tree.map(lambda x: x[: config.telemetry.examples], batch)
    return collect(config, params, batch, statistics)

  def measure(state, batch):
    measured = jax.device_get(
      (
        attention_statistics(state.params, held_out()),
        update_norms(state, batch),
      )
    )
    return _flatten(*measured)

  return measure


def _flatten(by_stack, by_tree):
  """Joins both measurements into one dict {quantity/place: float}.

  by_stack: {stack: {quantity: (L,) or (L, N)}}. by_tree: {quantity: norms}.
  """
  flat = {}
  for stack, quantities in by_stack.items():
    for quantity, x_LN in quantities.items():
      for (layer, *head), x in np.ndenumerate(x_LN):
        places = [stack, f"layer{layer}", *(f"head{i}" for i in head)]
        flat["/".join([quantity, *places])] = float(x)
  for quantity, places in by_tree.items():
    for place, x in places.items():
      if x.ndim == 0:
        flat[f"{quantity}/{place}"] = float(x)
      else:
        for layer, value in enumerate(x):
          flat[f"{quantity}/{place}/layer{layer}"] = float(value)
  return flat


# Running a function in every attention layer.


def collect(
  config: ConfigDict,
  params: Any,
  batch: Mapping[str, jax.Array],
  measure: Callable[..., Any],
) -> dict[str, Any]:
  """Evaluates a batch and calls `measure` in every attention layer.

  Args:
    config: of the run.
    params: the parameters of the model.
    batch: an evaluation batch, with "weight".
    measure: a function (attn, query, key, value, *, real_BT, positions,
      streams, **options) -> pytree of arrays, where
      attn is the layers.SelfAttention;
      query, key, value and options are the arguments that it passes to
        dot_product_attention;
      real_BT is False for queries that are padding;
      positions are those that the layer is called with, or None;
      streams has three arrays (B, T, D): "attn_added" and "mlp_added", which
        the block adds to the residual stream, and "residual", the stream after
        the block.

  Returns:
    {path of the stack: pytree}. The first axis of each array is the layer.
  """
  task, model = tasks.get(config.task), setup.model(config, params)
  collected = {}
  measure = functools.partial(
    measure, real_BT=_real_tokens(config, task, batch)
  )
  for path, stack in _stacks(model).items():
    *parents, name = path
    parent = functools.reduce(getattr, parents, model)
    # Replace the stack by a function that runs it and calls `measure`.
    setattr(
      parent,
      name,
      functools.partial(_run_stack, stack, measure, collected, path),
    )
  task.evaluate(config, model, batch)
  return {"/".join(path): tree for path, tree in collected.items()}


def _stacks(model):
  """{path: layers.Stack} of all the stacks in the model."""
  return {
    path: module
    for path, module in nnx.iter_modules(model)
    if isinstance(module, layers.Stack)
  }


def _real_tokens(config, task, batch):
  """bool (B, T or 1): which tokens are not padding, in examples that count."""
  real_BT = batch["weight"][:, None] > 0
  if hasattr(task, "real_tokens"):
    real_BT = real_BT & task.real_tokens(config, batch)
  return real_BT


def _run_stack(stack, measure, collected, path, x_BTD, rng=None, **attn_args):
  """Runs the stack and stores what `measure` returns in collected[path]."""
  del rng  # there is no dropout in evaluation
  graphdef, states = nnx.split(stack.blocks)

  def layer(x_BTD, state):
    block = nnx.merge(graphdef, state)
    qkv, options, streams = [], {}, {}

    def record_attention(*arrays, implementation, **rest):
      qkv.extend(arrays)
      options.update(rest)
      return attention.dot_product_attention(
        *arrays, implementation=implementation, **rest
      )

    def record_stream(name, added, *args):
      streams[name] = added(*args)
      return streams[name]

    block.attn.attention_fn = record_attention
    for name in ("attn", "mlp"):
      residual = getattr(block, f"{name}_residual")
      residual.added = functools.partial(
        record_stream, f"{name}_added", residual.added
      )
    streams["residual"] = x_BTD = block(x_BTD, **attn_args)
    options |= {"positions": attn_args.get("positions"), "streams": streams}
    return x_BTD, measure(block.attn, *qkv, **options)

  x_BTD, collected[path] = jax.lax.scan(layer, x_BTD, states)
  return x_BTD


# The statistics.


def statistics(
  attn: layers.SelfAttention,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  real_BT: jax.Array,
  positions: jax.Array | None = None,
  streams: Mapping[str, jax.Array] | None = None,
  **options: Any,
) -> dict[str, jax.Array]:
  """The QUANTITIES of attention, float32 (N,), and of the stream, scalars.

  Only rows that are not padding and see at least one key count, and in these
  rows only the visible keys. Norms are computed per example and averaged over
  the examples. row_sum_max and logit_max are the largest values of all
  examples. The other quantities are means over all rows, or all pairs, of a
  head.

  The arguments are those of `measure` in `collect`.
  """
  computed = attention.attention_weights(query, key, **options)
  counted_BNTS = computed.visible_BNTS & real_BT[:, None, :, None]
  saturated_BNTS = _saturated(attn.kind, computed.weights_BNTS)
  applied_BNTS = apply_row_scale(attn, computed.weights_BNTS, positions)
  weights_BNTS = jnp.where(counted_BNTS, applied_BNTS, 0)
  z_BNTS = computed.logits_BNTS
  if attn.has_forget_gate and attn.kind == "softmax":
    # The layer passes only -c_j, because softmax cancels c_i.
    z_BNTS -= options["key_logit_bias"][..., None]
  counted_BNT, sums_BNT = counted_BNTS.any(-1), weights_BNTS.sum(-1)
  values = _values(attn, value, weights_BNTS)
  norm_BN = {
    "attention_norm": _norm(weights_BNTS),
    "attention_v_norm": _norm(values["attention_v"]),
    "projection_norm": _norm(values["projection"]),
  }
  means = {k: _mean(x, counted_BNT.any(-1), (0,)) for k, x in norm_BN.items()}
  for name, x_BTD in (streams or {}).items():
    norm_B = _norm(jnp.where(real_BT[:, :, None], x_BTD, 0), (1, 2))
    means[f"{name}_norm"] = _mean(norm_B, real_BT.any(-1), (0,))
  p_BNTS = weights_BNTS / jnp.where(sums_BNT > 0, sums_BNT, 1)[..., None]
  entropy_BNT = jax.scipy.special.entr(p_BNTS).sum(-1)
  pair_axes, row_axes = (0, 2, 3), (0, 2)
  centre_N = _mean(z_BNTS, counted_BNTS, pair_axes)[None, :, None, None]
  variance_N = _mean(jnp.square(z_BNTS - centre_N), counted_BNTS, pair_axes)
  return means | {
    "row_sum_mean": _mean(sums_BNT, counted_BNT, row_axes),
    "row_sum_max": sums_BNT.max(row_axes),
    "logit_max": jnp.where(counted_BNTS, z_BNTS, -jnp.inf).max(pair_axes),
    "logit_std": jnp.sqrt(variance_N),
    "entropy": _mean(entropy_BNT, counted_BNT, row_axes),
    "saturated": _mean(saturated_BNTS, counted_BNTS, pair_axes),
  }


def apply_row_scale(
  attn: layers.SelfAttention,
  weights_BNTS: jax.Array,
  positions: jax.Array | None,
) -> jax.Array:
  """Multiplies each row of the weights by the layer's row_power factor.

  positions: those that the layer is called with; unused if row_power is 0.
  """
  if not attn.row_power:
    return weights_BNTS
  scale_BT = layers.row_scale(positions, attn.row_power)
  return weights_BNTS * scale_BT[:, None, :, None]


def _values(attn, value, weights_BNTS):
  """A V (B, N, T, H) and A V W_out (B, N, T, D) of each head."""
  with jax.default_matmul_precision("highest"):
    repeats = weights_BNTS.shape[1] // value.shape[2]
    v_BSNH = jnp.repeat(value.astype(jnp.float32), repeats, axis=2)
    out_BNTH = jnp.einsum("BNTS,BSNH->BNTH", weights_BNTS, v_BSNH)
    kernel_NHD = attn.out.kernel[...].astype(jnp.float32)
    projected = jnp.einsum("BNTH,NHD->BNTD", out_BNTH, kernel_NHD)
  return {"attention_v": out_BNTH, "projection": projected}


def _saturated(kind, weights_BNTS):
  """bool: which weights no longer follow their logit; see the module."""
  if kind in ("sigmoid", "softmax"):
    return weights_BNTS > _SATURATED
  return weights_BNTS == 0


def _norm(x, axes=(2, 3)):
  return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(axes))


def _mean(x, where, axes):
  """The mean of x over `axes` where `where` is True; 0 where it never is."""
  total = jnp.where(where, x, 0).sum(axes, dtype=jnp.float32)
  return total / jnp.maximum(where.sum(axes), 1)


def norms(
  tree: Any, stacks: Iterable[Sequence[str]] = ()
) -> dict[str, jax.Array]:
  """Frobenius norms of a tree that is shaped like the parameters.

  stacks: the paths of the model's stacks, tuples of keys.

  Returns {place: norm}: for the blocks of each stack an array (L,), one norm
  per layer, and for each top-level module without its stacks a scalar.
  """
  squares = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    names = tuple(entry.key for entry in path)
    parents = [s for s in stacks if names[: len(s) + 1] == (*s, "blocks")]
    place = parents[0] if parents else names[:1]
    axes = tuple(range(1 if parents else 0, x.ndim))
    square = jnp.square(x.astype(jnp.float32)).sum(axes)
    squares[place] = squares.get(place, 0.0) + square
  return {"/".join(k): jnp.sqrt(x) for k, x in squares.items()}
