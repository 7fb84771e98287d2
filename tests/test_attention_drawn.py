"""Compares random calls of the portable implementation with float64."""

import hypothesis
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from sigattn.kernels import device
from tests.kernels import cases, compare


def maybe(strategy):
  return st.none() | strategy


def subsets(axes):
  return maybe(st.lists(st.sampled_from(axes), unique=True).map(sorted)).map(
    lambda chosen: tuple(chosen) if chosen else None
  )


@st.composite
def calls(draw):
  """Draws a Case of any sizes and options."""
  kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
  kind = draw(st.sampled_from(["sigmoid", "relu", "relu2"]))
  per_head = draw(maybe(st.sampled_from([("N",), ("B", "N")])))
  return cases.Case(
    "drawn",
    batch=draw(st.integers(1, 3)),
    queries=draw(st.integers(1, 48)),
    keys=draw(maybe(st.integers(1, 48))),
    heads=kv_heads * group,
    kv_heads=kv_heads,
    width=draw(st.sampled_from([1, 2, 4, 8, 16])),
    kind=kind,
    bias_per_head=per_head,
    logit_bias=None if per_head else draw(maybe(st.floats(-16, 2))),
    scale=draw(maybe(st.floats(0.1, 1))),
    causal=draw(st.booleans()),
    window=draw(maybe(st.tuples(st.integers(0, 30), st.integers(0, 30)))),
    alibi=draw(st.booleans()),
    lengths=draw(st.booleans()),
    segments=draw(st.booleans()),
    mask=draw(subsets([0, 1, 2, 3])),
    bias=draw(subsets([0, 1, 2, 3])),
  )


@pytest.fixture(autouse=True)
def portable(monkeypatch):
  compare.use_only(monkeypatch, "xla", device.current())


@hypothesis.settings(
  derandomize=True,
  database=None,
  deadline=None,
  max_examples=50,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  case=calls(),
  dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
  seed=st.integers(0, 2**32 - 1),
)
def test_a_drawn_call_equals_float64(case, dtype, seed):
  arrays, options, cotangent = cases.draw(case, dtype, seed)
  found = compare.run(arrays, options, cotangent)
  wanted = cases.exact(case, arrays, options, cotangent)
  assert found.keys() == wanted.keys()
  if dtype == "float32":
    for name, value in wanted.items():
      assert compare.error(found[name], value) < 2e-6, name
    return
  plain = compare.plain_16_bit(case, arrays, options, cotangent)
  unit = float(jnp.finfo(dtype).eps)
  for name, value in wanted.items():
    theirs = compare.error(plain[name], value) if name in plain else unit
    assert compare.error(found[name], value) <= 2 * theirs + 0.2 * unit, name
