"""Compares an implementation of attention with NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn import attention
from sigattn.kernels import device, dispatch, triton
from sigattn.kernels.problem import FLOAT8, Operands
from sigattn.kernels.triton import decode
from tests.kernels import cases

WITH_GRADIENT = (
  "logit_bias", "alibi_slopes", "bias", "query_logit_bias", "key_logit_bias",
)  # fmt: skip


def run(arrays, options, cotangent):
  """The output ("out") and the gradients of the operation, by name."""
  arrays = dict(zip(("query", "key", "value"), arrays, strict=True))
  given = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
  static = {k: v for k, v in options.items() if k not in given}
  arrays |= {k: given.pop(k) for k in WITH_GRADIENT if k in given}

  @jax.jit  # Much faster than compiling each operation separately.
  def f(arrays, given, cotangent):
    def attend(arrays):
      return attention.dot_product_attention(**arrays, **given, **static)

    out, pullback = jax.vjp(attend, arrays)
    return {"out": out, **pullback(cotangent)[0]}

  return f(arrays, given, cotangent)


def run_or_skip(arrays, options, cotangent):
  """Calls run, or skips the test if the implementation refuses the problem."""
  try:
    return run(arrays, options, cotangent)
  except NotImplementedError as reason:
    return pytest.skip(str(reason))


def use_only(monkeypatch, name, card):
  """Makes `name` the only implementation, and `card` the current device."""
  module = dispatch.IMPLEMENTATIONS[name]
  monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", {name: module})
  monkeypatch.setattr(device, "current", lambda: card)
  dispatch._choose.cache_clear()


def error(actual, expected):
  """Root mean square of the difference, relative to that of `expected`."""
  actual, expected = (
    np.asarray(actual, np.float64),
    np.asarray(expected, np.float64),
  )
  assert actual.shape == expected.shape
  size = np.sqrt(np.mean(expected**2))
  return np.sqrt(np.mean((actual - expected) ** 2)) / (size or 1.0)


def assert_float32(case, bound):
  arrays, options, cotangent = cases.draw(case)
  expected = cases.exact(case, arrays, options, cotangent)
  actual = run_or_skip(arrays, options, cotangent)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    found = error(actual[name], value)
    assert found < bound, f"{name}: {found:.1e}, must be below {bound:.1e}"


def assert_tangents(case, bound, dtype="float32"):
  """Compares derivatives along each operand with gradients in float64.

  Both give the sum of cotangent * (derivative along a tangent). The error is
  relative to the sum of the absolute values of its terms.
  """
  arrays, options, cotangent = cases.draw(case, dtype)
  expected = cases.exact(case, arrays, options, cotangent)
  arrays = dict(zip(("query", "key", "value"), arrays, strict=True))
  arrays |= {k: options.pop(k) for k in WITH_GRADIENT if k in expected}
  rng = np.random.default_rng(1)
  tangents = {
    name: rng.standard_normal(x.shape).astype(x.dtype)
    for name, x in arrays.items()
  }

  @functools.partial(jax.jit, static_argnums=0)
  def along(name, tangent):
    def attend(x):
      return attention.dot_product_attention(**arrays | {name: x}, **options)

    return jax.jvp(attend, (arrays[name],), (tangent,))[1]

  for name, tangent in tangents.items():
    found, tangent, d_out = (
      np.asarray(x, np.float64)
      for x in (along(name, tangent), tangent, cotangent)
    )
    terms, products = d_out * found, tangent * expected[name]
    size = max(abs(terms).sum(), abs(products).sum())
    assert abs(terms.sum() - products.sum()) < bound * size, name
    assert abs(products).sum() > 0, name


def plain_16_bit(case, arrays, options, cotangent):
  """Attention as a user would write it in jnp, with weights in 16 bits."""
  seen = jnp.asarray(cases.visible(case, options))
  b, t, s, n, kv, h = case.shape
  scale = h**-0.5 if case.scale is None else case.scale
  length = case.n or s
  activation = {
    "sigmoid": jax.nn.sigmoid,
    "relu": lambda z: jax.nn.relu(z) / length,
    "relu2": lambda z: jax.nn.relu(z) ** 2 / length,
    "silu": lambda z: jax.nn.silu(z) / length,
  }[case.kind]
  offset = options["logit_bias"]
  if offset is None:
    offset = -np.log(length) if case.kind == "sigmoid" else 0.0
  extra = np.zeros((b, n, t, s), np.float32)
  extra += np.asarray(offset).reshape(*np.shape(offset), 1, 1)
  if case.bias:
    extra += options["bias"]
  extra += cases.vectors(options)
  if case.alibi:
    distance = cases.distance(case, options)
    extra -= options["alibi_slopes"][:, None, None] * distance

  def f(q, k, v):
    k, v = (jnp.repeat(x, n // kv, axis=2) for x in (k, v))
    z = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    p = jnp.where(seen, activation(z * scale + extra), 0)
    if case.normalize:
      sums = p.sum(-1, keepdims=True)
      p = p / jnp.where(sums > 0, sums, 1)
    p = p.astype(q.dtype)
    return jnp.einsum("bnts,bsnh->btnh", p, v)

  out, pullback = jax.vjp(f, *map(jnp.asarray, arrays))
  grads = pullback(jnp.asarray(cotangent))
  return dict(zip(("out", "query", "key", "value"), (out, *grads), strict=True))


def assert_16_bit(case, dtype):
  """The kernel's error is at most twice that of plain_16_bit."""
  arrays, options, cotangent = cases.draw(case, dtype)
  actual = run_or_skip(arrays, options, cotangent)
  expected = cases.exact(case, arrays, options, cotangent)
  plain = plain_16_bit(case, arrays, options, cotangent)
  unit = float(jnp.finfo(dtype).eps)
  for name, value in expected.items():
    # Gradients of operands are float32, but may have the error of 16 bits.
    allowed = error(plain[name], value) if name in plain else unit
    found, bound = error(actual[name], value), 2 * allowed + 0.2 * unit
    assert found <= bound, f"{name}: {found:.1e}, must be at most {bound:.1e}"


def assert_a_gate_in_16_bits_has_an_exact_gradient(dtype):
  """The errors of the rows must not add up over the tokens of a forget gate."""
  rng = np.random.default_rng(0)
  *qkv, cotangent = rng.standard_normal((4, 1, 64, 2, 16), "float32")
  qkv = [jnp.asarray(x, dtype) for x in qkv]
  logits_NT = rng.standard_normal((2, 64), "float32")

  def gradient(dtype):
    def loss(bias):
      total_NT = jax.nn.log_sigmoid(logits_NT + bias).cumsum(1)
      out = attention.dot_product_attention(
        *(x.astype(dtype) for x in qkv), normalize=True, is_causal=True,
        query_logit_bias=total_NT, key_logit_bias=-total_NT,
        paired_biases=True,
      )  # fmt: skip
      return (out * cotangent).sum()

    return jax.jit(jax.grad(loss))(jnp.zeros((2, 1)))

  found = error(gradient(dtype), gradient("float32"))
  assert found < jnp.finfo(dtype).eps, found


def assert_nan_in_padding_leaks_nowhere(name, width=8, dtype="float32"):
  (case,) = [c for c in cases.CASES if c.name == name]
  case = dataclasses.replace(case, width=width)
  arrays, options, cotangent = cases.draw(case, dtype)
  clean = run(arrays, options, cotangent)
  dirty = [x.copy() for x in arrays]
  cotangent = cotangent.copy()
  for example in range(case.batch):
    queries = options["query_seq_lengths"][example]
    keys = options["key_value_seq_lengths"][example]
    dirty[0][example, queries:] = cotangent[example, queries:] = np.nan
    dirty[1][example, keys:] = dirty[2][example, keys:] = np.nan
  actual = run(dirty, options, cotangent)
  for name, value in clean.items():
    np.testing.assert_array_equal(actual[name], value, name)


def rounded(x):
  """The nearest numbers of float8_e4m3fn."""
  return np.clip(x, -448, 448).astype(FLOAT8)


def assert_new_token_is_rounded(page):
  """The decode kernel writes the key and the value of a new token in 8 bits.

  Numbers beyond the range become the largest one, and NaN stays NaN. page: the
  length of the pages, or None.
  """
  rng = np.random.default_rng(0)
  qkv = 100 * rng.standard_normal((2, 1, 6, 8), np.float32)
  qkv[0, 0, 4] = 449, 465, 1e9, -1e9, np.inf, -np.inf, np.nan, 2.0**-9
  shape = (4, page, 1, 8) if page else (2, 32, 1, 8)
  key, value = rounded(rng.standard_normal((2, *shape), np.float32))
  places = jnp.array([20, 3])
  query, whole = (jax.ShapeDtypeStruct(x, "float32")
                  for x in ((2, 1, 4, 8), (2, 32, 1, 8)))  # fmt: skip
  operands = Operands(query_offset=places)
  problem = attention.problem_of(
    query, whole, whole, operands, kind="sigmoid", scale=1.0, logit_bias=0.0,
    normalizer=1.0, is_causal=True, window=None,
  )  # fmt: skip
  problem = dataclasses.replace(problem, key_dtype=FLOAT8)
  new = decode.New(triton.counters(problem, paged=bool(page)))
  table = jnp.array([[2, 0], [3, 1]]) if page else None
  extended = jax.jit(functools.partial(triton.extended, problem, new))
  _, *cached, _ = extended(qkv, key, value, operands, table)
  for before, after, token in zip(
    (key, value), cached, (qkv[:, 0, 4], qkv[:, 0, 5]), strict=True
  ):
    before = before.astype(np.float32).reshape(-1, 8)
    # Row 0 has slot 20, which is the fifth one of its second page.
    for row, slot in enumerate([4, 51] if page else [20, 35]):
      before[slot] = rounded(token[row]).astype(np.float32)
    after = np.asarray(after, np.float32).reshape(-1, 8)
    np.testing.assert_array_equal(after, before)
