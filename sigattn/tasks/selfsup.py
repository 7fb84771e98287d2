"""What the self-supervised tasks simclr, byol and mae have in common.

Each is a vit.Backbone with a head of its own. During training, their features
are evaluated by nearest neighbours, which need no training. The deviation of
the features shows whether they collapse.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from sigattn.data import loader, views
from sigattn.tasks import vit
from sigattn.validate import real, whole

METRICS = ("knn_accuracy", "feature_std")
COLLAPSED = 0.05  # Features whose feature_std is below this have collapsed.

FIELDS = vit.BACKBONE_FIELDS | {
  "eval.knn_examples": whole(low=1, high=2**20),
  "eval.knn_neighbours": whole(low=1, high=2**16),
  "eval.knn_temperature": real(low=1e-3, high=1e3),
}
PROJECTION_FIELDS = {
  "model.projection_hidden": whole(low=1, high=2**17),
  "model.projection_dim": whole(low=1, high=2**17),
}


def _neighbours_are_among_the_examples(config):
  neighbours, examples = config.eval.knn_neighbours, config.eval.knn_examples
  if neighbours > examples:
    raise ValueError(
      f"config.eval.knn_neighbours={neighbours!r}; must be at most "
      f"config.eval.knn_examples={examples!r}, among which they are found"
    )


RULES = (*vit.BACKBONE_RULES, _neighbours_are_among_the_examples)


class Projector(nnx.Module):
  """down(relu(norm(up(x)))), the head of SimCLR and BYOL.

  norm is batch normalisation (1502.03167) by the batch's own statistics, with a
  trained scale and bias. Under jit the statistics are those of the global
  batch, on any mesh. There are no running averages, because nothing is
  projected outside of training.
  """

  def __init__(self, width: int, hidden: int, out: int, *, rngs: nnx.Rngs):
    self.up = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
    self.scale = nnx.Param(jnp.ones((hidden,), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((hidden,), jnp.float32))
    self.down = nnx.Linear(hidden, out, rngs=rngs)

  def __call__(self, x_BD: jax.Array) -> jax.Array:
    """(..., B, width) -> (..., B, out), float32; statistics are over B."""
    x_BF = jax.nn.standardize(self.up(x_BD), axis=-2)
    axes = tuple(range(x_BF.ndim - 1))
    scale, bias = (
      jnp.expand_dims(x[...], axes) for x in (self.scale, self.bias)
    )
    return self.down(jax.nn.relu(x_BF * scale + bias))


def two_views(
  config: ConfigDict, rng: jax.Array, images_BHWC: jax.Array
) -> jax.Array:
  """Two random views of each image, normalised: (2B, H, W, C).

  Rows i and B + i are views of image i. images_BHWC: uint8.
  """
  pair = [
    views.draw(config, key, images_BHWC, view)
    for view, key in enumerate(jax.random.split(rng))
  ]
  return vit.standardize(config.data, jnp.concatenate(pair))


def feature_std(features_BD: jax.Array) -> jax.Array:
  """sqrt(D) times the deviation over the batch of f / |f|, mean over D.

  It is 1 if the features point equally in all directions, and 0 if they have
  collapsed to a single one (2011.10566, Section 4.1). A part that all features
  have in common makes it smaller.
  """
  unit_BD = unit(features_BD)
  return jnp.sqrt(unit_BD.shape[-1]) * unit_BD.std(0).mean()


def unit(x_BD: jax.Array) -> jax.Array:
  """x / |x| along the last axis; zeros stay zeros."""
  norm_B1 = optax.safe_norm(x_BD, 1e-12, axis=-1, keepdims=True)
  return x_BD / norm_B1


# Evaluation.


def reference(config: ConfigDict) -> Iterable[loader.Batch]:
  """The training images among which evaluation looks for neighbours.

  Their number is config.eval.knn_examples, or less if the split has fewer.
  Raises ValueError if there are fewer than config.eval.knn_neighbours.
  """
  split = views.open_source(config, config.data.train_split)
  some = _Spread(split, config.eval.knn_examples)
  if len(some) < config.eval.knn_neighbours:
    raise ValueError(
      f"config.eval.knn_neighbours={config.eval.knn_neighbours!r}; must be at "
      f"most {len(some)}, the images of the split {config.data.train_split!r}"
    )
  return some.eval_batches(config)


class _Spread(loader.ExampleSource):
  """Some of a split's examples, evenly spread over it.

  Files may be sorted by class, so that the first ones would be of few classes.
  """

  def __init__(self, split, count):
    self._split, self._count = split, min(count, len(split))
    self.in_memory, self.max_corrupt = split.in_memory, split.max_corrupt
    self.why_corrupt = split.why_corrupt

  def __len__(self):
    return self._count

  def evaluate(self, indices_B):
    return self._split.evaluate(indices_B * len(self._split) // self._count)


def evaluate(
  config: ConfigDict,
  model: vit.Backbone,
  batch: dict[str, jax.Array],
  bank: dict[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """Returns weighted sums over the batch, for `results`.

  batch: "image" (B, H, W, C) uint8, "target" (B,) int32, and "weight" (B,), 0
  for padding. bank: "feature" (M, D), "target" (M,) and "weight" (M,) of
  training images; None, as for telemetry, leaves the neighbours out.
  """
  feature_BD = unit(vit.represent(config, model, batch))
  weight_B = batch["weight"]
  sums = {
    "weight": weight_B.sum(),
    "feature": weight_B @ feature_BD,
    "feature_squared": weight_B @ feature_BD**2,
  }
  if bank is not None:
    class_B = nearest(config, feature_BD, bank)
    sums["knn_accuracy"] = jnp.vdot(weight_B, class_B == batch["target"])
  return sums


def nearest(
  config: ConfigDict, unit_BD: jax.Array, bank: dict[str, jax.Array]
) -> jax.Array:
  """The class of each example by a vote of its neighbours (1805.01978), (B,).

  The knn_neighbours most similar examples of the bank vote, with the weight
  exp(cosine similarity / knn_temperature). unit_BD: features of norm 1.
  """
  options = config.eval
  similar_BM = unit_BD @ unit(bank["feature"]).T
  similar_BM = jnp.where(bank["weight"][None] > 0, similar_BM, -jnp.inf)
  similar_BK, place_BK = jax.lax.top_k(similar_BM, options.knn_neighbours)
  # The constant that all neighbours share changes no vote.
  power_BK = (similar_BK - similar_BK[:, :1]) / options.knn_temperature
  votes_BKV = jax.nn.one_hot(bank["target"][place_BK], config.data.num_classes)
  return jnp.einsum("bk,bkv->bv", jnp.exp(power_BK), votes_BKV).argmax(-1)


def results(config: ConfigDict, sums: dict[str, Any]) -> dict[str, float]:
  """The accuracy of the nearest neighbours, and feature_std of the whole split.

  The log warns if the features have collapsed.
  """
  weight = sums["weight"]
  mean_D = sums["feature"] / weight
  variance_D = np.maximum(sums["feature_squared"] / weight - mean_D**2, 0)
  std = float(np.sqrt(len(mean_D)) * np.sqrt(variance_D).mean())
  if std < COLLAPSED:
    logging.warning(
      "the features have collapsed: feature_std=%.4f is below %s; all images "
      "have nearly the same features",
      std, COLLAPSED,
    )  # fmt: skip
  metrics = {"feature_std": std}
  if "knn_accuracy" in sums:
    metrics["knn_accuracy"] = sums["knn_accuracy"] / weight
  return metrics
