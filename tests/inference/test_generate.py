"""Generating text: the cache against the full forward pass, and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.inference import generate
from sigattn.training import setup
from tests.tasks.small_lm import (
  ALIBI,
  SINES,
  V,
  compiled,
  logits,
  make,
  small,
  tokens,
)


@pytest.mark.parametrize(
  ("kind", "values"),
  [
    ("sigmoid", {}),
    ("softmax", {}),
    ("sigmoid", ALIBI),
    ("softmax", ALIBI),
    ("sigmoid", SINES),
    ("sigmoid", {"attn.normalize": True}),
    ("sigmoid", ALIBI | {"attn.window": 5}),
    ("softmax", {"attn.window": 3}),
    ("silu", {}),
  ],
)
def test_decoding_equals_the_full_forward_pass(kind, values):
  config = small(depth=2, **{"attn.kind": kind, **values})
  model = make(config)
  prompts = [tokens(11)[:n] for n in (11, 4)]
  length, count = 11, 6
  token_BT = np.stack([np.pad(x, (length - len(x), 0)) for x in prompts])
  start_B = np.array([length - len(x) for x in prompts], np.int32)
  forced_BT = tokens(2, count, seed=3)

  def run(model, token_BT, start_B, forced_BT):
    state = generate.prefill(
      model, token_BT, start_B, length + count, jax.random.key(0)
    )
    logits_BTV, cache = [state.logits_BV], state.cache
    for i in range(count):
      logits_BV, cache = model.decode(
        forced_BT[:, i], cache, length + i, start_B
      )
      logits_BTV.append(logits_BV)
    return jnp.stack(logits_BTV, axis=1)

  logits_BTV = compiled(run, model, token_BT, start_B, forced_BT)
  for i, prompt in enumerate(prompts):
    whole = np.concatenate([prompt, forced_BT[i]])
    full = logits(model, whole[None])[0, len(prompt) - 1 :]
    np.testing.assert_allclose(logits_BTV[i], full, rtol=2e-4, atol=2e-4)


def test_generator_continues_a_batch_as_each_alone_and_streams_the_same():
  config = small(**ALIBI)  # By chance, it does not end its text.
  _, params = setup.init(config)
  generator = generate.Generator(config, params)
  prompts = ["And God said, ", "Let"]
  texts = generator(prompts, max_tokens=32, temperature=0)
  assert len(texts[0]) == 32
  alone = [generator([x], max_tokens=32, temperature=0)[0] for x in prompts]
  assert texts == alone
  pieces = list(generator.stream(prompts[0], max_tokens=32, temperature=0))
  assert len(pieces) == 3
  assert "".join(pieces) == texts[0]
  drawn = [generator(prompts, max_tokens=32, seed=s)[0] for s in (0, 0, 1)]
  assert drawn[0] == drawn[1] != drawn[2]
  with pytest.raises(ValueError, match=r"temperature=-1"):
    generator(prompts, temperature=-1)
  with pytest.raises(ValueError, match="characters"):
    generator(["Ω"])


def test_a_row_that_has_ended_stays_so_and_all_ended_stop_the_loop():
  class Counter:
    """Its next token is the number of the slot; its cache counts the calls."""

    def decode(self, token_B, cache, place, start_B):
      del token_B
      next_B = jnp.minimum(place + 1 - start_B, V - 1)
      return jax.nn.one_hot(next_B, V), cache + 1

  state = generate.State(
    place=jnp.int32(3),
    start_B=jnp.array([0, 2]),
    logits_BV=jax.nn.one_hot(jnp.array([3, 1]), V),
    cache=jnp.int32(0),
    done_B=jnp.zeros(2, bool),
    rng=jax.random.key(0),
  )
  greedy = generate.Sampling(temperature=0)
  token_BT, last = generate.decode(Counter(), state, 9, greedy, V, end=5)
  np.testing.assert_array_equal(
    token_BT, [[3, 4, 5, 5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 5, 5, 5, 5]]
  )
  assert last.done_B.all()
  assert last.cache == 5  # calls, not 9


def test_top_k_and_top_p_keep_what_they_say():
  p = np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]], np.float32)

  def kept(**options):
    kept_BV = generate.keep(jnp.log(p), generate.Sampling(**options))
    return np.isfinite(kept_BV).sum(1).tolist()

  assert kept(top_k=2) == [2, 2]
  assert kept(top_k=9) == [4, 4]
  assert kept(top_p=0.5) == [1, 1]
  assert kept(top_p=0.79) == [2, 2]
  assert kept(top_p=0.81) == [3, 3]
  assert kept(top_k=3, top_p=0.9) == [3, 3] != kept(top_k=3, top_p=0.8)
  kept_BV = generate.keep(jnp.log(p), generate.Sampling(top_k=2))
  assert np.isfinite(kept_BV).tolist()[0] == [True, True, False, False]


def test_draws_follow_the_probabilities():
  p = np.array([0.6, 0.3, 0.1], np.float32)
  logits_BV = jnp.tile(jnp.log(p), (4000, 1))
  for temperature in (1.0, 0.5):
    drawn = generate.sample(
      jax.random.key(0), logits_BV, generate.Sampling(temperature)
    )
    share = np.bincount(drawn, minlength=3) / 4000
    expected = p ** (1 / temperature)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.03)
