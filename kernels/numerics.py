"""Where a 16-bit kernel needs more than the fast form of its arithmetic."""

import math

# The least b at which the tanh form below is exact enough.
_TANH_BIAS = {
  "bfloat16": {"plain": -11.0, "alibi": -9.0},
  "float16": {"plain": -9.0, "alibi": math.inf},
}


def exact_sigmoid(problem):
  """Whether a 16-bit kernel must keep the relative precision of small weights.

  With the hardware's tanh, sigmoid(z) = 0.5 + 0.5 tanh(z / 2) costs one slow
  operation, 1 / (1 + exp(-z)) two. But near -1 a tanh in float32 has steps of
  6e-8, so that the sum of a row of weights of about e^b loses, in the mean (V =
  1, an H200): 4e-4 at b = -9.7, 6e-4 at -11.1, 5e-3 at -13.9, 12 % at -16,
  beside 1.4e-3 of the rounding of a bfloat16 output. So tanh is for b >= -11,
  key lengths up to 60,000 by default. ALiBi spreads a row's weights down to
  nothing, each with the same absolute loss: 7e-4 of the sum at b = -9, hence
  the bound there, provided that a query sees its own place, of distance 0; the
  gradient of a slope magnifies that loss by the distance. float16 rounds eight
  times finer than bfloat16. The values of a bias in an array are not known:
  exact.
  """
  if problem.logit_bias is None:
    return True
  alibi = problem.shapes.alibi_slopes is not None
  if alibi and _nearest(problem) > 0:
    return True
  bounds = _TANH_BIAS[problem.dtype]
  return problem.logit_bias < bounds["alibi" if alibi else "plain"]


def _nearest(problem):
  """The least distance |i + S - T - j| that ALiBi puts on a visible key."""
  offset = problem.key_len - problem.query_len
  left, right = problem.window or (math.inf, math.inf)
  if problem.is_causal:
    right = 0
  return max(offset - right, -offset - left, 0)
