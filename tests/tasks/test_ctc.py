"""Decoding agrees with the sum over all paths; errors are counted right."""

import itertools

import numpy as np
import pytest

from sigattn.tasks import ctc


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


def test_errors_count_edits():
  counts = ctc.errors("press two now", "pres tow now")
  expected = dict(zip(ctc.COUNTS, (1 + 2, 13, 2, 3), strict=True))
  assert counts == expected
  assert ctc.errors("", "a")["characters"] == 0
