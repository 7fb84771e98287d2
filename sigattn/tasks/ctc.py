"""Connectionist temporal classification (CTC): decoding and error counts.

A path assigns a character or the blank to each frame. Merging equal neighbours
and then dropping the blanks gives the text of the path. The loss is in
sigattn/tasks/ctc_loss.py.
"""

import math

from sigattn import extras

extras.require("speech")

import jiwer
import numpy as np

from sigattn.data.speech import BLANK, spell


def greedy(path_T: np.ndarray, alphabet: str) -> str:
  """Returns the text of the most probable path.

  path_T: the most probable index of each frame.
  """
  path_T = np.asarray(path_T)
  changed = np.append(True, path_T[1:] != path_T[:-1])
  kept = path_T[changed & (path_T != BLANK)]
  return spell(kept, alphabet)


def prefix_beam(log_probs_TV: np.ndarray, alphabet: str, width: int) -> str:
  """Returns the most probable text found by a prefix beam search (1408.2873).

  The search adds up the probabilities of all paths of a text, whereas `greedy`
  follows a single path. log_probs_TV: over the blank and the alphabet. width:
  the number of prefixes kept after each frame.
  """
  log_probs_TV = np.asarray(log_probs_TV, np.float64)
  impossible = -math.inf
  # {prefix: (log probability of its paths that end in the blank, and of those
  # that end in its last character)}
  beam = {(): (0.0, impossible)}
  for log_probs_V in log_probs_TV:
    extended = {}

    def add(prefix, blank, last, extended=extended):
      old = extended.get(prefix, (impossible, impossible))
      extended[prefix] = np.logaddexp(old[0], blank), np.logaddexp(old[1], last)

    for prefix, (blank, last) in beam.items():
      total = np.logaddexp(blank, last)
      add(prefix, total + log_probs_V[BLANK], impossible)
      for index in range(1, len(log_probs_V)):
        log_prob = log_probs_V[index]
        if prefix and index == prefix[-1]:
          # Without a blank in between, the two equal characters are merged.
          add(prefix, impossible, last + log_prob)
          add((*prefix, index), impossible, blank + log_prob)
        else:
          add((*prefix, index), impossible, total + log_prob)
    best = sorted(
      extended, key=lambda p: np.logaddexp(*extended[p]), reverse=True
    )
    beam = {prefix: extended[prefix] for prefix in best[:width]}
  prefix = max(beam, key=lambda p: np.logaddexp(*beam[p]))
  return spell(prefix, alphabet)


COUNTS = ("character_errors", "characters", "word_errors", "words")


def errors(reference: str, hypothesis: str) -> dict[str, int]:
  """Returns the counts named by COUNTS.

  They are the numbers of edits that turn the hypothesis into the reference, in
  characters and in words, and the numbers of characters and words of the
  reference. An error rate over any number of utterances is the sum of errors
  divided by the sum of characters or words.
  """
  counts = []
  for process in (jiwer.process_characters, jiwer.process_words):
    edits = process(reference, hypothesis)
    counts += [
      edits.substitutions + edits.deletions + edits.insertions,
      edits.hits + edits.substitutions + edits.deletions,
    ]
  return dict(zip(COUNTS, counts, strict=True))
