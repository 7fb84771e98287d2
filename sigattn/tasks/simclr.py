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
  """A backbone whose features a projector maps to where they are compared."""

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
  """NT-Xent: -log softmax over the other 2B - 1 views of z_i z_j / temperature.

  z are projections of norm 1, and j is the other view of i. The negatives are
  all views of the global batch, on whatever devices they are.

  batch: "image" (B, H, W, C) uint8.
  """
  view_rng, drop_rng = jax.random.split(rng)
  images_BHWC = selfsup.two_views(config, view_rng, batch["image"])
  feature_BD = model.features(images_BHWC, drop_rng)
  projection_BF = model.projector(feature_BD)
  owner_B = jnp.tile(jnp.arange(len(batch["image"])), 2)
  value = optax.losses.ntxent(projection_BF, owner_B, config.model.temperature)
  std = selfsup.feature_std(feature_BD)
  return value, {"loss": value, "feature_std": std}
