"""Log-mel energies against librosa, their normalisation, and SpecAugment."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.data import log_mel
from tests.data.recordings import noise, small

KEY = jax.random.key(0)
ROOT = pathlib.Path(__file__).parents[1]


def chirp(rate):
  """A quarter of a second of a rising tone that fades."""
  time = np.arange(rate // 4) / rate
  tone = np.sin(2 * np.pi * (200 + 0.4 * rate * time) * time)
  return (0.3 * tone * np.exp(-8 * time)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_log_mel_is_librosas(rate):
  # The expected values come from a file, because librosa (1.0.0) would install
  # numba and scikit-learn. They are log(max(mel, 1e-6)), where mel is
  # librosa.feature.melspectrogram(y, sr=rate, n_fft, win_length=rate // 40,
  # hop_length=rate // 100, center=False, n_mels=80), y is the audio with
  # (n_fft - win_length) / 2 zeros on both sides, and n_fft is 512 or 1024.
  expected = np.load(pathlib.Path(__file__).parent / "librosa_mel.npz")[
    str(rate)
  ]
  audio_S = chirp(rate)
  features_TM = log_mel.log_mel(audio_S[None], rate, 80)[0]
  assert (
    features_TM.shape == (log_mel.frames(len(audio_S), rate), 80) == (23, 80)
  )
  assert np.ptp(expected) > 8
  np.testing.assert_allclose(features_TM, expected, atol=2e-4)


@pytest.mark.parametrize("padding", [0, 1000])
def test_whispers_features(padding):
  """The expected features are those of transformers.

  tests/references/make.py made them.
  """
  expected_TM = np.load(ROOT / "references" / "whisper.npz")["features"]
  audio_S = np.pad(chirp(16000), (0, padding))
  features_BTM = log_mel.whisper(np.stack([0.01 * audio_S, audio_S]), 80)
  assert np.ptp(expected_TM) > 1
  np.testing.assert_allclose(
    features_BTM[1, : len(expected_TM)], expected_TM, atol=1e-4
  )


def test_digital_silence_is_finite():
  features_BTM = log_mel.log_mel(np.zeros((1, 800), np.float32), 8000, 80)
  np.testing.assert_allclose(features_BTM, np.log(1e-6), rtol=1e-6)


def test_normalised_over_the_frames_that_are_no_padding():
  x_BTM = noise(2, 30, 5)
  normalized_BTM = np.asarray(log_mel.normalize(x_BTM, jnp.array([30, 11])))
  for row, length in zip(normalized_BTM, (30, 11), strict=True):
    assert row[:length].mean() == pytest.approx(0, abs=1e-5)
    assert row[:length].std() == pytest.approx(1, abs=1e-3)
    assert (row[length:] == 0).all()


def test_spec_augment_hides_bands_of_the_widths_it_is_told():
  augment = small().augment
  augment.update(
    freq_masks=1, freq_width=4, time_masks=1, time_width=6, time_share=0.5
  )
  frames_B = np.tile([8, 20], 200)
  x_BTM = np.ones((400, 20, 10), np.float32)
  masked_BTM = np.asarray(log_mel.spec_augment(augment, KEY, x_BTM, frames_B))
  hidden_BT, hidden_BM = (masked_BTM == 0).all(2), (masked_BTM == 0).all(1)
  # Only bands of time and of frequency are masked.
  bands = hidden_BT[:, :, None] | hidden_BM[:, None]
  np.testing.assert_array_equal(masked_BTM == 0, bands)
  count_B, bins_B = hidden_BT.sum(1), hidden_BM.sum(1)
  assert set(count_B[frames_B == 8]) == set(range(5))  # up to half
  assert set(count_B[frames_B == 20]) == set(range(7))
  assert not hidden_BT[frames_B == 8, 8:].any()
  assert set(bins_B) == set(range(5))
  changes_BT = np.diff(hidden_BT.astype(int), prepend=0, append=0)
  assert (abs(changes_BT).sum(1) == 2 * (count_B > 0)).all()  # only one band
  assert hidden_BT[frames_B == 20].any(0).all()  # at any position
  augment.update(freq_masks=0, time_masks=0)
  same = log_mel.spec_augment(augment, KEY, x_BTM, frames_B)
  np.testing.assert_array_equal(same, x_BTM)
