"""BYOL (2006.07733): one view's features predict another's, without negatives.

A target network computes the features of the other view. Its parameters are an
exponential average of the trained ones, which the training step keeps as
State.ema.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from sigattn.data import views
from sigattn.tasks import selfsup, vit
from sigattn.validate import real

SOURCE = views
UNIT = "images"
METRICS = selfsup.METRICS
ENCODER = vit.ENCODER
FIELDS = (
  selfsup.FIELDS
  | selfsup.PROJECTION_FIELDS
  | views.COLOUR_FIELDS
  | {"model.target_momentum": real(low=0, high=1)}
)


def _the_average_is_the_target(config):
  if config.optim.ema_decay:
    raise ValueError(
      f"config.optim.ema_decay={config.optim.ema_decay!r}; must be 0 with "
      "config.task='byol', whose average of the parameters is the target: see "
      "config.model.target_momentum"
    )


RULES = (*selfsup.RULES, _the_average_is_the_target)

represent, patch_attention = vit.represent, vit.patch_attention
evaluate, results = selfsup.evaluate, selfsup.results
reference = selfsup.reference


class Byol(vit.Backbone):
  """A backbone with a projector and a predictor.

  The target has a predictor too, which nothing reads.
  """

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
    super().__init__(**vit.backbone(config, rngs))
    model = config.model
    hidden, out = model.projection_hidden, model.projection_dim
    self.projector = selfsup.Projector(model.width, hidden, out, rngs=rngs)
    self.predictor = selfsup.Projector(out, hidden, out, rngs=rngs)


def build(config: ConfigDict, rngs: nnx.Rngs) -> Byol:
  """Returns the Byol of a config."""
  return Byol(config, rngs)


def target_momentum(config: ConfigDict) -> optax.Schedule:
  """m(step) = 1 - (1 - m_0) (1 + cos(pi step / total_steps)) / 2.

  It rises from m_0 = config.model.target_momentum to 1 (Section 3.2).
  """
  rate = optax.cosine_decay_schedule(
    1 - config.model.target_momentum, config.total_steps
  )
  return lambda step: 1 - rate(step)


def loss(
  config: ConfigDict,
  model: Byol,
  batch: dict[str, jax.Array],
  rng: jax.Array,
  target: Byol,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The sum of |q - z'|^2 = 2 - 2 cos(q, z') over both orders of two views.

  z' is the target's projection of one view, and has no gradient. q is its
  prediction from the other view. Batch statistics are those of one view of the
  global batch.

  batch: "image" (B, H, W, C) uint8.
  """
  view_rng, drop_rng = jax.random.split(rng)
  images_BHWC = selfsup.two_views(config, view_rng, batch["image"])
  feature_BD = model.features(images_BHWC, drop_rng)
  predicted_2BF = model.predictor(model.projector(_by_view(feature_BD)))
  wanted_2BF = target.projector(_by_view(target.features(images_BHWC)))
  wanted_2BF = jax.lax.stop_gradient(wanted_2BF[::-1])
  distance_2B = 2 * optax.cosine_distance(
    predicted_2BF, wanted_2BF, epsilon=1e-6
  )
  value = distance_2B.sum(0).mean()
  std = selfsup.feature_std(feature_BD)
  return value, {"loss": value, "feature_std": std}


def _by_view(x_BD):
  return jnp.stack(jnp.split(x_BD, 2))
