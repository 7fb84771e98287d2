"""The bounds and the universal model, on random and adversarial inputs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.analysis import theory

T, D = 6, 4
CAUSAL = jnp.tril(jnp.ones((T, T), bool))
BOUNDS = {"sigmoid": theory.sigmoid_bound, "softmax": theory.softmax_bound}


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("mask_TT", [None, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("kind", BOUNDS)
def test_no_input_exceeds_the_bound(kind, mask_TT, num_heads):
  @jax.jit
  @jax.vmap
  def norm_and_bound(heads, x_TD):
    attend = functools.partial(theory.attend, heads, kind=kind, mask_TT=mask_TT)
    bound = BOUNDS[kind](heads, x_TD, mask_TT=mask_TT)
    return theory.jacobian_norm(attend, x_TD), bound

  heads, xs = [], []
  for seed in range(8):
    key = jax.random.key(seed)
    inputs = theory.inputs(key, T, D).values()
    random_heads = theory.random_heads(key, num_heads, D, D // num_heads)
    heads += [random_heads] * len(inputs)
    xs += list(inputs)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *heads)
  norms, bounds = norm_and_bound(stacked, jnp.stack(xs))
  assert (norms <= 1.0001 * bounds).all()
  assert (norms / bounds).max() > 0.3


def test_equal_tokens_reach_the_bound_of_sigmoid():
  heads, x_TD = theory.identity(D), jnp.full((T, D), 0.4)
  exact = theory.jacobian_norm(functools.partial(theory.attend, heads), x_TD)
  assert float(exact) == pytest.approx(
    float(theory.sigmoid_bound(heads, x_TD)), rel=1e-5
  )


@pytest.mark.parametrize("kind", BOUNDS)
def test_jacobian_norm_is_the_steepest_finite_difference(kind):
  heads = theory.random_heads(jax.random.key(0), 2, D, 2)
  x_TD = jax.random.normal(jax.random.key(1), (T, D))
  attend = jax.jit(functools.partial(theory.attend, heads, kind=kind))
  norm = float(theory.jacobian_norm(attend, x_TD))
  step = jax.random.normal(jax.random.key(2), (T, D))
  # Power iteration: finite differences forward, the transpose backward.
  _, pullback = jax.vjp(attend, x_TD)
  for _ in range(30):
    step = step / jnp.linalg.norm(step)
    change = (attend(x_TD + 1e-2 * step) - attend(x_TD - 1e-2 * step)) / 2e-2
    (step,) = pullback(change)
  assert float(jnp.linalg.norm(change)) == pytest.approx(norm, rel=5e-3)


def test_bound_is_flat_in_n_with_the_default_bias_and_linear_without():
  heads = theory.identity(D)
  one_D = jnp.full((D,), 0.3)

  def bound(n, logit_bias):
    x_TD = jnp.broadcast_to(one_D, (n, D))
    return float(theory.sigmoid_bound(heads, x_TD, logit_bias))

  assert bound(4096, None) == pytest.approx(bound(64, None), rel=0.05)
  assert bound(4096, 0.0) == pytest.approx(64 * bound(64, 0.0), rel=1e-3)


@pytest.mark.parametrize(
  ("kind", "logit_bias"),
  [("sigmoid", None), ("sigmoid", 0.0), ("softmax", None)],
)
def test_worst_case_beats_random_inputs_and_keeps_to_the_ball_bound(
  kind, logit_bias
):
  n, radius = 5, 1.5
  worst = theory.worst_case(kind, n, 2, radius, logit_bias, jax.random.key(0))
  assert worst <= 1.0001 * theory.ball_bound(kind, n, radius, logit_bias)
  heads = theory.identity(2)

  @jax.jit
  @jax.vmap
  def norm(x_TD):
    size_T1 = jnp.linalg.norm(x_TD, axis=-1, keepdims=True)
    attend = functools.partial(
      theory.attend, heads, kind=kind, logit_bias=logit_bias
    )
    return theory.jacobian_norm(attend, radius * x_TD / size_T1)

  random = norm(jax.random.normal(jax.random.key(1), (500, n, 2)))
  assert worst > 0.999 * random.max()
  assert worst > 1.05 * jnp.median(random)


def test_ball_bound_is_the_largest_of_the_bounds_in_the_ball():
  rng = np.random.default_rng(0)
  heads = theory.identity(2)
  for kind, bound in BOUNDS.items():
    limit = theory.ball_bound(kind, T, 1.2)
    for _ in range(20):
      x_TD = rng.normal(size=(T, 2))
      x_TD *= 1.2 / np.linalg.norm(x_TD, axis=1, keepdims=True)
      assert bound(heads, jnp.float32(x_TD)) <= 1.0001 * limit
  equal_TD = jnp.full((T, 2), 1.2 / math.sqrt(2))
  bound = float(theory.sigmoid_bound(heads, equal_TD))
  assert bound <= 1.0001 * theory.ball_bound("sigmoid", T, 1.2)
  assert bound > 0.8 * theory.ball_bound("sigmoid", T, 1.2)


def test_scaled_sigmoid_goes_to_the_exponential_with_the_stated_gap():
  u = np.linspace(-8, 8, 33)
  for n in (1, 10, 10_000):
    scaled = theory.scaled_sigmoid(u, n)
    sigmoid = np.float64(jax.nn.sigmoid(jnp.float32(u - math.log(n))))
    np.testing.assert_allclose(scaled, n * sigmoid, rtol=2e-5)
    gap = theory.scaled_sigmoid_gap(u, n)
    np.testing.assert_allclose(np.exp(u) - scaled, gap, rtol=1e-6, atol=1e-9)
    assert (gap <= np.exp(2 * u) / n).all()
    assert (gap > 0).all()


def test_universal_model_is_equivariant_and_learns():
  model, errors = theory.fit(
    theory.TARGETS["x - mean"], length=4, depth=1, steps=300, batch=64
  )
  assert errors[-50:].mean() < 0.35 < errors[0]
  x_BTD = jax.random.uniform(jax.random.key(5), (2, 4, 4))
  order = jnp.array([2, 0, 3, 1])
  np.testing.assert_allclose(
    model(x_BTD)[:, order], model(x_BTD[:, order]), rtol=1e-4, atol=1e-5
  )
  for target in theory.TARGETS.values():
    y_BTD = target(x_BTD)
    assert y_BTD.shape == x_BTD.shape
    np.testing.assert_allclose(
      y_BTD[:, order], target(x_BTD[:, order]), rtol=1e-5, atol=1e-6
    )
