"""Connectionist temporal classification: decoding, and how wrong it is.

A path gives each frame a character or the blank; its text is what remains when
equal neighbours are merged and blanks then dropped. The loss is optax's.
"""

import math

import jiwer
import numpy as np

from sigattn.data.speech import BLANK, spell


def greedy(path_T: np.ndarray, alphabet: str) -> str:
  """The text of the path of the most probable index of each frame."""
  path_T = np.asarray(path_T)
  changed = np.append(True, path_T[1:] != path_T[:-1])
  kept = path_T[changed & (path_T != BLANK)]
  return spell(kept, alphabet)


def prefix_beam(log_probs_TV: np.ndarray, alphabet: str, width: int) -> str:
  """The most probable text that a search over prefixes finds (1408.2873).

  Sums over the paths of a text, where `greedy` takes the text of one path.
  log_probs_TV: over blank and alphabet. width: prefixes kept at each frame.
  """
  log_probs_TV = np.asarray(log_probs_TV, np.float64)
  impossible = -math.inf
  # {prefix: (log probability ending in a blank, in its last character)}
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
          add(prefix, impossible, last + log_prob)  # merged with the one before
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
  """What COUNTS names: edits, and the reference's characters and words.

  An error rate is the quotient of sums over as many utterances as one likes.
  """
  counts = []
  for process in (jiwer.process_characters, jiwer.process_words):
    edits = process(reference, hypothesis)
    counts += [
      edits.substitutions + edits.deletions + edits.insertions,
      edits.hits + edits.substitutions + edits.deletions,
    ]
  return dict(zip(COUNTS, counts, strict=True))
