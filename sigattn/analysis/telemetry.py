"""What attention and the optimizer do in a run, measured beside its steps.

With config.telemetry.every_steps = k, the first update of a run and every k-th
leave a line of the split "telemetry" in its metrics, measured just before by
programs of their own: training itself compiles and computes the same as
without. A name is quantity/place: entropy/encoder/layer0/head3, say.

QUANTITIES says what they are. Those of attention are of each layer and head,
those of the residual stream of each layer, both on the first
config.telemetry.examples held-out examples. Those of the update are of each
top-level module of the model and of each layer of a stack.

A is what the layer multiplies V by, with the factor of attn.row_power. A block
adds to the residual stream x (T, D) twice: attn_added_norm and mlp_added_norm
are |y| of x + y, with hybrid norm's second norm and LayerScale in y.
residual_norm is |x| behind the block, with post-norm behind its last norm.

Entropy: softmax's rows are distributions. A row of another kind is divided by
its sum first, which leaves how widely it looks: e^entropy keys; a row of zeros
has 0. Saturated is a weight that no longer follows its logit z: with sigmoid
and softmax A > 0.99 before attn.row_power, where d log A / dz = 1 - A < 0.01;
with the ReLU kinds A = 0, where nothing flows back.
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
  "attention_norm": "|A|, Frobenius, of an example's weights A",
  "attention_v_norm": "|A V|",
  "projection_norm": "|A V W_out|, a head's share of the output, no bias",
  "row_sum_mean": "of the rows of A, 1 with softmax",
  "row_sum_max": "the largest row of A",
  "logit_max": "of z = q k / sqrt(H) + b + ALiBi, where visible",
  "logit_std": "standard deviation of z",
  "entropy": "of a row of A over its sum, in nats",
  "saturated": "share of the weights that no longer follow their logit",
  "attn_added_norm": "of what attention adds to the residual stream",
  "mlp_added_norm": "of what the MLP adds to the residual stream",
  "residual_norm": "of the residual stream behind the block",
  "params_norm": "of the parameters before the update",
  "grads_norm": "of the gradient before it is clipped",
  "updates_norm": "of what is added to the parameters",
  "mu_norm": "of Adam's first moment after the update (or Lion's)",
  "nu_norm": "of Adam's second moment after the update",
  "trace_norm": "of SGD's momentum after the update",
}

_MOMENTS = ("mu", "nu", "trace")  # as optax names them
_SATURATED = 0.99


def is_due(config: ConfigDict, step: int) -> bool:
  """Whether update number `step`, from 1 on, is measured."""
  every = config.telemetry.every_steps
  return every > 0 and (step == 1 or step % every == 0)


def make(
  config: ConfigDict,
  update: Callable[[State, Any], tuple[Any, Any, State]],
  batches: Iterable[loader.Batch],
  devices: jax.sharding.Mesh,
) -> Callable[[State, Any], dict[str, float]]:
  """A function (state, batch) -> {name: float}; see the module.

  update: (state, batch) -> (gradients, updates, new state), what a step does
  with a training.step.State. batches: held out, the first is taken. devices:
  the mesh.
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
  """{name: float} of {stack: {quantity: (L,) or (L, N)}}, {quantity: norms}."""
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


# Looking into the layers.


def collect(
  config: ConfigDict,
  params: Any,
  batch: Mapping[str, jax.Array],
  measure: Callable[..., Any],
) -> dict[str, Any]:
  """What `measure` finds in every attention layer, {path of the stack: tree}.

  The arrays of a tree have an axis of layers in front. batch: of evaluation.

  measure: a function (attn, query, key, value, *, real_BT, positions, streams,
  **options) -> tree, of the layers.SelfAttention, what it gives to
  dot_product_attention, which queries are tokens of an example, not padding,
  the positions that it is called with, or None, and the stream's (B, T, D):
  attn_added, mlp_added, residual.
  """
  task, model = tasks.get(config.task), setup.model(config, params)
  collected = {}
  measure = functools.partial(
    measure, real_BT=_real_tokens(config, task, batch)
  )
  for path, stack in _stacks(model).items():
    *parents, name = path
    parent = functools.reduce(getattr, parents, model)
    # In the stack's place, a function that runs it.
    setattr(
      parent, name, functools.partial(_run, stack, measure, collected, path)
    )
  task.evaluate(config, model, batch)
  return {"/".join(path): tree for path, tree in collected.items()}


def _stacks(model):
  return {
    path: module
    for path, module in nnx.iter_modules(model)
    if isinstance(module, layers.Stack)
  }


def _real_tokens(config, task, batch):
  """bool (B, T or 1): the tokens of examples that are no padding."""
  real_BT = batch["weight"][:, None] > 0
  if hasattr(task, "real_tokens"):
    real_BT = real_BT & task.real_tokens(config, batch)
  return real_BT


def _run(stack, measure, collected, path, x_BTD, rng=None, **attn_args):
  """Runs the stack and stores what `measure` returns in collected[path]."""
  del rng  # evaluation drops nothing
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


# The numbers.


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
  """The QUANTITIES of attention, (N,) float32, and of the stream, scalars.

  Over the real rows that see a key, and the keys that they see. Norms are of
  an example, of which the mean is taken; row_sum_max and logit_max are of all
  examples; the rest are means over the rows or the pairs of a head.

  The arguments are those of `measure` in collect.
  """
  computed = attention.attention_weights(query, key, **options)
  counted_BNTS = computed.visible_BNTS & real_BT[:, None, :, None]
  saturated_BNTS = _saturated(attn.kind, computed.weights_BNTS)
  applied_BNTS = apply_row_scale(attn, computed.weights_BNTS, positions)
  weights_BNTS = jnp.where(counted_BNTS, applied_BNTS, 0)
  z_BNTS = computed.logits_BNTS
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
  """The weights with the layer's factor on each row."""
  if not attn.row_power:
    return weights_BNTS
  scale_BT = layers.row_scale(positions, attn.row_power)
  return weights_BNTS * scale_BT[:, None, :, None]


def _values(attn, value, weights_BNTS):
  """A V and A V W_out of each head, (B, N, T, H) and (B, N, T, D)."""
  with jax.default_matmul_precision("highest"):
    repeats = weights_BNTS.shape[1] // value.shape[2]
    v_BSNH = jnp.repeat(value.astype(jnp.float32), repeats, axis=2)
    out_BNTH = jnp.einsum("BNTS,BSNH->BNTH", weights_BNTS, v_BSNH)
    kernel_NHD = attn.out.kernel[...].astype(jnp.float32)
    projected = jnp.einsum("BNTH,NHD->BNTD", out_BNTH, kernel_NHD)
  return {"attention_v": out_BNTH, "projection": projected}


def _saturated(kind, weights_BNTS):
  if kind in ("sigmoid", "softmax"):
    return weights_BNTS > _SATURATED
  return weights_BNTS == 0


def _norm(x, axes=(2, 3)):
  return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(axes))


def _mean(x, where, axes):
  """0 where there is nothing."""
  total = jnp.where(where, x, 0).sum(axes, dtype=jnp.float32)
  return total / jnp.maximum(where.sum(axes), 1)


def norms(
  tree: Any, stacks: Iterable[Sequence[str]] = ()
) -> dict[str, jax.Array]:
  """Frobenius norms of a tree like the parameters, {place: array}.

  A scalar for each top-level module, and (L,) for the blocks of a stack, under
  its path. stacks: their paths.
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
