"""The loss of connectionist temporal classification (CTC, Graves et al. 2006).

A blank stands before, between and after the characters of a target, which
makes a chain of S = 2 U + 1 states. At each frame a path stays in its state,
moves to the next, or skips a blank between two different characters. With the
emission e_t(s) = log p_t(the character of s), and with -inf for states that do
not exist,

  a_t(s) = log(exp a_{t-1}(s) + exp a_{t-1}(s - 1) + [skip] exp a_{t-1}(s - 2))
           + e_t(s)

is the log-probability of all paths that are in s after frame t. The loss is the
negated log-probability of the last two states. Let b_t(s) be the same for the
reversed chain in reversed time. Then softmax(a_t + b_t - e_t) is the
probability of each s at frame t given the target, and the gradient is the
softmax of the logits minus this probability, summed for each character. So no
second pass has to go back through the first. The largest of a_t is subtracted
at each frame and added up separately for the loss, so that float32 does not
round the differences of states.

On a GPU, one frame at a time would be a thousand tiny kernels, and starting
them would take all the time. So the frames are cut into blocks, and three loops
run over the frames of a block, for all blocks at once:

  1. n_t(s, d) is the log-probability of all paths from the state s - d before
     a block to s. It obeys the recursion above in s and d.
  2. From n of whole blocks follow the states before each block, one block after
     another.
  3. From these follow all a_t.

The numbers are the same up to rounding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Frames of a block. With T = 600 there are 16 + 38 + 16 steps instead of 600,
# and n has 2 BLOCK + 1 numbers for each state. On a CPU blocks are more work.
BLOCK = 16
_NEVER = -jnp.inf


def ctc_loss(
  logits_BTV: jax.Array,
  tokens_B: jax.Array,
  targets_BU: jax.Array,
  characters_B: jax.Array,
  block: int | None = None,
) -> jax.Array:
  """Returns -log p(target) of each utterance, (B,) in nats; never below 0.

  An utterance with too few tokens for its target has a loss of 0. A target
  needs one token per character, and one blank between two equal characters.

  Args:
    logits_BTV: of the blank, which is 0, and of the characters.
    tokens_B: the number of valid tokens, at most T. targets_BU: int, from 1 to
      V - 1; entries beyond the characters_B of an utterance do not count.
    block: tokens of a block; None: BLOCK, but 1 (no blocks) on a CPU.

  Raises:
    ValueError: if block is below 1.
  """
  if block is not None and block < 1:
    raise ValueError(f"{block=}; must be at least 1")
  repeated_BU = targets_BU[:, 1:] == targets_BU[:, :-1]
  place_U = jnp.arange(1, targets_BU.shape[1])
  repeated_BU &= place_U[None] < characters_B[:, None]
  is_possible_B = characters_B + repeated_BU.sum(1) <= tokens_B
  if not jnp.issubdtype(logits_BTV.dtype, jnp.float64):
    logits_BTV = logits_BTV.astype(jnp.float32)
  return _loss(
    block, logits_BTV, tokens_B, targets_BU, characters_B, is_possible_B
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(block, logits_BTV, tokens_B, targets_BU, characters_B, is_possible_B):
  def loss(block, logits_BTV, *lengths):
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    chain = _chain(log_probs_BTV, *lengths)
    _, last_BS, total_B = _before(*_blocks(chain, block))
    loss_B = _negated(last_BS, lengths[-1]) - total_B
    return _finite(loss_B, is_possible_B)

  arguments = logits_BTV, tokens_B, targets_BU, characters_B
  return _by_platform(block, loss, *arguments)


def _with_gradient(
  block, logits_BTV, tokens_B, targets_BU, characters_B, is_possible_B
):
  def both(block, logits_BTV, tokens_B, targets_BU, characters_B):
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    chain = _chain(log_probs_BTV, tokens_B, targets_BU, characters_B)
    # The chains are stacked along a new leading axis, not along B, so that a
    # mesh that splits the batch can keep it split.
    pairs = zip(chain, _reversed(chain, characters_B), strict=True)
    chains = _Chain(*map(jnp.stack, pairs))
    states, last_BS, total_B = _all(*_blocks(chains, block))
    a_BTS, b_BTS = states[:, :, : logits_BTV.shape[1]]
    loss_B = _negated(last_BS[0], characters_B) - total_B[0]
    both_BTS = a_BTS + jnp.flip(b_BTS, (1, 2))
    # Where the emission is -inf, so is the sum, and it cannot be subtracted.
    both_BTS = jnp.where(both_BTS > _NEVER, both_BTS - chain.e_BTS, _NEVER)
    counts_BT1 = (chain.valid_BT & is_possible_B[:, None])[..., None]
    share_BTS = jnp.where(counts_BT1, jax.nn.softmax(both_BTS), 0)
    share_BTV = _by_character(share_BTS, targets_BU, logits_BTV.shape[2])
    d_logits_BTV = jnp.where(counts_BT1, jnp.exp(log_probs_BTV) - share_BTV, 0)
    return _finite(loss_B, is_possible_B), d_logits_BTV

  arguments = logits_BTV, tokens_B, targets_BU, characters_B
  return _by_platform(block, both, *arguments)


def _by_character(share_BTS, targets_BU, characters):
  """The sum over the states of each character, (B, T, V)."""
  symbols_BUV = jax.nn.one_hot(targets_BU, characters, dtype=share_BTS.dtype)
  share_BTV = jnp.einsum(
    "BTU,BUV->BTV", share_BTS[..., 1::2], symbols_BUV, precision="highest"
  )
  return share_BTV.at[..., 0].add(share_BTS[..., ::2].sum(-1))


def _pull_back(block, d_logits_BTV, d_loss_B):
  del block
  return d_loss_B[:, None, None] * d_logits_BTV, None, None, None, None


_loss.defvjp(_with_gradient, _pull_back)


def _by_platform(block, function, *arguments):
  if block is not None:
    return function(block, *arguments)
  return jax.lax.platform_dependent(
    *arguments,
    cpu=functools.partial(function, 1),
    default=functools.partial(function, BLOCK),
  )


def _finite(loss_B, is_possible_B):
  # Rounding may leave the probability of a certain target above 1.
  return jnp.where(is_possible_B, jnp.maximum(loss_B, 0), 0)


# The chain of states.


def _states(targets_BU):
  """The character of each state, 0 for the blanks, (B, 2 U + 1)."""
  between_BU2 = jnp.stack([targets_BU, jnp.zeros_like(targets_BU)], axis=2)
  return jnp.pad(between_BU2.reshape(len(targets_BU), -1), ((0, 0), (1, 0)))


class _Chain(NamedTuple):
  """The chain of states of each example.

  start_BS: log-probabilities before the first frame: 0 for one state, else
    -inf. e_BTS: emissions. skip_BS: whether a path may skip the state before.
  valid_BT: whether the frame counts; if not, states stay as they are.
  """

  start_BS: jax.Array
  e_BTS: jax.Array
  skip_BS: jax.Array
  valid_BT: jax.Array


def _chain(log_probs_BTV, tokens_B, targets_BU, characters_B):
  del characters_B  # States beyond the last do not change those before them.
  states_BS = _states(targets_BU)
  e_BTS = jnp.take_along_axis(log_probs_BTV, states_BS[:, None], axis=2)
  two_before_BS = jnp.pad(states_BS, ((0, 0), (2, 0)))[:, :-2]
  return _Chain(
    _one_state(jnp.zeros_like(tokens_B), e_BTS),
    e_BTS,
    (states_BS != 0) & (states_BS != two_before_BS),
    jnp.arange(e_BTS.shape[1])[None] < tokens_B[:, None],
  )


def _reversed(chain, characters_B):
  """The chain of reversed states in reversed time, from the last state on."""
  last_B = chain.e_BTS.shape[2] - 1 - 2 * characters_B
  skip_BS = jnp.flip(chain.skip_BS, 1)
  return _Chain(
    _one_state(last_B, chain.e_BTS),
    jnp.flip(chain.e_BTS, (1, 2)),
    # A skip from s - 2 to s is a skip from s to s - 2 in reverse.
    jnp.pad(skip_BS, ((0, 0), (2, 0)))[:, :-2],
    jnp.flip(chain.valid_BT, 1),
  )


def _one_state(place_B, e_BTS):
  is_there_BS = jnp.arange(e_BTS.shape[2])[None] == place_B[:, None]
  return jnp.where(is_there_BS, 0, _NEVER).astype(e_BTS.dtype)


def _negated(last_BS, characters_B):
  """-log of the summed probabilities of the last character and last blank."""
  end_B2 = 2 * characters_B[:, None] - jnp.arange(2)[None]
  # Without a character there is no state before the blank.
  ends_B2 = jnp.take_along_axis(last_BS, jnp.maximum(end_B2, 0), axis=1)
  return -jax.nn.logsumexp(jnp.where(end_B2 < 0, _NEVER, ends_B2), axis=1)


# The recursion. Arrays may have leading axes before those that are named.


def _log_add(*terms):
  """log sum exp of the terms; -inf, not NaN, where all terms are -inf."""
  most = functools.reduce(jnp.maximum, terms)
  most = jnp.where(most == _NEVER, 0, most)
  return jnp.log(sum(jnp.exp(x - most) for x in terms)) + most


def _step(a, e, skip, valid, axes=(-1,)):
  """The states after one more frame. axes: the axes along which paths move."""

  def moved(by):
    x = a
    for axis in axes:
      pad = [(0, 0)] * x.ndim
      pad[axis] = by, 0
      x = jnp.pad(x, pad, constant_values=_NEVER)
      x = jax.lax.slice_in_dim(x, 0, x.shape[axis] - by, axis=axis)
    return x

  paths = _log_add(a, moved(1), jnp.where(skip, moved(2), _NEVER))
  return jnp.where(valid, paths + e, a)


def _blocks(chain, block):
  """(start (..., S), e (block, ..., J, S), skip (..., S), valid of e's axes).

  The last axis of valid is 1.
  """
  start, e_TS, skip, valid_T = chain
  count = -(-e_TS.shape[-2] // block)
  pad = [(0, 0)] * valid_T.ndim
  pad[-1] = 0, count * block - e_TS.shape[-2]

  def cut(x):
    return jnp.moveaxis(x.reshape(*x.shape[:-2], count, block, -1), -2, 0)

  e_TS = cut(jnp.pad(e_TS, [*pad, (0, 0)]))
  return start, e_TS, skip, cut(jnp.pad(valid_T, pad)[..., None])


def _before(start, e, skip, valid):
  """(states before each block (J, ..., S), after all (..., S), total (...)).

  The largest state is subtracted from the states after each block; total is the
  sum of what was subtracted.
  """
  if len(e) == 1:  # Blocks of one frame.

    def after(a, x):
      return _step(a, x[0], skip, x[1])

    frames = jnp.moveaxis(e[0], -2, 0), jnp.moveaxis(valid[0], -2, 0)
  else:
    n = _transitions(e, skip, valid)
    from_S, distance_D = jnp.arange(n.shape[-2]), jnp.arange(n.shape[-1])
    # Indices into the states, padded in front with states of probability 0.
    source_SD = from_S[:, None] - distance_D[None] + n.shape[-1] - 1

    def after(a, n):
      pad = [(0, 0)] * (a.ndim - 1) + [(n.shape[-1] - 1, 0)]
      padded = jnp.pad(a, pad, constant_values=_NEVER)
      return jax.nn.logsumexp(padded[..., source_SD] + n, axis=-1)

    frames = jnp.moveaxis(n, -3, 0)

  def normalized(carry, x):
    a, total = carry
    new = after(a, x)
    most = new.max(-1)
    most = jnp.where(most == _NEVER, 0, most)
    return (new - most[..., None], total + most), a

  carry = start, jnp.zeros(start.shape[:-1], start.dtype)
  (last, total), before = jax.lax.scan(normalized, carry, frames)
  return before, last, total


def _transitions(e, skip, valid):
  """n: log-probabilities from s - d before a block to s after, (..., S, D)."""
  nowhere = jnp.full((*e.shape[1:], 2 * len(e) + 1), _NEVER, e.dtype)
  skip = skip[..., None, :, None]

  def frame(n, x):
    e, valid = x
    return _step(n, e[..., None], skip, valid[..., None], (-2, -1)), None

  return jax.lax.scan(frame, nowhere.at[..., 0].set(0), (e, valid))[0]


def _all(start, e, skip, valid):
  """(states after each frame (..., T, S), after all (..., S), total (...)).

  The states of a frame are right up to a constant that is added to all of them.
  The last two results are those of _before. T is that of whole blocks.
  """
  before, last, total = _before(start, e, skip, valid)
  if len(e) == 1:  # The states after a frame are those before the next one.
    states = jnp.concatenate([before[1:], last[None]])
    return jnp.moveaxis(states, 0, -2), last, total

  def frame(a, x):
    a = _step(a, x[0], skip[..., None, :], x[1])
    return a, a

  before = jnp.moveaxis(before, 0, -2)
  states = jnp.moveaxis(jax.lax.scan(frame, before, (e, valid))[1], 0, -2)
  states = states.reshape(*states.shape[:-3], -1, states.shape[-1])
  return states, last, total
