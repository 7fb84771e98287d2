"""CTC against the sum over all paths, and the counts of errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.data.speech import encode
from sigattn.tasks import ctc, speech


@pytest.mark.parametrize(
  ("path", "text"),
  [
    ([], ""),
    ([0, 0], ""),
    ([1, 1, 0, 1, 2, 2, 0, 3], "aabc"),
    ([2, 0, 0, 2], "bb"),
  ],
)
def test_greedy_merges_then_drops_blanks(path, text):
  assert ctc.greedy(path, "abc") == text


def log_probs(frames, classes, seed=0):
  x = np.random.default_rng(seed).normal(0, 2, (frames, classes))
  return x - np.log(np.exp(x).sum(1, keepdims=True))


def by_paths(log_probs_TV):
  """{text: log probability}, each summed over all paths of the text."""
  frames, classes = log_probs_TV.shape
  log_prob_of = {}
  for path in itertools.product(range(classes), repeat=frames):
    text = ctc.greedy(path, "abc")
    log_prob = log_probs_TV[np.arange(frames), path].sum()
    log_prob_of[text] = np.logaddexp(log_prob_of.get(text, -np.inf), log_prob)
  return log_prob_of


def test_prefix_beam_finds_the_most_probable_text():
  differs = 0
  for seed in range(20):
    x_TV = 0.3 * log_probs(5, 3, seed)
    x_TV -= np.log(np.exp(x_TV).sum(1, keepdims=True))
    texts = by_paths(x_TV)
    text = ctc.prefix_beam(x_TV, "abc", 100)
    assert texts[text] == pytest.approx(max(texts.values()))
    differs += text != ctc.greedy(x_TV.argmax(1), "abc")
  assert differs > 5
  assert ctc.prefix_beam(log_probs(0, 3), "abc", 4) == ""


def test_ctc_loss_is_the_sum_over_paths_of_what_is_no_padding():
  texts = ["ab", "aa", "", "bb", "c"]
  tokens = np.array([5, 4, 3, 3, 0], np.int32)
  logits = np.stack([log_probs(5, 4, seed) for seed in range(5)])
  targets = np.zeros((5, 3), np.int32)
  for row, text in zip(targets, texts, strict=True):
    row[: len(text)] = encode(text, "abc")
  characters = np.array([len(text) for text in texts], np.int32)
  targets[3, 2] = 2  # padding that repeats the last character
  loss_B = speech.ctc_loss(np.float32(logits), tokens, targets, characters)
  for i in range(4):
    expected = -by_paths(logits[i, : tokens[i]])[texts[i]]
    assert loss_B[i] == pytest.approx(expected, rel=1e-4)
  assert loss_B[4] == 0  # there is no token for its character


def test_too_few_tokens_for_a_double_letter_give_no_gradient():
  targets, characters = np.array([[1, 1]]), np.array([2])

  @jax.jit
  @jax.grad
  def gradient(logits_BTV, tokens):
    return speech.ctc_loss(
      logits_BTV, jnp.array([tokens]), targets, characters
    ).sum()

  for tokens, is_zero in ((2, True), (3, False)):
    grad_BTV = gradient(jnp.zeros((1, 3, 3)), tokens)
    assert np.isfinite(grad_BTV).all()
    assert (grad_BTV == 0).all() == is_zero


def test_errors_count_edits():
  counts = ctc.errors("press two now", "pres tow now")
  expected = dict(zip(ctc.COUNTS, (1 + 2, 13, 2, 3), strict=True))
  assert counts == expected
  assert ctc.errors("", "a")["characters"] == 0
