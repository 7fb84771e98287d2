"""The portable forms equal float64, and the right implementation is chosen."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention as benchmark
from sigattn import attention
from sigattn.kernels import dispatch, xla
from sigattn.kernels import problem as problems
from sigattn.kernels.problem import ACTIVATIONS, make_problem
from tests.kernels import cases, compare

FORMS = ("reference", "xla", "xla in small blocks")


@pytest.fixture
def use(monkeypatch):
  """Makes attention use one of FORMS."""

  def set_form(form):
    if form == "reference":
      monkeypatch.setattr(xla, "attention", xla.reference)
    elif form == "xla in small blocks":
      monkeypatch.setattr(xla, "_TILE", 64)
      monkeypatch.setattr(xla, "_MIN_BLOCK", 5)

  return set_form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_output_and_gradients_equal_float64(case, form, use):
  use(form)
  compare.assert_float32(case, 2e-6)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("case", cases.ARBITRARY, ids=str)
def test_arbitrary_cases_equal_float64(case, form, use):
  use(form)
  # The terms of a slope's gradient may be ten times as large as their sum.
  compare.assert_float32(case, 6e-6)


def test_every_kind_has_cases():
  assert {case.kind for case in cases.CASES} == {*ACTIVATIONS}


@pytest.mark.parametrize("form", FORMS[:2])
def test_a_kind_without_a_branch_is_an_error(form, use, monkeypatch):
  """It must not compute another kind, and the oracle must not agree."""
  use(form)
  monkeypatch.setattr(problems, "ACTIVATIONS", (*ACTIVATIONS, "new"))
  monkeypatch.setattr(attention, "KINDS", (*attention.KINDS, "new"))
  case = cases.Case("new", kind="new")
  drawn = cases.draw(case)
  message = "kind='new' is not implemented in kernels/xla.py; docs/kernels.md#"
  message = rf"(?m){message}.*needs$"  # There is no other implementation.
  with pytest.raises(ValueError, match=message):
    attention.dot_product_attention(*drawn[0], kind="new")
  with pytest.raises(ValueError, match="in tests/kernels/cases.py; docs/"):
    cases.exact(case, *drawn)


@pytest.mark.parametrize("case", cases.SMALL_WEIGHTS, ids=str)
def test_the_gradient_of_a_query_bias_does_not_cancel(case):
  compare.assert_16_bit(case, "bfloat16")


def test_a_forget_gate_in_16_bits_has_an_exact_gradient():
  compare.assert_a_gate_in_16_bits_has_an_exact_gradient("bfloat16")


@pytest.mark.parametrize("case", cases.SMALL_WEIGHTS, ids=str)
def test_row_sums_have_a_gradient(case, use):
  """It reaches b and b_i by numerics.row_share."""
  (query, key, value), options, cotangent = cases.draw(case)
  options["logit_bias"] = jnp.float32(options["logit_bias"])
  names = "logit_bias", "query_logit_bias"
  trained = {name: options.pop(name) for name in names}

  def gradients():
    def loss(trained):
      out, sums = attention.dot_product_attention(
        query, key, value, return_residual=True, **options, **trained
      )
      # The sums are small. The factor gives them a large part of the gradient.
      return (out * cotangent).sum() + (1e4 * sums * cotangent[..., 0]).sum()

    return jax.jit(jax.grad(loss))(trained)

  found = gradients()
  use("reference")
  wanted = gradients()
  for name in names:
    assert compare.error(found[name], wanted[name]) < 1e-4, name


@pytest.mark.parametrize("bias", [-16.0, -14.0, -11.0, -8.0, -3.0, 0.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_relative_error_at_every_bias(bias, form, use):
  use(form)
  case = cases.Case("bias", batch=1, queries=64, width=16, logit_bias=bias)
  compare.assert_float32(case, 2e-6)


@pytest.mark.parametrize("bias", [None, -16.0, 2.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
  "case",
  [c for c in cases.CASES if c.name in ("plain", "lengths", "everything")]
  + [cases.Case("grouped_200", queries=200, kv_heads=2, causal=True)],
  ids=str,
)
def test_16_bit_error_is_at_most_that_of_plain_16_bit(case, dtype, bias):
  """2409.04431's kernel tests use this criterion. The margin is 5 %."""
  arrays, options, cotangent = cases.draw(case, dtype)
  if not case.bias_per_head:
    options["logit_bias"] = bias
  shifted = dataclasses.replace(case, logit_bias=options["logit_bias"])
  expected = cases.exact(shifted, arrays, options, cotangent)
  actual = compare.run(arrays, options, cotangent)
  plain = compare.plain_16_bit(case, arrays, options, cotangent)
  for name in ("out", "query", "key", "value"):
    # Rounding the output costs up to half a unit in the last place.
    unit = float(jnp.finfo(dtype).eps)
    ours, plain_error = (
      compare.error(actual[name], expected[name]),
      compare.error(plain[name], expected[name]),
    )
    assert ours < 1.05 * plain_error + 0.2 * unit, name


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_gradient_that_is_1_percent_off_is_seen(name):
  case = cases.CASES[0]
  arrays, options, cotangent = cases.draw(case)
  expected = cases.exact(case, arrays, options, cotangent)
  actual = compare.run(arrays, options, cotangent)
  assert compare.error(1.01 * actual[name], expected[name]) > 2e-3
  assert compare.error(1.00001 * actual[name], expected[name]) > 2e-6


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("name", ["lengths", "lengths_cross_grouped"])
def test_nan_in_padding_leaks_nowhere(name, form, use):
  use(form)
  compare.assert_nan_in_padding_leaks_nowhere(name)


def test_nan_behind_a_key_mask_leaks_nowhere():
  (case,) = [c for c in cases.CASES if c.name == "mask_keys"]
  arrays, options, cotangent = cases.draw(case)
  clean = compare.run(arrays, options, cotangent)
  hidden = ~options["mask"][:, 0, 0]
  for x in arrays[1:]:
    x[hidden] = np.nan
  actual = compare.run(arrays, options, cotangent)
  for name, value in clean.items():
    np.testing.assert_array_equal(actual[name], value, name)


def test_only_query_key_and_value_are_saved():
  def f(q, k, v):
    return attention.dot_product_attention(q, k, v)

  x = jnp.ones((1, 300, 2, 8))
  _, pullback = jax.vjp(f, x, x, x)
  assert sum(leaf.size for leaf in jax.tree.leaves(pullback)) <= 3 * x.size


def test_second_derivative_in_reverse_mode():
  case = cases.Case("small", batch=1, queries=5, heads=1, width=4)
  (q, k, v), _, _ = cases.draw(case)

  def grad_norm(form, q):
    def total(q):
      return (form(q, k, v) ** 2).sum()

    return (jax.grad(total)(q) ** 2).sum()

  def plain(q, k, v):
    z = jnp.einsum("btnh,bsnh->bnts", q, k) / 2 - jnp.log(5.0)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.sigmoid(z), v)

  actual = jax.grad(
    functools.partial(grad_norm, attention.dot_product_attention)
  )
  expected = jax.grad(functools.partial(grad_norm, plain))
  np.testing.assert_allclose(actual(q), expected(q), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_jit_vmap_and_checkpoint_change_nothing(causal):
  case = cases.Case("vmapped", causal=causal)
  arrays, options, cotangent = cases.draw(case)
  expected = compare.run(arrays, options, cotangent)

  def f(q, k, v):
    return attention.dot_product_attention(q, k, v, is_causal=causal)

  for g in (jax.jit(f), jax.vmap(f), jax.checkpoint(f)):
    out, pullback = jax.vjp(g, *arrays)
    for name, value in zip(
      ("out", "query", "key", "value"),
      (out, *pullback(jnp.asarray(cotangent))),
      strict=True,
    ):
      np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_memory_of_forward_and_backward():
  """Plain JAX stores several matrices of `weights_mib`. Our attention has none.

  The benchmark measures longer sequences, such as 16,384 tokens.
  """
  row = benchmark.memory(8192)
  assert row["weights_mib"] == 1024
  assert 0 < row["peak_mib"] < 640


def problem(**values):
  case = cases.Case("problem")
  arrays, _, _ = cases.draw(case)
  options = dict(
    kind="sigmoid", scale=1.0, logit_bias=-1.0, normalizer=1.0,
    is_causal=False, window=None,
  )  # fmt: skip
  return make_problem(*arrays, dispatch.Operands(), **options | values)


def test_problem_is_hashable_and_says_what_it_is():
  assert problem() == problem()
  assert hash(problem()) == hash(problem())
  assert problem() != problem(is_causal=True)
  assert str(problem(is_causal=True)) == (
    "sigmoid B2 T24 S24 N4 K4 H8 float32 causal"
  )


class _Declining:
  @staticmethod
  def unsupported(problem):
    return "" if problem.is_causal else "only causal"

  @staticmethod
  def attention(query, *_):
    return query


def test_the_choice_and_its_reasons(monkeypatch, caplog):
  monkeypatch.setattr(
    dispatch, "IMPLEMENTATIONS", {"fast": "fast", "xla": "sigattn.kernels.xla"}
  )
  modules = {"fast": _Declining, "xla": xla}
  monkeypatch.setattr(dispatch, "_module", modules.get)
  card = dispatch.device.Device("NVIDIA A100", 80)
  monkeypatch.setattr(dispatch.device, "current", lambda: card)
  dispatch._choose.cache_clear()
  caplog.set_level(logging.INFO, "sigattn.kernels")
  assert dispatch.choose(problem(is_causal=True)) == "fast"
  assert dispatch.choose(problem()) == "xla"
  assert dispatch.choose(problem()) == "xla"
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == 2, "one line a problem"
  assert lines[1].endswith("by xla; not fast: only causal")
  with pytest.raises(
    NotImplementedError, match="fast: only causal; pass .*None"
  ):
    dispatch.choose(problem(), "fast")
  with pytest.raises(ValueError, match=r"implementation='slow'.*'fast', 'xla'"):
    dispatch.choose(problem(), "slow")
  dispatch._choose.cache_clear()


def test_a_machine_without_a_gpu_says_so_once(caplog):
  dispatch._choose.cache_clear()
  dispatch._log_portable.cache_clear()
  caplog.set_level(logging.INFO, "sigattn.kernels")
  for causal in (False, True):
    assert dispatch.choose(problem(is_causal=causal)) == "xla"
  [record] = caplog.records
  assert record.getMessage() == "attention by xla: cpu is no NVIDIA GPU"


@pytest.mark.parametrize(
  ("lengths", "width", "alibi", "first"),
  [
    ((196, 196), 64, False, "triton"),
    ((1, 2048), 64, False, "triton"),
    ((64, 2048), 64, False, "mosaic"),
    ((2048, 2048), 64, False, "mosaic"),
    ((2048, 2048), 32, True, "triton"),
    ((2048, 2048), 64, True, "mosaic"),
  ],
)
def test_problems_go_first_to_what_is_fastest(lengths, width, alibi, first):
  queries, keys = lengths
  shapes = dispatch.Operands(alibi_slopes=(1, 2) if alibi else None)
  changed = dataclasses.replace(
    problem(), query_len=queries, key_len=keys, head_dim=width, shapes=shapes
  )
  names = dispatch._fastest_first(changed)
  assert (names[0], names[-1]) == (first, "xla")
  assert sorted(names) == ["mosaic", "triton", "xla"]


@pytest.mark.parametrize(
  ("query", "key", "reason"),
  [
    ((None, "a"), (None, "a"), r"query is sharded as P.None, 'a'.* alike"),
    (("a",), (None,), r"key is sharded as P.None.*, not P.'a', None"),
    ((None, None, "a"), (), "key is sharded as"),
  ],
)
def test_a_mesh_that_splits_what_belongs_together(query, key, reason):
  mesh = jax.make_mesh((1,), ("a",))

  def put(spec):
    spec = jax.sharding.PartitionSpec(*spec)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.device_put(jnp.ones((2, 4, 2, 8)), sharding)

  with pytest.raises(ValueError, match=reason):
    attention.dot_product_attention(put(query), put(key), put(key))
