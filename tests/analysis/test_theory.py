"""Tests the bounds and the universal model on random and adversarial inputs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn import attention
from sigattn.analysis import theory

T, D = 6, 4
CAUSAL = jnp.tril(jnp.ones((T, T), bool))
BOUNDS = {"sigmoid": theory.sigmoid_bound, "softmax": theory.softmax_bound}
# {name: (arguments of attend, bound)}
FORMS = {kind: ({"kind": kind}, bound) for kind, bound in BOUNDS.items()} | {
  f"normalised, b = {b}": (
    {"kind": "sigmoid", "normalize": True, "logit_bias": b},
    functools.partial(theory.normalized_bound, logit_bias=b),
  )
  for b in (None, 0.0)
}


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("mask_TT", [None, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("form", FORMS)
def test_no_input_exceeds_the_bound(form, mask_TT, num_heads):
  options, bound = FORMS[form]

  @jax.jit
  @jax.vmap
  def norm_and_bound(heads, x_TD):
    attend = functools.partial(theory.attend, heads, mask_TT=mask_TT, **options)
    limit = bound(heads, x_TD, mask_TT=mask_TT)
    return theory.jacobian_norm(attend, x_TD), limit

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


@pytest.mark.parametrize(
  "options", [x for x, _ in FORMS.values()], ids=FORMS.keys()
)
def test_jacobian_norm_is_the_steepest_finite_difference(options):
  heads = theory.random_heads(jax.random.key(0), 2, D, 2)
  x_TD = jax.random.normal(jax.random.key(1), (T, D))
  attend = jax.jit(functools.partial(theory.attend, heads, **options))
  norm = float(theory.jacobian_norm(attend, x_TD))
  step = jax.random.normal(jax.random.key(2), (T, D))
  # Power iteration. Forward it uses finite differences, backward the transpose.
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
  ("kind", "logit_bias", "normalize"),
  [
    ("sigmoid", None, False),
    ("sigmoid", 0.0, False),
    ("sigmoid", 0.0, True),
    ("softmax", None, False),
  ],
)
def test_worst_case_beats_random_inputs_and_keeps_to_the_ball_bound(
  kind, logit_bias, normalize
):
  n, radius = 5, 1.5
  worst = theory.worst_case(
    kind, n, 2, radius, logit_bias, jax.random.key(0), normalize=normalize
  )
  limit = theory.ball_bound(kind, n, radius, logit_bias, normalize)
  assert worst <= 1.0001 * limit
  heads = theory.identity(2)

  @jax.jit
  @jax.vmap
  def norm(x_TD):
    size_T1 = jnp.linalg.norm(x_TD, axis=-1, keepdims=True)
    attend = functools.partial(
      theory.attend, heads, kind=kind, logit_bias=logit_bias,
      normalize=normalize,
    )  # fmt: skip
    return theory.jacobian_norm(attend, radius * x_TD / size_T1)

  random = norm(jax.random.normal(jax.random.key(1), (500, n, 2)))
  assert worst > 0.999 * random.max()
  assert worst > 1.05 * jnp.median(random)


def test_ball_bound_is_above_the_bounds_in_the_ball():
  rng = np.random.default_rng(0)
  heads = theory.identity(2)
  for options, bound in FORMS.values():
    limit = theory.ball_bound(length=T, radius=1.2, **options)
    for _ in range(20):
      x_TD = rng.normal(size=(T, 2))
      x_TD *= 1.2 / np.linalg.norm(x_TD, axis=1, keepdims=True)
      assert bound(heads, jnp.float32(x_TD)) <= 1.0001 * limit
  equal_TD = jnp.full((T, 2), 1.2 / math.sqrt(2))
  bound = float(theory.sigmoid_bound(heads, equal_TD))
  assert bound <= 1.0001 * theory.ball_bound("sigmoid", T, 1.2)
  assert bound > 0.8 * theory.ball_bound("sigmoid", T, 1.2)


# The statements of docs/theory.md on normalised sigmoid.


def test_normalised_ball_bound_lies_between_the_mean_and_softmax():
  for n, radius in ((5, 0.6), (400, 1.0), (400, 2.0)):
    bounds = [
      theory.ball_bound("sigmoid", n, radius, b, True) for b in range(-30, 31)
    ]
    assert (np.diff(bounds) <= 1e-12).all()
    softmax = theory.ball_bound("softmax", n, radius)
    assert bounds[0] == pytest.approx(softmax, rel=1e-6)
    assert bounds[-1] == pytest.approx(1, rel=1e-6)
  # If n exceeds the largest ratio of two weights, the bound does not grow.
  large = [
    theory.ball_bound("sigmoid", n, 1.0, -5.0, True) for n in (10, 10**6)
  ]
  assert large[0] == pytest.approx(large[1])


def test_rows_in_two_groups_come_near_the_ball_bound():
  """It does grow with sqrt(min(n, r)); see section 3 of docs/theory.md."""
  radius, eye = 1.2, jnp.eye(2)[None]
  heads = theory.Heads(-eye, eye, eye, eye)
  for b, n, few in ((-20.0, 20, 1), (0.0, 20, 4)):
    x_TD = jnp.zeros((n, 2)).at[:, 0].set(radius)
    x_TD = x_TD.at[:few, 0].set(-radius)
    attend = functools.partial(
      theory.attend, heads, logit_bias=b, normalize=True
    )
    ratio = (1 + math.exp(radius**2 - b)) / (1 + math.exp(-(radius**2) - b))
    norm = theory.jacobian_norm(attend, x_TD)
    assert norm >= 0.49 * math.sqrt(ratio)
    assert norm <= theory.ball_bound("sigmoid", n, radius, b, True)


def test_theorem_2_does_not_hold_for_normalised_rows_but_its_form_does():
  heads = theory.identity(D)
  zero_TD = jnp.zeros((T, D))
  attend = functools.partial(
    theory.attend, heads, logit_bias=-5.0, normalize=True
  )
  assert theory.jacobian_norm(attend, zero_TD) == pytest.approx(1.0, rel=1e-5)
  assert theory.sigmoid_bound(heads, zero_TD, -5.0) < 0.05
  for x_TD in theory.inputs(jax.random.key(0), T, D).values():
    weights = attention.attention_weights(
      *(x_TD[None, :, None],) * 2, scale=1, logit_bias=-1.0, normalize=True
    )
    share = T * weights.weights_BNTS.max()
    slope = jax.nn.sigmoid(-weights.logits_BNTS).max()
    square = (x_TD**2).sum(-1).mean()
    form = jnp.sqrt(share) + 2 * slope * share * square
    bound = theory.normalized_bound(heads, x_TD, -1.0)
    assert bound <= 1.0001 * form


@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_and_jacobian_go_to_softmax_as_the_bias_falls(is_causal):
  x_TD = 0.9 * jax.random.normal(jax.random.key(0), (T, D))
  mask_TT = CAUSAL if is_causal else jnp.ones((T, T), bool)
  radius = float(jnp.linalg.norm(x_TD, axis=1).max())

  def weights(**options):
    return attention.attention_weights(
      *(x_TD[None, :, None],) * 2, scale=1, mask=mask_TT, **options
    )

  def jacobian(**options):
    attend = functools.partial(
      theory.attend, theory.identity(D), mask_TT=mask_TT, **options
    )
    return jax.jacrev(attend)(x_TD).reshape(T * D, T * D)

  softmax = weights(kind="softmax")
  p_TT = softmax.weights_BNTS[0, 0]
  logits_TT = softmax.logits_BNTS[0, 0]
  exact = jacobian(kind="softmax")
  largest = float(jnp.where(mask_TT, logits_TT, -jnp.inf).max())
  for small in (0.3, 0.03, 0.003):
    b = math.log(small) - largest  # so that e^(max u + b) is `small`
    options = dict(kind="sigmoid", normalize=True, logit_bias=b)
    gap_TT = weights(**options).weights_BNTS[0, 0] - p_TT
    assert (abs(gap_TT) <= small * p_TT + 1e-6).all()
    gap = jnp.linalg.norm(jacobian(**options) - exact, 2)
    root = math.sqrt(T)
    assert gap <= small * (root + 3 * radius**2 * (1 + root))
    # The first order of the gap is proportional to e^b.
    mean_T1 = (p_TT * jnp.exp(logits_TT)).sum(-1, keepdims=True)
    first_TT = p_TT * (mean_T1 - jnp.exp(logits_TT)) * math.exp(b)
    np.testing.assert_allclose(gap_TT, first_TT, atol=small**2 + 1e-6)


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
