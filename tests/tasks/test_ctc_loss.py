"""The CTC loss equals the sum over all paths, and optax's with its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigattn.data.speech import encode
from sigattn.tasks.ctc_loss import ctc_loss
from tests.tasks.test_ctc import by_paths, log_probs

BLOCKS = [None, 1, 4, 16]
V, T = 7, 23
# (valid tokens, target) of each utterance. In this order: a full one, repeated
# characters, padding, an empty target, one character, only as many tokens as
# needed, one token, and more characters than tokens.
CASES = (
  (23, [1, 2, 3, 4, 5, 6]),
  (23, [2, 2, 2, 3, 3, 1]),
  (20, [4, 1, 4]),
  (11, []),
  (23, [5]),
  (8, [1, 1, 2, 3, 3, 6]),
  (1, [6]),
  (5, [1, 2, 3, 3, 2]),
)


def arguments():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (len(CASES), T, V))
  # Targets are padded with characters.
  targets = rng.integers(1, V, (len(CASES), 6), np.int32)
  for row, (_, target) in zip(targets, CASES, strict=True):
    row[: len(target)] = target
  tokens = np.array([x for x, _ in CASES], np.int32)
  return logits, tokens, targets, np.array([len(x) for _, x in CASES], np.int32)


def by_optax(logits_BTV, tokens_B, targets_BU, characters_B):
  def padding(lengths_B, length):
    return (np.arange(length)[None] >= lengths_B[:, None]).astype("float32")

  loss_B = optax.ctc_loss(
    logits_BTV, padding(tokens_B, T), targets_BU, padding(characters_B, 6)
  )
  return loss_B.at[-1].set(0)  # the utterance with too few tokens


def losses_and_gradient(loss, dtype):
  logits, *lengths = arguments()
  with jax.enable_x64(dtype == "float64"):
    factors = jnp.arange(1, len(CASES) + 1, dtype=dtype)
    loss_B, pull_back = jax.vjp(
      jax.jit(lambda x: loss(x, *lengths)), jnp.asarray(logits, dtype)
    )
    return jax.device_get((loss_B, pull_back(factors.astype(loss_B.dtype))[0]))


@pytest.mark.parametrize("block", BLOCKS)
def test_equals_optax_in_float64(block):
  loss_B, d_logits = losses_and_gradient(
    lambda *args: ctc_loss(*args, block), "float64"
  )
  wanted_B, wanted = losses_and_gradient(by_optax, "float64")
  np.testing.assert_allclose(loss_B, wanted_B, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(d_logits, wanted, rtol=0, atol=1e-11)
  assert d_logits.dtype == "float64"


@pytest.mark.parametrize("block", BLOCKS)
def test_is_as_exact_as_optax_in_float32(block):
  exact = losses_and_gradient(by_optax, "float64")
  theirs = losses_and_gradient(by_optax, "float32")
  ours = losses_and_gradient(lambda *args: ctc_loss(*args, block), "float32")
  for found, other, wanted in zip(ours, theirs, exact, strict=True):
    bound = 2 * np.linalg.norm(other - wanted)
    assert np.linalg.norm(found - wanted) < bound


@pytest.mark.parametrize("block", BLOCKS)
def test_is_the_sum_over_paths_of_what_is_no_padding(block):
  texts = ["ab", "aa", "", "bb", "c"]
  tokens = np.array([5, 4, 3, 3, 0], np.int32)
  logits = np.stack([log_probs(5, 4, seed) for seed in range(5)])
  targets = np.zeros((5, 3), np.int32)
  for row, text in zip(targets, texts, strict=True):
    row[: len(text)] = encode(text, "abc")
  characters = np.array([len(text) for text in texts], np.int32)
  targets[3, 2] = 2  # this padding repeats the last character
  loss_B = ctc_loss(np.float32(logits), tokens, targets, characters, block)
  for i in range(4):
    expected = -by_paths(logits[i, : tokens[i]])[texts[i]]
    assert loss_B[i] == pytest.approx(expected, rel=1e-4)
  assert loss_B[4] == 0  # there is no token for its character


@pytest.mark.parametrize("block", BLOCKS)
def test_too_few_tokens_for_a_double_letter_give_no_gradient(block):
  targets, characters = np.array([[1, 1]]), np.array([2])

  @jax.jit
  @jax.grad
  def gradient(logits_BTV, tokens):
    tokens_B = jnp.array([tokens])
    return ctc_loss(logits_BTV, tokens_B, targets, characters, block).sum()

  for tokens, is_zero in ((2, True), (3, False)):
    grad_BTV = gradient(jnp.zeros((1, 3, 3)), tokens)
    assert np.isfinite(grad_BTV).all()
    assert (grad_BTV == 0).all() == is_zero


def test_is_never_below_zero():
  """With certain blanks, rounding could make a probability exceed 1."""
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(0, 1, (200, 3, 4)), "float32")
  logits = logits.at[..., 0].set(20)
  tokens, none = np.full(200, 3), np.zeros(200, int)
  loss_B = ctc_loss(logits, tokens, np.ones((200, 1), int), none)
  assert (loss_B >= 0).all()
  # A logit of -inf, for an impossible character, may not become NaN.
  logits = logits.at[..., 2].set(-jnp.inf)

  def loss(logits):
    return ctc_loss(logits, tokens, np.ones((200, 1), int), none + 1).sum()

  assert np.isfinite(jax.grad(loss)(logits)).all()


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_has_a_token(block):
  with pytest.raises(ValueError, match=f"block={block}; must be at least 1"):
    ctc_loss(*arguments(), block)
