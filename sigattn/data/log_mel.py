"""The input of an acoustic model: log-mel energies, masked by SpecAugment."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

WINDOW_MS, HOP_MS = 25, 10
# The floor makes the logarithm of digital silence finite. It is below the
# quietest part of a recording of 16 bits.
_FLOOR = 1e-6


def frames(samples: int | jax.Array, sample_rate: int) -> int | jax.Array:
  """Returns the number of whole windows that fit into `samples` samples.

  A window of 25 ms starts every 10 ms. samples: an int, or an array of ints.
  sample_rate: in Hz.
  """
  window, hop = _window_and_hop(sample_rate)
  return (samples - window) // hop + 1


def _window_and_hop(sample_rate):
  """The samples of a window, and those between two windows."""
  return sample_rate * WINDOW_MS // 1000, sample_rate * HOP_MS // 1000


def log_mel(audio_BS: jax.Array, sample_rate: int, mel_bins: int) -> jax.Array:
  """log(max(mel filters . |FFT(Hann window of the audio)|^2, 1e-6)).

  A window of 25 ms starts every 10 ms, and none reaches beyond the end. The FFT
  has at least twice the window's samples, so that each of 80 bins holds a
  frequency even at 8 kHz. The energies equal those of
  librosa.feature.melspectrogram(center=False) if the audio is padded with
  (n_fft - window) / 2 zeros on both sides, because librosa puts the window in
  the middle of the FFT.

  audio_BS: in [-1, 1]. sample_rate: in Hz. Returns (B, frames, mel_bins)
  float32.
  """
  window, _ = _window_and_hop(sample_rate)
  fft_size = 2 ** math.ceil(math.log2(2 * window))
  num_frames = frames(audio_BS.shape[1], sample_rate)
  mel_BTM = _mel_energies(audio_BS, num_frames, sample_rate, fft_size, mel_bins)
  return jnp.log(jnp.maximum(mel_BTM, _FLOOR))


def _mel_energies(audio_BS, num_frames, sample_rate, fft_size, mel_bins):
  """Mel filters . |FFT(Hann window of the audio)|^2, (B, frames, mel_bins)."""
  window, hop = _window_and_hop(sample_rate)
  index_TS = hop * np.arange(num_frames)[:, None] + np.arange(window)[None]
  # The periodic window is the usual one for spectra of audio.
  hann_S = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
  x_BTS = audio_BS.astype(jnp.float32)[:, index_TS]
  x_BTS = x_BTS * jnp.asarray(hann_S, jnp.float32)[None, None]
  power_BTF = jnp.square(jnp.abs(jnp.fft.rfft(x_BTS, fft_size)))
  filters_FM = jnp.asarray(mel_filters(sample_rate, fft_size, mel_bins))
  return jnp.einsum("BTF,FM->BTM", power_BTF, filters_FM)


WHISPER_RATE = 16_000  # Hz


def whisper_frames(samples: int | jax.Array) -> int | jax.Array:
  """Returns the frames of `whisper`: one begins every 10 ms.

  samples: at 16 kHz, an int or an array of ints.
  """
  return samples // _window_and_hop(WHISPER_RATE)[1]


def whisper(audio_BS: jax.Array, mel_bins: int) -> jax.Array:
  """The features of Whisper (2212.04356) for recordings of up to 30 seconds.

  x = log10(max(mel filters . |FFT(Hann window of the audio)|^2, 1e-10)) becomes
  max(x, the recording's largest x - 8) / 4 + 1. The windows of 25 ms are
  centred at the multiples of 10 ms. As in Whisper, the audio is mirrored before
  its beginning and followed by zeros.

  audio_BS: in [-1, 1], at 16 kHz; zeros where it is padding. mel_bins: 80, or
  128 as in Whisper's third large model. Returns (B, samples // 160, mel_bins)
  float32.
  """
  window, hop = _window_and_hop(WHISPER_RATE)
  num_frames = whisper_frames(audio_BS.shape[1])
  # Two more frames reach into the audio, and may hold its largest x.
  after = 2 * hop + window
  audio_BS = jnp.pad(audio_BS.astype(jnp.float32), ((0, 0), (0, after)))
  audio_BS = jnp.pad(audio_BS, ((0, 0), (window // 2, 0)), mode="reflect")
  mel_BTM = _mel_energies(
    audio_BS, num_frames + 2, WHISPER_RATE, window, mel_bins
  )
  x_BTM = jnp.log10(jnp.maximum(mel_BTM, 1e-10))
  largest_B11 = x_BTM.max((1, 2), keepdims=True)
  return jnp.maximum(x_BTM, largest_B11 - 8)[:, :num_frames] / 4 + 1


def mel_filters(sample_rate: int, fft_size: int, mel_bins: int) -> np.ndarray:
  """Triangular filters of equal area over an FFT's frequencies (Slaney, 1998).

  The corners of the triangles are equally spaced on the mel scale, from 0 to
  half the sample rate. Returns (fft_size / 2 + 1, mel_bins) float32.
  """
  top = _mel(sample_rate / 2)
  corners = _hertz(np.linspace(0, top, mel_bins + 2))
  frequency_F1 = np.arange(fft_size // 2 + 1)[:, None] * sample_rate / fft_size
  low, middle, high = (corners[i : i + mel_bins][None] for i in range(3))
  rising = (frequency_F1 - low) / (middle - low)
  falling = (high - frequency_F1) / (high - middle)
  triangles_FM = np.maximum(0, np.minimum(rising, falling))
  return (triangles_FM * 2 / (high - low)).astype(np.float32)


# Slaney's mel scale is linear below 1 kHz and logarithmic above.
_LINEAR = 200 / 3  # Hz per mel, below the knee
_KNEE = 1000 / _LINEAR  # mel; the knee is at 1 kHz
_LOG_STEP = math.log(6.4) / 27  # log(Hz) per mel, above the knee


def _mel(hertz):
  if hertz < 1000:
    return hertz / _LINEAR
  return _KNEE + math.log(hertz / 1000) / _LOG_STEP


def _hertz(mel):
  above = 1000 * np.exp(_LOG_STEP * (mel - _KNEE))
  return np.where(mel < _KNEE, _LINEAR * mel, above)


def valid(lengths_B: jax.Array, length: int) -> jax.Array:
  """Returns bool (B, length): False for padding."""
  return jnp.arange(length)[None] < lengths_B[:, None]


def normalize(x_BTM: jax.Array, frames_B: jax.Array) -> jax.Array:
  """(x - mean) / sqrt(variance + 1e-5) over an utterance's frames and bins.

  x_BTM: log-mel energies. frames_B: the number of frames that are not padding.
  The padding of the result is 0.
  """
  valid_BT1 = valid(frames_B, x_BTM.shape[1])[..., None]
  count_B11 = (frames_B * x_BTM.shape[2])[:, None, None]

  def mean(x_BTM):
    total = jnp.where(valid_BT1, x_BTM, 0).sum((1, 2), keepdims=True)
    return total / count_B11

  x_BTM = x_BTM - mean(x_BTM)
  x_BTM = x_BTM * jax.lax.rsqrt(mean(jnp.square(x_BTM)) + 1e-5)
  return jnp.where(valid_BT1, x_BTM, 0)


def spec_augment(
  augment: ConfigDict, rng: jax.Array, x_BTM: jax.Array, frames_B: jax.Array
) -> jax.Array:
  """SpecAugment (1904.08779): sets random bands of frequency and time to 0.

  augment: config.augment. freq_masks bands have up to freq_width bins each.
  time_masks bands have up to time_width frames each, and at most time_share of
  the utterance's frames. Widths and positions are uniform, and drawn anew for
  each utterance. x_BTM: normalised, so that 0 is the mean.
  """
  batch, length, bins = x_BTM.shape
  freq_rng, time_rng = jax.random.split(rng)
  shape = (batch, augment.freq_masks)
  width = jnp.full(shape, min(augment.freq_width, bins))
  kept_BM = _outside_bands(freq_rng, width, jnp.full(shape, bins), bins)
  max_width_B1 = (augment.time_share * frames_B).astype(jnp.int32)[:, None]
  shape = (batch, augment.time_masks)
  width = jnp.broadcast_to(jnp.minimum(augment.time_width, max_width_B1), shape)
  total = jnp.broadcast_to(frames_B[:, None], shape)
  kept_BT = _outside_bands(time_rng, width, total, length)
  return jnp.where(kept_BT[:, :, None] & kept_BM[:, None], x_BTM, 0)


def _outside_bands(rng, width_BK, total_BK, length):
  """bool (B, length), False in K random bands of 0 to width within 0..total."""
  width_rng, start_rng = jax.random.split(rng)
  width_BK = jax.random.randint(width_rng, width_BK.shape, 0, width_BK + 1)
  start_BK = jax.random.randint(
    start_rng, width_BK.shape, 0, total_BK - width_BK + 1
  )
  index = jnp.arange(length)[None, None]
  start_BK1, width_BK1 = start_BK[:, :, None], width_BK[:, :, None]
  hidden = (index >= start_BK1) & (index < start_BK1 + width_BK1)
  return ~hidden.any(1)
