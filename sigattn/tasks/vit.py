"""A vision transformer (2010.11929) and its task, classifying images."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from sigattn import layers, positions, stack
from sigattn.data import image, kept_classes
from sigattn.validate import choice, divides, real, whole, zero_or

SOURCE = image
KEEPS = kept_classes
UNIT = "images"
METRICS = ("loss", "accuracy", "accuracy_top5")  # top5 needs > 10 classes
POOLS = ("mean", "class")
POSITIONS = ("learned", "sincos1d", "sincos2d", "rope", "none")
# The parameters of a Backbone, from which runs of other tasks may start: see
# sigattn.training.init_from.
ENCODER = ("class_token", "embed", "encoder", "norm", "position")


class Backbone(nnx.Module):
  """Patches -> linear embedding + positions -> encoder -> norm -> pool.

  Supervised and self-supervised models have it in common. Its parameters are
  those of ENCODER.

  encoder: a module, encoder(x_BTD, rng) -> (B, T, D); T counts all tokens.
  grid: the numbers of rows and columns of patches.
  pool: "mean" averages all tokens; "class" reads only the class token, which is
    the first token.
  position_table: the table that is added to the tokens, "learned", "sincos1d",
    "sincos2d" or "none". Only a learned table has a row for the class token.
  norm: the kind of the last norm, or None for no norm.

  Initialisation beyond that of sigattn.layers:
    embed/kernel  LeCun normal, which keeps the variance of normalised pixels
    class_token   0
    position      normal, standard deviation position_std
  """

  def __init__(
    self,
    encoder: nnx.Module,
    *,
    grid: tuple[int, int],
    patch_size: int,
    channels: int,
    width: int,
    pool: str,
    position_table: str,
    position_std: float,
    norm: str | None,
    norm_epsilon: float | None,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.encoder = encoder
    self.grid, self.patch_size, self.width = grid, patch_size, width
    self.pool, self.position_table, self.dtype = pool, position_table, dtype
    self.embed = nnx.Linear(
      channels * patch_size**2, width, dtype=dtype, rngs=rngs
    )
    if pool == "class":
      self.class_token = nnx.Param(jnp.zeros((width,), jnp.float32))
    if position_table == "learned":
      shape = (math.prod(grid) + (pool == "class"), width)
      normal = jax.random.normal(rngs.params(), shape, jnp.float32)
      self.position = nnx.Param(position_std * normal)
    self.has_norm = norm is not None
    if self.has_norm:
      self.norm = layers.make_norm(norm, width, rngs, norm_epsilon)

  def features(
    self, images_BHWC: jax.Array, rng: jax.Array | None = None
  ) -> jax.Array:
    """Returns float32 features (B, D), the pooled tokens.

    images_BHWC: normalised, see `normalize`. rng: for dropout and drop path;
    None turns both off. Raises ValueError for images of another size.
    """
    x_BTD = self.encoder(self.tokens(images_BHWC), rng)
    if self.pool == "class":
      x_BTD = x_BTD[:, :1]  # The norm need not read the other tokens.
    return self._normalized(x_BTD).mean(1)

  def tokens(self, images_BHWC: jax.Array) -> jax.Array:
    """The tokens that the encoder gets (B, T, D): patches with positions."""
    x_BPD = self.embed(self.patches(images_BHWC).astype(self.dtype))
    return self._add_positions(self._add_class_token(x_BPD))

  def encode(self, x_BTD: jax.Array, rng: jax.Array | None = None) -> jax.Array:
    """Applies the encoder and the last norm to tokens, float32 (B, T, D)."""
    return self._normalized(self.encoder(x_BTD, rng))

  def _normalized(self, x_BTD):
    if self.has_norm:
      x_BTD = layers.normalize(self.norm, x_BTD)
    # The pool and the heads are cheap, so they compute in float32.
    return x_BTD.astype(jnp.float32)

  def patches(self, images_BHWC: jax.Array) -> jax.Array:
    """The pixels of each patch, (B, P, patch_size^2 C).

    Patches, and the pixels of each patch, are in raster order.
    """
    batch, height, width, channels = images_BHWC.shape
    (rows, columns), size = self.grid, self.patch_size
    if (height, width) != (rows * size, columns * size):
      raise ValueError(
        f"images_BHWC.shape={images_BHWC.shape}; the model needs "
        f"{rows * size} x {columns * size} pixels"
      )
    x = images_BHWC.reshape(batch, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)

  def images(self, x_BPX: jax.Array) -> jax.Array:
    """The images (B, H, W, C) whose `patches` are given."""
    (rows, columns), size = self.grid, self.patch_size
    batch = len(x_BPX)
    x = x_BPX.reshape(batch, rows, columns, size, size, -1)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * size, columns * size, -1)

  def _add_class_token(self, x_BPD):
    if self.pool != "class":
      return x_BPD
    token_D = self.class_token[...].astype(x_BPD.dtype)
    shape = (x_BPD.shape[0], 1, self.width)
    token_B1D = jnp.broadcast_to(token_D[None, None, :], shape)
    return jnp.concatenate([token_B1D, x_BPD], axis=1)

  def _add_positions(self, x_BTD):
    if self.position_table == "none":
      return x_BTD
    if self.position_table == "learned":
      table_TD = self.position[...]
    else:
      table_TD = _fixed_table(self.position_table, self.grid, self.width)
      missing = x_BTD.shape[1] - table_TD.shape[0]  # 1 with a class token
      table_TD = jnp.pad(table_TD, ((missing, 0), (0, 0)))
    return x_BTD + table_TD.astype(x_BTD.dtype)[None]


class VisionTransformer(Backbone):
  """A Backbone with a linear head, which maps features to logits.

  The head is initially 0, so that the first loss is log(num_classes). The other
  arguments are those of Backbone.
  """

  def __init__(
    self,
    encoder: nnx.Module,
    *,
    num_classes: int,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    super().__init__(encoder, rngs=rngs, **options)
    zeros = nnx.initializers.zeros
    self.head = nnx.Linear(
      self.width, num_classes, kernel_init=zeros, rngs=rngs
    )

  def __call__(
    self, images_BHWC: jax.Array, rng: jax.Array | None = None
  ) -> jax.Array:
    """Returns float32 logits (B, num_classes); arguments as in `features`."""
    return self.head(self.features(images_BHWC, rng))


def _fixed_table(name, grid, width):
  if name == "sincos1d":
    return positions.sincos_1d(math.prod(grid), width)
  return positions.sincos_2d(*grid, width)


_MAX_TOKENS = 2**20
# The alpha of Beta(alpha, alpha). Below this range nothing would be mixed, and
# above it everything would be halved.
_ALPHA = zero_or(real(low=1e-3, high=1e3))

BACKBONE_FIELDS = stack.FIELDS | {
  "model.patch_size": whole(low=1, high=2**14),
  "model.pool": choice(POOLS),
  "model.positions": choice(POSITIONS),
  "model.position_std": real(low=0, high=1e6),
}
FIELDS = BACKBONE_FIELDS | {
  "augment.mixup": _ALPHA,
  "augment.cutmix": _ALPHA,
  "augment.label_smoothing": real(low=0, below=1),
}


def _patches_are_not_too_many(config):
  """Tables of positions are made on the host, with a row for each patch."""
  size, patch = config.data.image_size, config.model.patch_size
  if (size // patch) ** 2 > _MAX_TOKENS:
    raise ValueError(
      f"config.model.patch_size={patch!r}; must be at least "
      f"{-(-size // math.isqrt(_MAX_TOKENS))} with config.data.image_size="
      f"{size!r}: there may be {_MAX_TOKENS} patches"
    )


def _top5_needs_more_classes(config):
  best, classes = config.ckpt.best_metric, config.data.num_classes
  if best == "accuracy_top5" and not _has_top5(config):
    raise ValueError(
      f"config.ckpt.best_metric={best!r}; needs more than 10 classes, not "
      f"config.data.num_classes={classes!r}"
    )


BACKBONE_RULES = (
  *stack.RULES,
  stack.not_causal,
  divides("model.patch_size", "data.image_size"),
  _patches_are_not_too_many,
  stack.multiple_for_positions({"sincos1d": 2, "sincos2d": 4, "rope": 4}),
)
RULES = (*BACKBONE_RULES, _top5_needs_more_classes)


def build(config: ConfigDict, rngs: nnx.Rngs) -> VisionTransformer:
  """Returns the VisionTransformer of a config.

  Its max_length, the n of sigmoid's bias -log n, is the number of tokens.
  """
  return VisionTransformer(
    num_classes=config.data.num_classes, **backbone(config, rngs)
  )


def backbone(config: ConfigDict, rngs: nnx.Rngs) -> dict[str, Any]:
  """The arguments of the Backbone that a config describes."""
  model, data = config.model, config.data
  side = data.image_size // model.patch_size
  grid, dtype = (side, side), jnp.dtype(config.dtype)
  tokens = side**2 + (model.pool == "class")
  return dict(
    encoder=stack.make(
      config, max_length=tokens, rotate=_rotate(model, grid), rngs=rngs
    ),
    grid=grid,
    patch_size=model.patch_size,
    channels=data.channels,
    width=model.width,
    pool=model.pool,
    position_table="none" if model.positions == "rope" else model.positions,
    position_std=model.position_std,
    # A post-norm block already ends with a norm.
    norm=None if model.norm == "post" else model.norm_kind,
    norm_epsilon=model.norm_epsilon,
    dtype=dtype,
    rngs=rngs,
  )


def _rotate(model, grid):
  """RoPE by row and column, counted from 1; a class token is at (0, 0)."""
  if model.positions != "rope":
    return None
  position_T2 = positions.grid(*grid) + 1
  if model.pool == "class":
    position_T2 = np.concatenate(
      [np.zeros((1, 2), position_T2.dtype), position_T2]
    )
  return functools.partial(positions.rope_2d, positions=position_T2)


def patch_attention(config: ConfigDict, weights_LNTS: np.ndarray) -> np.ndarray:
  """Returns how much attention each patch receives, (L, N, rows, columns).

  With a class token, this is the attention that the class token pays.
  Otherwise it is the mean over all tokens. weights_LNTS: the attention weights
  of one image, for each layer and head.
  """
  side = config.data.image_size // config.model.patch_size
  if config.model.pool == "class":
    patches_LNP = weights_LNTS[:, :, 0, 1:]
  else:
    patches_LNP = weights_LNTS.mean(2)
  return patches_LNP.reshape(*patches_LNP.shape[:2], side, side)


def loss(
  config: ConfigDict,
  model: VisionTransformer,
  batch: dict[str, jax.Array],
  rng: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean cross-entropy with label smoothing, mixup and cutmix.

  batch: "image" (B, H, W, C) uint8, "target" (B,) int32.
  Returns (loss, {"loss", "accuracy"}), both of the augmented images. For a
  mixed image, the class with the larger share counts as correct.
  """
  mix_rng, drop_rng = jax.random.split(rng)
  images_BHWC = normalize(config.data, batch["image"])
  targets_BV = optax.smooth_labels(
    jax.nn.one_hot(batch["target"], config.data.num_classes),
    config.augment.label_smoothing,
  )
  images_BHWC, targets_BV = mix(
    config.augment, mix_rng, images_BHWC, targets_BV
  )
  logits_BV = model(images_BHWC, drop_rng)
  mean_loss = optax.softmax_cross_entropy(logits_BV, targets_BV).mean()
  correct_B = logits_BV.argmax(-1) == targets_BV.argmax(-1)
  accuracy = correct_B.mean(dtype=jnp.float32)
  return mean_loss, {"loss": mean_loss, "accuracy": accuracy}


def evaluate(
  config: ConfigDict, model: VisionTransformer, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns weighted sums over the batch of the loss and the accuracies.

  batch: as in `loss`, with "weight" (B,) float32, 0 for padding. "weight" in
  the result is the sum of the weights.
  """
  logits_BV = model(normalize(config.data, batch["image"]))
  target_B, weight_B = batch["target"], batch["weight"]
  values = {
    "loss": optax.softmax_cross_entropy_with_integer_labels(
      logits_BV, target_B
    ),
    "accuracy": logits_BV.argmax(-1) == target_B,
    "weight": jnp.ones_like(weight_B),
  }
  if _has_top5(config):
    top_B5 = jax.lax.top_k(logits_BV, 5)[1]
    values["accuracy_top5"] = (top_B5 == target_B[:, None]).any(-1)
  return {name: jnp.vdot(weight_B, x) for name, x in values.items()}


def _has_top5(config):
  return config.data.num_classes > 10


def represent(
  config: ConfigDict, model: Backbone, batch: dict[str, jax.Array]
) -> jax.Array:
  """The features (B, D) of a batch's images, float32, without randomness."""
  return model.features(normalize(config.data, batch["image"]))


def normalize(data: ConfigDict, images_BHWC: jax.Array) -> jax.Array:
  """(images / 255 - mean) / std in float32, for each channel.

  data: config.data. images_BHWC: uint8, from 0 to 255.
  """
  return standardize(data, images_BHWC.astype(jnp.float32) / 255)


def standardize(data: ConfigDict, images_BHWC: jax.Array) -> jax.Array:
  """(images - mean) / std for each channel, of pixels in [0, 1]."""
  mean, std = (
    jnp.asarray(x, jnp.float32)[None, None, None, :]
    for x in (data.mean, data.std)
  )
  return (images_BHWC - mean) / std


def mix(
  augment: ConfigDict,
  rng: jax.Array,
  images_BHWC: jax.Array,
  targets_BV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Mixup (1710.09412) or cutmix (1905.04899) of neighbours in the batch.

  image_i becomes m image_i + (1 - m) image_{i-1}; the targets are mixed in the
  same way with the mean of m. In mixup, m is a number drawn from
  Beta(mixup, mixup). In cutmix, m is 0 inside a box and 1 outside. The whole
  batch shares one draw. If both are on, a fair coin selects one per batch.

  augment: config.augment. targets_BV: class probabilities.
  """
  height, width = images_BHWC.shape[1:3]
  mix_rng, cut_rng, coin_rng = jax.random.split(rng, 3)
  masks = []
  if augment.mixup:
    share = jax.random.beta(mix_rng, augment.mixup, augment.mixup)
    masks.append(jnp.full((height, width), share))
  if augment.cutmix:
    masks.append(_cutmix_mask(cut_rng, augment.cutmix, height, width))
  if not masks:
    return images_BHWC, targets_BV
  coin = jax.random.bernoulli(coin_rng)
  mask_HW = jnp.where(coin, masks[0], masks[-1])
  # Images are mixed with their neighbours, which are mostly on the same device.
  # Partners in a reversed batch would not be.
  return (
    _interpolate(mask_HW[None, :, :, None], images_BHWC),
    _interpolate(mask_HW.mean()[None, None], targets_BV),
  )


def _interpolate(share, x):
  return share * x + (1 - share) * jnp.roll(x, 1, axis=0)


def _cutmix_mask(rng, alpha, height, width):
  """A mask (height, width): 0 inside a random box, 1 outside.

  The box has the share 1 - lambda of the image's area, with lambda drawn from
  Beta(alpha, alpha). Its centre is uniform over the image; parts of the box
  outside the image are cut off.
  """
  share_rng, row_rng, column_rng = jax.random.split(rng, 3)
  side = jnp.sqrt(1 - jax.random.beta(share_rng, alpha, alpha))

  def inside(rng, length):
    centre = jax.random.uniform(rng, maxval=length)
    return jnp.abs(jnp.arange(length) + 0.5 - centre) < side * length / 2

  rows, columns = inside(row_rng, height), inside(column_rng, width)
  return 1.0 - jnp.outer(rows, columns).astype(jnp.float32)
