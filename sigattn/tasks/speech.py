"""An acoustic encoder with CTC (2106.03143, 2409.04431): the task speech."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from sigattn import layers, positions, stack
from sigattn.data import loader, log_mel
from sigattn.data import speech as recordings
from sigattn.tasks import ctc
from sigattn.tasks.ctc_loss import ctc_loss
from sigattn.validate import choice, items, real, sequence, whole

SOURCE = recordings
UNIT = "utterances"
METRICS = ("loss", "cer", "wer")
POSITIONS = ("sincos", "cape", "rope", "none")
FEATURES = ("log_mel", "whisper")

# Errors are also counted by length: utterances of 0 to 10 seconds, 10 to 20, 20
# to 30, and more. The paper groups TED-LIUM's utterances in this way.
_GROUP_STARTS = (0, 10, 20, 30)


class AcousticModel(nnx.Module):
  """Log-mel -> convolutions + positions -> encoder -> norm -> characters.

  encoder: a module, encoder(x_BTD, rng, seq_lengths=) -> (B, T, D).
  convolutions: (kernel, stride) of each; a gated linear unit follows each.
  add_positions: None, or a function (x_BTD, tokens_B, rng) -> x_BTD.
  norm: the kind of the norm before the head, or None for no norm.
  characters: the size of the alphabet, V - 1; the first class is CTC's blank.

  Padding does not change the outputs of an utterance. It is set to 0 before
  each convolution, like the frames beyond the ends of an utterance, and no
  token attends to it.

  Initialisation beyond that of sigattn.layers:
    conv/i/kernel  LeCun normal
    head           0, so that the first probabilities are all 1 / V
  """

  def __init__(
    self,
    encoder: nnx.Module,
    *,
    mel_bins: int,
    convolutions: tuple[tuple[int, int], ...],
    width: int,
    characters: int,
    add_positions: Callable[..., jax.Array] | None,
    norm: str | None,
    norm_epsilon: float | None,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.encoder, self.add_positions = encoder, add_positions
    self.convolutions, self.dtype = convolutions, dtype
    inputs = (mel_bins, *[width] * (len(convolutions) - 1))
    self.conv = nnx.List(
      nnx.Conv(
        inputs[i],
        2 * width,
        (kernel,),
        strides=stride,
        # "SAME" would depend on the length with its padding.
        padding=[((kernel - 1) // 2, kernel // 2)],
        dtype=dtype,
        rngs=rngs,
      )
      for i, (kernel, stride) in enumerate(convolutions)
    )
    self.has_norm = norm is not None
    if self.has_norm:
      self.norm = layers.make_norm(norm, width, rngs, norm_epsilon)
    zeros = nnx.initializers.zeros
    self.head = nnx.Linear(width, characters + 1, kernel_init=zeros, rngs=rngs)

  def __call__(
    self, x_BTM: jax.Array, frames_B: jax.Array, rng: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns float32 logits (B, T', V), and the number of valid tokens, (B,).

    x_BTM, frames_B: as log_mel_of returns them. rng: for CAPE's shifts, dropout
    and drop path; None turns them off.
    """
    position_rng = drop_rng = None
    if rng is not None:
      position_rng, drop_rng = jax.random.split(rng)
    x_BTD, tokens_B = x_BTM.astype(self.dtype), frames_B
    for conv, (_, stride) in zip(self.conv, self.convolutions, strict=True):
      x_BTD, tokens_B = jax.nn.glu(conv(x_BTD)), -(-tokens_B // stride)
      valid_BT = log_mel.valid(tokens_B, x_BTD.shape[1])
      x_BTD = jnp.where(valid_BT[..., None], x_BTD, 0)
    if self.add_positions is not None:
      x_BTD = self.add_positions(x_BTD, tokens_B, position_rng)
    x_BTD = self.encoder(x_BTD, drop_rng, seq_lengths=tokens_B)
    if self.has_norm:
      x_BTD = layers.normalize(self.norm, x_BTD)
    return self.head(x_BTD.astype(jnp.float32)), tokens_B


FIELDS = stack.FIELDS | {
  "model.features": choice(FEATURES),
  "model.mel_bins": whole(low=1, high=2**12),
  "model.convolutions": sequence(
    items(whole(low=1, high=2**12), whole(low=1, high=2**12)),
    f"(kernel, stride) pairs, whole and from 1 to {2**12}",
    longest=16,
  ),
  "model.positions": choice(POSITIONS),
  "model.cape_shift": real(low=0, high=1e6),
  "model.cape_local_shift": real(low=0, high=1e6),
  "model.cape_scale": real(low=1, high=1e3),
  "augment.freq_masks": whole(low=0, high=1000),
  "augment.freq_width": whole(low=0, high=10**6),
  "augment.time_masks": whole(low=0, high=1000),
  "augment.time_width": whole(low=0, high=10**6),
  "augment.time_share": real(low=0, high=1),
  "eval.beam_width": whole(low=1, high=2**16),
}


def _whisper_hears_at_16_khz(config):
  rate = config.data.sample_rate
  if config.model.features == "whisper" and rate != log_mel.WHISPER_RATE:
    raise ValueError(
      f"config.data.sample_rate={rate!r}; must be {log_mel.WHISPER_RATE} with "
      "config.model.features='whisper'"
    )


RULES = (
  *stack.RULES,
  _whisper_hears_at_16_khz,
  stack.not_causal,
  stack.multiple_for_positions({"sincos": 2, "cape": 2, "rope": 2}),
)


def build(config: ConfigDict, rngs: nnx.Rngs) -> AcousticModel:
  """Returns the AcousticModel of a config.

  Its max_length, the n of sigmoid's bias -log n, is the number of tokens of the
  longest utterance that config.data.bucket_seconds admits.
  """
  model, data = config.model, config.data
  samples = int(data.bucket_seconds[-1] * data.sample_rate)
  encoder = stack.make(
    config,
    max_length=int(recordings.tokens(config, samples)),
    rotate=_rotate if model.positions == "rope" else None,
    rngs=rngs,
  )
  return AcousticModel(
    encoder,
    mel_bins=model.mel_bins,
    convolutions=tuple(tuple(pair) for pair in model.convolutions),
    width=model.width,
    characters=len(data.alphabet),
    add_positions=_position_adder(model),
    # A post-norm block already ends with a norm.
    norm=None if model.norm == "post" else model.norm_kind,
    norm_epsilon=model.norm_epsilon,
    dtype=jnp.dtype(config.dtype),
    rngs=rngs,
  )


def _rotate(x_BTNH):
  return positions.rope(x_BTNH, np.arange(x_BTNH.shape[1]))


def _position_adder(model):
  """A function that adds sines of the positions to the tokens, or None."""
  cape = (model.cape_shift, model.cape_local_shift, model.cape_scale)

  def add(x_BTD, tokens_B, rng):
    _, length, width = x_BTD.shape
    if model.positions == "cape":
      positions_BT = positions.cape(rng, tokens_B, length, *cape)
    else:
      positions_BT = jnp.arange(length, dtype=jnp.float32)[None]
    return x_BTD + positions.sincos(positions_BT, width).astype(x_BTD.dtype)

  return add if model.positions in ("sincos", "cape") else None


def log_mel_of(
  config: ConfigDict, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Returns log-mel energies (B, T, M) and the valid frames (B,).

  config.model.features says whether they are normalised for each recording, or
  scaled as in Whisper. A recording that is shorter than a window counts as one
  frame. batch: "audio" and "samples", as in `loss`.
  """
  bins = config.model.mel_bins
  frames_B = jnp.maximum(recordings.frames(config, batch["samples"]), 1)
  if config.model.features == "whisper":
    x_BTM = log_mel.whisper(batch["audio"], bins)
    valid_BT = log_mel.valid(frames_B, x_BTM.shape[1])
    return jnp.where(valid_BT[..., None], x_BTM, 0), frames_B
  x_BTM = log_mel.log_mel(batch["audio"], config.data.sample_rate, bins)
  return log_mel.normalize(x_BTM, frames_B), frames_B


def tick_labels(config: ConfigDict, batch: loader.Batch) -> list[str]:
  """Returns the second at which each token of a batch of one begins."""
  stride = math.prod(stride for _, stride in config.model.convolutions)
  frames = recordings.frames(config, int(batch["samples"][0]))
  starts = range(0, frames, stride)
  return [f"{start * log_mel.HOP_MS / 1000:.2f}" for start in starts]


def loss(
  config: ConfigDict,
  model: AcousticModel,
  batch: dict[str, jax.Array],
  rng: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """CTC's -log p(text | audio) with SpecAugment, in nats per character.

  batch: "audio" (B, S) float32 in [-1, 1], "samples" (B,), "target" (B, U)
  int32, "characters" (B,). An utterance with too few tokens for its target
  would count with a loss of 0; recordings.Source leaves such utterances out.
  Returns (loss, {"loss"}).
  """
  augment_rng, model_rng = jax.random.split(rng)
  x_BTM, frames_B = log_mel_of(config, batch)
  x_BTM = log_mel.spec_augment(config.augment, augment_rng, x_BTM, frames_B)
  logits_BTV, tokens_B = model(x_BTM, frames_B, model_rng)
  loss_B = ctc_loss(logits_BTV, tokens_B, batch["target"], batch["characters"])
  mean_loss = loss_B.sum() / jnp.maximum(batch["characters"].sum(), 1)
  return mean_loss, {"loss": mean_loss}


def evaluate(
  config: ConfigDict, model: AcousticModel, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns the loss and prediction of each utterance, the input of `score`.

  batch: as in `loss`, with "seconds" (B,), and "weight" (B,), 0 for padding.
  """
  logits_BTV, tokens_B = model(*log_mel_of(config, batch))
  loss_B = ctc_loss(logits_BTV, tokens_B, batch["target"], batch["characters"])
  kept = ("target", "characters", "seconds", "weight")
  outputs = {name: batch[name] for name in kept} | {"loss": loss_B}
  return outputs | _predictions(config, logits_BTV, tokens_B)


def predict(
  config: ConfigDict, model: AcousticModel, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns the prediction for each utterance, the input of `decode`.

  batch: "audio" (B, S) float32 in [-1, 1], "samples" (B,).
  """
  return _predictions(config, *model(*log_mel_of(config, batch)))


def _predictions(config, logits_BTV, tokens_B):
  if config.eval.beam_width > 1:
    return {"tokens": tokens_B, "log_probs": jax.nn.log_softmax(logits_BTV)}
  return {"tokens": tokens_B, "path": logits_BTV.argmax(-1)}


def score(
  config: ConfigDict, outputs: loader.Batch
) -> dict[str, float | np.ndarray]:
  """Returns sums over a batch: the loss, and ctc.COUNTS by group of length.

  outputs: what `evaluate` returned, as NumPy arrays. The counts are arrays
  (4,); the groups are utterances of up to 10, 20, 30 and more seconds.
  """
  sums = {"loss": 0.0} | {
    name: np.zeros(len(_GROUP_STARTS)) for name in ctc.COUNTS
  }
  for i in np.flatnonzero(outputs["weight"]):
    target_U = outputs["target"][i][: outputs["characters"][i]]
    hypothesis = decode(config, {name: x[i] for name, x in outputs.items()})
    sums["loss"] += float(outputs["loss"][i])
    seconds = outputs["seconds"][i]
    group = np.searchsorted(_GROUP_STARTS, seconds, side="right") - 1
    reference = ctc.spell(target_U, config.data.alphabet)
    for name, count in ctc.errors(reference, hypothesis).items():
      sums[name][group] += count
  return sums


def decode(config: ConfigDict, outputs: loader.Batch) -> str:
  """Returns the text of one utterance.

  outputs: what `predict` or `evaluate` returned, without the batch axis.
  """
  tokens, alphabet = outputs["tokens"], config.data.alphabet
  if config.eval.beam_width > 1:
    log_probs_TV = outputs["log_probs"][:tokens]
    return ctc.prefix_beam(log_probs_TV, alphabet, config.eval.beam_width)
  return ctc.greedy(outputs["path"][:tokens], alphabet)


def results(
  config: ConfigDict, sums: dict[str, float | np.ndarray]
) -> dict[str, float]:
  """Returns the metrics, given the sums of `score` over all batches.

  loss       nats per character
  cer, wer   character and word error rates over all utterances
  cer_10_20  the error rate of utterances of 10 to 20 seconds; likewise for wer
             and the other groups of length
  """
  del config
  metrics = {"loss": sums["loss"] / sums["characters"].sum()}
  ends = (*_GROUP_STARTS[1:], "up")
  for metric, unit in (("cer", "character"), ("wer", "word")):
    errors, counts = sums[f"{unit}_errors"], sums[f"{unit}s"]
    metrics[metric] = errors.sum() / counts.sum()
    for start, end, error, count in zip(
      _GROUP_STARTS, ends, errors, counts, strict=True
    ):
      if count:
        metrics[f"{metric}_{start}_{end}"] = error / count
  return metrics
