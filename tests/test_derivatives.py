"""Forward mode, reverse mode and their compositions, in the portable form.

tests/kernels/test_triton.py tests the derivatives of the kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sigattn.attention import KINDS, cannot_normalize, dot_product_attention
from sigattn.kernels import xla
from tests.kernels import cases, compare

OPTIONS = [
  {},
  dict(is_causal=True, alibi_slopes=True),
  dict(normalize=True, return_residual=True, bias=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_to_second_order(kind, options):
  """Derivatives by every operand equal finite differences."""
  if options.get("normalize") and cannot_normalize(kind):
    pytest.skip("these are refused")
  case = cases.Case("small", batch=2, queries=3, keys=4, heads=2, width=3)
  arrays = dict(
    zip(("query", "key", "value"), cases.draw(case)[0], strict=True)
  )
  rng = np.random.default_rng(0)
  options = dict(options, kind=kind, local_window_size=(2, 2))
  shapes = dict(key_logit_bias=(2, 1, 4))
  if kind != "softmax":
    shapes |= dict(logit_bias=(2,), query_logit_bias=(2, 3))
  if options.pop("alibi_slopes", False):
    shapes["alibi_slopes"] = (2,)
  if options.pop("bias", False):
    shapes["bias"] = (2, 3, 4)
  for name, shape in shapes.items():
    arrays[name] = rng.uniform(0.5, 1, shape).astype(np.float32)
  if kind in cases.FLAT:
    arrays["logit_bias"] += 8  # far from the jump of the derivative

  def attend(arrays):
    return dot_product_attention(**arrays, **options)

  check_grads(
    attend, (arrays,), order=2, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2,
    eps=1e-2,
  )  # fmt: skip


NAMES = (
  "plain", "vit_197", "one_kv_head", "bias_example_grouped", "causal_cross",
  "alibi_causal_cross", "lengths_cross_grouped", "dense_bias_shared", "silu",
  "normalized_segments", "normalized_vectors", "relu", "relu2_lengths",
  "everything",
)  # fmt: skip


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tangents_equal_float64(name, small_blocks, monkeypatch):
  if small_blocks:
    monkeypatch.setattr(xla, "_TILE", 64)
    monkeypatch.setattr(xla, "_MIN_BLOCK", 5)
  (case,) = [c for c in cases.CASES if c.name == name]
  compare.assert_tangents(case, 5e-6)


def test_a_tangent_of_padding_that_is_nan_leaks_nowhere():
  (case,) = [c for c in cases.CASES if c.name == "lengths"]
  arrays, options, _ = cases.draw(case)
  lengths = (
    options["query_seq_lengths"],
    *[options["key_value_seq_lengths"]] * 2,
  )
  dirty = [x.copy() for x in arrays]
  for x, of_array in zip(dirty, lengths, strict=True):
    for example, length in enumerate(of_array):
      x[example, length:] = np.nan

  def attend(*arrays):
    return dot_product_attention(*arrays, **options)

  wanted = jax.jvp(attend, arrays, arrays)
  found = jax.jvp(attend, dirty, dirty)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("normalize", [False, True])
def test_every_order_of_the_modes_is_one_hessian(normalize):
  case = cases.Case("small", batch=1, queries=3, heads=2, width=2)
  (query, key, value), *_ = cases.draw(case)

  def loss(query):
    out = dot_product_attention(
      query, key, value, normalize=normalize, is_causal=True
    )
    return (out**2).sum()

  wanted = jax.jacfwd(jax.jacfwd(loss))(query)
  for other in (jax.hessian(loss), jax.jacrev(jax.jacrev(loss)),
                jax.jacrev(jax.jacfwd(loss))):  # fmt: skip
    np.testing.assert_allclose(other(query), wanted, rtol=1e-4, atol=1e-6)
  _, linear = jax.linearize(jax.grad(loss), query)
  np.testing.assert_allclose(
    linear(query), (wanted * query[None, None, None, None]).sum((4, 5, 6, 7)),
    rtol=1e-4, atol=1e-6,
  )  # fmt: skip
  assert abs(wanted).max() > 1e-3


def test_a_logit_of_zero_has_one_derivative():
  """relu has a corner there. Both modes use the derivative of the left side."""
  query = key = jnp.zeros((1, 3, 1, 4))
  value = jnp.ones((1, 3, 1, 4))

  def attend(bias):
    return dot_product_attention(
      query, key, value, kind="relu", logit_bias=bias
    ).sum()

  assert jax.grad(attend)(0.0) == jax.jvp(attend, (0.0,), (1.0,))[1] == 0


@pytest.mark.parametrize(
  ("name", "shape"),
  [("logit_bias", (2,)), ("bias", (5, 5)), ("key_logit_bias", (5,)),
   ("alibi_slopes", (2,))],
)  # fmt: skip
def test_each_vmapped_example_has_a_gradient_of_what_all_share(name, shape):
  """vmap adds its axis to the batch, but gradients are not summed over it."""
  case = cases.Case("vmapped", batch=6, queries=5, heads=2, width=4)
  query = jnp.asarray(cases.draw(case)[0][0]).reshape(3, 2, 5, 2, 4)
  rng = np.random.default_rng(0)
  shared = jnp.asarray(rng.uniform(0.5, 1, shape), "float32")

  def attend(x, query):
    return dot_product_attention(query, query, query, **{name: x})

  def gradient(x, query):
    return jax.grad(lambda x: (attend(x, query) ** 2).sum())(x)

  def equal(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)

  wanted = jnp.stack([gradient(shared, x) for x in query])
  equal(jax.vmap(gradient, (None, 0))(shared, query), wanted)
  several = jnp.stack([shared, 2 * shared])
  wanted = jnp.stack([gradient(x, query[0]) for x in several])
  equal(jax.vmap(gradient, (0, None))(several, query[0]), wanted)
  equal(
    jax.jacfwd(attend)(shared, query[0]), jax.jacrev(attend)(shared, query[0])
  )
