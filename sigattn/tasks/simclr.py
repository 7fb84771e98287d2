"""SimCLR (2002.05709): two views of an image are alike, others are not."""

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
  | {"model.temperature": real(low=1e-3, high=1e3)}
)
RULES = selfsup.RULES

represent, patch_attention = vit.represent, vit.patch_attention
evaluate, results = selfsup.evaluate, selfsup.results
reference = selfsup.reference


class Simclr(vit.Backbone):
  """A backbone with a projector, whose output is compared between views."""

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
    super().__init__(**vit.backbone(config, rngs))
    model = config.model
    self.projector = selfsup.Projector(
      model.width, model.projection_hidden, model.projection_dim, rngs=rngs
    )


def build(config: ConfigDict, rngs: nnx.Rngs) -> Simclr:
  """Returns the Simclr of a config."""
  return Simclr(config, rngs)


def loss(
  config: ConfigDict,
  model: Simclr,
  batch: dict[str, jax.Array],
  rng: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`nt_xent` of the projections of two views of each image.

  The negatives are all views of the global batch, on all devices.

  batch: "image" (B, H, W, C) uint8.
  """
  view_rng, drop_rng = jax.random.split(rng)
  images_BHWC = selfsup.two_views(config, view_rng, batch["image"])
  feature_BD = model.features(images_BHWC, drop_rng)
  projection_BF = model.projector(feature_BD)
  value = nt_xent(projection_BF, config.model.temperature)
  std = selfsup.feature_std(feature_BD)
  return value, {"loss": value, "feature_std": std}


def nt_xent(projection_BF: jax.Array, temperature: float) -> jax.Array:
  """The NT-Xent loss of pairs of views (2002.05709, Equation 1).

  It is the mean over i of -log softmax_j(z_i z_j / temperature) at j = the
  other view of i's image. z are projections of norm 1, and j runs over all
  views except i. Rows i and i + B / 2 of projection_BF are views of one image.

  optax.losses.ntxent computes the same. It multiplies before it sums, for which
  the CPU's compiler keeps B x B x F numbers.
  """
  unit_BF = selfsup.unit(projection_BF)
  count = len(unit_BF)
  # TF32 is too coarse for numbers that are divided by a small temperature.
  similar_BB = jnp.dot(unit_BF, unit_BF.T, precision="highest") / temperature
  similar_BB = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, similar_BB)
  other_B = jnp.roll(jnp.arange(count), count // 2)
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    similar_BB, other_B
  ).mean()
