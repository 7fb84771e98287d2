"""The cross-entropy in chunks equals optax's with the whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sigattn.tasks.cross_entropy import linear_cross_entropy

B, T, D, V = 2, 12, 8, 50


def arguments(dtype="float32", scale=1.0):
  """x, embed, target and weight; some tokens do not count."""
  rng = np.random.default_rng(0)
  x = scale * rng.standard_normal((B, T, D))
  embed = rng.standard_normal((V, D))
  target = rng.integers(0, V, (B, T))
  weight = rng.uniform(0, 2, (B, T)) * (rng.uniform(size=(B, T)) < 0.7)
  return (
    jnp.asarray(x, dtype), jnp.asarray(embed, "float32"), jnp.asarray(target),
    jnp.asarray(weight, "float32"),
  )  # fmt: skip


def by_optax(x, embed, target, weight):
  logits = jnp.einsum(
    "BTD,VD->BTV", x, embed, precision="highest",
    preferred_element_type=x.dtype,
  )  # fmt: skip
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
  return (weight * nats).sum(), nats, logits.argmax(-1) == target


# A scale of 300 gives logits of several thousand, whose exponentials overflow
# float32.
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("chunks", [1, 4, 12])
def test_equals_optax_in_float64(chunks, scale):
  x, embed, target, weight = arguments(scale=scale)
  with jax.enable_x64(True):
    exact = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, embed, weight)]
    value, pull_back, (nats, correct) = jax.vjp(
      lambda x, e, w: (lambda t, *rest: (t, rest))(*by_optax(x, e, target, w)),
      *exact,
      has_aux=True,
    )
    exact = value, nats, correct, *pull_back(jnp.float64(0.5))
    value, nats, correct, *gradients = jax.device_get(exact)

  def ours(x, embed, weight):
    return linear_cross_entropy(x, embed, target, weight, chunks)

  scored, pull_back = jax.vjp(jax.jit(ours), x, embed, weight)
  zeros = jax.tree.map(jnp.zeros_like, scored)
  # This is the only cotangent that booleans have.
  none = np.zeros(scored.correct_BT.shape, jax.dtypes.float0)
  cotangents = zeros._replace(total=jnp.float32(0.5), correct_BT=none)
  np.testing.assert_allclose(scored.total, value, rtol=1e-6)
  np.testing.assert_allclose(scored.nats_BT, nats, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(scored.correct_BT, correct)
  for found, wanted in zip(pull_back(cotangents), gradients, strict=True):
    size = np.sqrt(np.mean(wanted**2))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("chunks", [1, 4])
def test_capped_logits_and_their_gradients(chunks):
  x, embed, target, weight = arguments(scale=5.0)

  def plain(x, embed):
    logits = 3 * jnp.tanh(jnp.einsum("BTD,VD->BTV", x, embed) / 3)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return (weight * nats).sum()

  def ours(x, embed):
    return linear_cross_entropy(x, embed, target, weight, chunks, 3.0).total

  found, wanted = (
    jax.value_and_grad(f, (0, 1))(x, embed) for f in (ours, plain)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    found,
    wanted,
  )


def test_nats_alone_have_no_gradient():
  x, embed, target, weight = arguments()
  gradient = jax.grad(
    lambda x: linear_cross_entropy(x, embed, target, weight).nats_BT.sum()
  )(x)
  assert not gradient.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_rounded_only_in_products(dtype):
  x, embed, target, weight = arguments(dtype)
  embed = embed.astype(dtype).astype("float32")

  def gradients(x):
    def total(x, embed):
      return linear_cross_entropy(x, embed, target, weight, 3).total

    return jax.value_and_grad(total, (0, 1))(x, embed)

  value, (d_x, d_embed) = gradients(x)
  wanted, (wanted_x, wanted_embed) = gradients(x.astype("float32"))
  assert (d_x.dtype, d_embed.dtype) == (dtype, "float32")
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  unit = jnp.finfo(dtype).eps
  for found, exact in ((d_x, wanted_x), (d_embed, wanted_embed)):
    error = np.linalg.norm(np.asarray(found, "float32") - exact)
    assert error < unit * np.linalg.norm(exact)


def test_whole_logits_are_never_held():
  """No device's program for the loss or its gradient has the whole logits."""
  x, embed, target, weight = arguments()
  text = str(
    jax.make_jaxpr(
      jax.grad(
        lambda x: linear_cross_entropy(x, embed, target, weight, 4).total
      )
    )(x)
  )
  assert f"f32[{B},{T // 4},{V}]" in text
  assert f"{B},{T},{V}]" not in text
  assert f"4,{B},{T // 4},{V}]" not in text


@pytest.mark.parametrize("chunks", [0, 5, 24, -1])
def test_chunks_must_divide_the_row(chunks):
  with pytest.raises(ValueError, match=f"chunks={chunks}; must divide the 12"):
    linear_cross_entropy(*arguments(), chunks)
