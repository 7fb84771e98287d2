"""MAE (2111.06377): predicts masked patches from those that are left."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from sigattn import layers, positions, stack
from sigattn.data import views
from sigattn.tasks import selfsup, vit
from sigattn.validate import divides, real, whole

SOURCE = views
UNIT = "images"
METRICS = selfsup.METRICS
ENCODER = vit.ENCODER
FIELDS = selfsup.FIELDS | {
  "model.mask_share": real(low=0, below=1),
  "model.decoder_width": whole(low=4, high=2**17),
  "model.decoder_depth": whole(low=1, high=10_000),
  "model.decoder_heads": whole(low=1, high=2**17),
}


def _a_patch_is_masked_and_one_is_left(config):
  patches = (config.data.image_size // config.model.patch_size) ** 2
  if not 0 < _kept(config, patches) < patches:
    raise ValueError(
      f"config.model.mask_share={config.model.mask_share!r}; of the {patches} "
      f"patches it leaves {_kept(config, patches)}: must mask at least one and "
      "leave at least one"
    )


def _patches_may_be_left_out(config):
  """Refuses options that depend on neighbours: they would need all tokens."""
  wrong = {
    "model.positions": (config.model.positions, "rope", "sincos2d"),
    "attn.alibi": (config.attn.alibi, True, False),
  }
  for path, (value, refused, instead) in wrong.items():
    if value == refused:
      raise ValueError(
        f"config.{path}={value!r}; must be another, such as {instead!r}, with "
        "config.task='mae': the encoder gets the patches that are left, not "
        "their places"
      )
  if config.attn.window is not None:
    raise ValueError(
      f"config.attn.window={config.attn.window!r}; must be None with "
      "config.task='mae', whose encoder gets the patches that are left"
    )


def _decoder_has_sincos_positions(config):
  if config.model.decoder_width % 4:
    raise ValueError(
      f"config.model.decoder_width={config.model.decoder_width!r}; must be a "
      "multiple of 4, which its table of sines and cosines needs"
    )


RULES = (
  *selfsup.RULES,
  _patches_may_be_left_out,
  _a_patch_is_masked_and_one_is_left,
  divides("model.decoder_heads", "model.decoder_width"),
  _decoder_has_sincos_positions,
)

represent, patch_attention = vit.represent, vit.patch_attention
evaluate, results = selfsup.evaluate, selfsup.results
reference = selfsup.reference


class MaskedAutoencoder(vit.Backbone):
  """A backbone that sees some of the patches, and a decoder that draws all.

  The n of sigmoid's bias -log n is the number of tokens that attention gets. In
  the encoder, these are the tokens that are left during training, and all
  tokens during evaluation.

  Initialisation: mask_token normal, standard deviation 0.02.
  """

  def __init__(self, config: ConfigDict, rngs: nnx.Rngs):
    super().__init__(**vit.backbone(config, rngs))
    model, dtype = config.model, self.dtype
    width = model.decoder_width
    self.class_tokens = int(model.pool == "class")
    pixels = config.data.channels * model.patch_size**2
    self.decoder_embed = nnx.Linear(model.width, width, dtype=dtype, rngs=rngs)
    normal = jax.random.normal(rngs.params(), (width,), jnp.float32)
    self.mask_token = nnx.Param(0.02 * normal)
    tokens = self.grid[0] * self.grid[1] + self.class_tokens
    self.decoder = stack.make(
      _decoder_config(config), max_length=tokens, rngs=rngs
    )
    self.decoder_norm = layers.make_norm(
      model.norm_kind, width, rngs, model.norm_epsilon
    )
    self.decoder_head = nnx.Linear(width, pixels, dtype=dtype, rngs=rngs)

  def reconstruct(
    self,
    images_BHWC: jax.Array,
    order_BP: jax.Array,
    kept: int,
    rng: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Draws all patches from those that are left.

    Returns their pixels (B, P, patch_size^2 C), float32, and the features of
    the patches that are left, (B, D).

    order_BP: a permutation of the patches of each image; the encoder gets the
    first `kept` of them.
    """
    x_BTD = self.tokens(images_BHWC)
    class_BTD, x_BPD = jnp.split(x_BTD, [self.class_tokens], axis=1)
    left_BPD = _take(x_BPD, order_BP[:, :kept])
    x_BTD = jnp.concatenate([class_BTD, left_BPD], axis=1)
    attn = self.encoder.blocks.attn
    attn.max_length = x_BTD.shape[1]
    x_BTD = self.encode(x_BTD, rng)
    return self._decode(x_BTD, order_BP), x_BTD.mean(1)

  def _decode(self, x_BTD, order_BP):
    batch, patches = order_BP.shape
    x_BTE = self.decoder_embed(x_BTD.astype(self.dtype))
    class_BTE, left_BTE = jnp.split(x_BTE, [self.class_tokens], axis=1)
    missing = patches - left_BTE.shape[1]
    mask_BTE = jnp.broadcast_to(
      self.mask_token[...].astype(self.dtype)[None, None],
      (batch, missing, x_BTE.shape[-1]),
    )
    shuffled_BPE = jnp.concatenate([left_BTE, mask_BTE], axis=1)
    x_BPE = _take(shuffled_BPE, order_BP.argsort(axis=1))
    table_PE = positions.sincos_2d(*self.grid, x_BTE.shape[-1])
    x_BPE += table_PE.astype(self.dtype)[None]
    x_BTE = self.decoder(jnp.concatenate([class_BTE, x_BPE], axis=1), None)
    x_BTE = layers.normalize(self.decoder_norm, x_BTE)
    out_BTE = self.decoder_head(x_BTE).astype(jnp.float32)
    return out_BTE[:, self.class_tokens :]


def _take(x_BPD, index_BK):
  return jnp.take_along_axis(x_BPD, index_BK[:, :, None], axis=1)


def _decoder_config(config):
  """The config of the decoder's stack, which has its own heads and widths."""
  decoder = config.copy_and_resolve_references().unlock()
  model = config.model
  decoder.model.update(
    width=model.decoder_width,
    depth=model.decoder_depth,
    num_heads=model.decoder_heads,
    mlp_dim=4 * model.decoder_width,
    dropout=0.0,
    drop_path=0.0,
  )
  decoder.attn.num_kv_heads = None
  return decoder


def build(config: ConfigDict, rngs: nnx.Rngs) -> MaskedAutoencoder:
  """Returns the MaskedAutoencoder of a config."""
  return MaskedAutoencoder(config, rngs)


def _kept(config, patches):
  return int(patches * (1 - config.model.mask_share))


def mask(
  config: ConfigDict, model: MaskedAutoencoder, rng: jax.Array, batch: int
) -> tuple[jax.Array, int]:
  """A random order of each image's patches (B, P), and the number left."""
  patches = model.grid[0] * model.grid[1]
  noise_BP = jax.random.uniform(rng, (batch, patches))
  return noise_BP.argsort(axis=1), _kept(config, patches)


def loss(
  config: ConfigDict,
  model: MaskedAutoencoder,
  batch: dict[str, jax.Array],
  rng: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The mean squared error of the pixels of the masked patches.

  The pixels of each patch are compared after its mean is subtracted and it is
  divided by its deviation (Section 3, "Reconstruction target").

  batch: "image" (B, H, W, C) uint8.
  """
  view_rng, mask_rng, drop_rng = jax.random.split(rng, 3)
  images_BHWC = views.draw(config, view_rng, batch["image"])
  images_BHWC = vit.standardize(config.data, images_BHWC)
  order_BP, kept = mask(config, model, mask_rng, len(images_BHWC))
  drawn_BPX, feature_BD = model.reconstruct(
    images_BHWC, order_BP, kept, drop_rng
  )
  wanted_BPX = jax.nn.standardize(
    model.patches(images_BHWC), axis=-1, epsilon=1e-6
  )
  masked_BP = order_BP[:, kept:]
  value = optax.losses.squared_error(
    _take(drawn_BPX, masked_BP), _take(wanted_BPX, masked_BP)
  ).mean()
  std = selfsup.feature_std(feature_BD)
  return value, {"loss": value, "feature_std": std}


DRAWINGS = ("image", "left", "drawn")


def drawings(
  config: ConfigDict, model: MaskedAutoencoder, batch: dict[str, jax.Array]
) -> list[jax.Array]:
  """Rows of images in [0, 1]: the images, what is left of them, the drawings.

  In a drawing the model draws the masked patches, and the others are the true
  ones. Drawn patches get the mean and the deviation of the true ones, because
  the model does not learn these.
  """
  images_BHWC = vit.normalize(config.data, batch["image"])
  batch_size = len(images_BHWC)
  # The masks are the same for every model of this size.
  order_BP, kept = mask(config, model, jax.random.key(0), batch_size)
  drawn_BPX, _ = model.reconstruct(images_BHWC, order_BP, kept)
  true_BPX = model.patches(images_BHWC)
  mean_BP1 = true_BPX.mean(-1, keepdims=True)
  drawn_BPX = drawn_BPX * true_BPX.std(-1, keepdims=True) + mean_BP1
  is_left_BP = order_BP.argsort(axis=1) < kept
  is_left_BP1 = is_left_BP[:, :, None]
  rows = [
    true_BPX,
    jnp.where(is_left_BP1, true_BPX, 0),  # 0 is the mean of all pixels
    jnp.where(is_left_BP1, true_BPX, drawn_BPX),
  ]
  mean, std = (
    jnp.asarray(x)[None, None, None]
    for x in (config.data.mean, config.data.std)
  )
  return [(model.images(x_BPX) * std + mean).clip(0, 1) for x_BPX in rows]
