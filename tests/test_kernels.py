"""Every implementation against float64, and the choice between them."""

import dataclasses
import functools
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import bench, device, xla_attn
from sigattn import attention
from tests import cases

FORMS = ("reference", "xla", "xla in small blocks")
WITH_GRADIENT = ("logit_bias", "alibi_slopes", "bias")


def run(arrays, options, cotangent):
  """{"out": ..., "query": its gradient, ...} of the operation."""
  arrays = dict(zip(("query", "key", "value"), arrays, strict=True))
  given = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
  static = {k: v for k, v in options.items() if k not in given}
  arrays |= {k: given.pop(k) for k in WITH_GRADIENT if k in given}

  @jax.jit  # Much faster than to compile each operation of its own.
  def f(arrays, given, cotangent):
    def attend(arrays):
      return attention.dot_product_attention(**arrays, **given, **static)

    out, pullback = jax.vjp(attend, arrays)
    return {"out": out, **pullback(cotangent)[0]}

  return f(arrays, given, cotangent)


@pytest.fixture
def use(monkeypatch):
  """Makes attention run in one of FORMS."""

  def set_form(form):
    if form == "reference":
      monkeypatch.setattr(xla_attn, "attention", xla_attn.reference)
    elif form == "xla in small blocks":
      monkeypatch.setattr(xla_attn, "_TILE", 64)
      monkeypatch.setattr(xla_attn, "_MIN_BLOCK", 5)

  return set_form


def run_or_skip(arrays, options, cotangent):
  """run; a case that the implementation declines skips with the reason."""
  try:
    return run(arrays, options, cotangent)
  except NotImplementedError as reason:
    return pytest.skip(str(reason))


def use_only(monkeypatch, name, found):
  """Makes `name` the only implementation, and a Device what it runs on."""
  module = kernels.IMPLEMENTATIONS[name]
  monkeypatch.setattr(kernels, "IMPLEMENTATIONS", {name: module})
  monkeypatch.setattr(device, "current", lambda: found)
  kernels._choose.cache_clear()


def error(found, wanted):
  """Root mean square of the difference, relative to that of `wanted`."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  assert found.shape == wanted.shape
  size = np.sqrt(np.mean(wanted**2))
  return np.sqrt(np.mean((found - wanted) ** 2)) / (size or 1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_output_and_gradients_equal_float64(case, form, use):
  use(form)
  check_float32(case, 2e-6)


def check_float32(case, bound):
  arrays, options, cotangent = cases.draw(case)
  wanted = cases.exact(case, arrays, options, cotangent)
  found = run_or_skip(arrays, options, cotangent)
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    assert error(found[name], value) < bound, name


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("case", cases.ARBITRARY, ids=str)
def test_arbitrary_cases_equal_float64(case, form, use):
  use(form)
  # A slope's gradient is a sum whose terms may be ten times as large.
  check_float32(case, 6e-6)


@pytest.mark.parametrize("bias", [-16.0, -14.0, -11.0, -8.0, -3.0, 0.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_relative_error_at_every_bias(bias, form, use):
  use(form)
  case = cases.Case("bias", batch=1, queries=64, width=16, logit_bias=bias)
  check_float32(case, 2e-6)


@pytest.mark.parametrize("bias", [None, -16.0, 2.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
  "case",
  [c for c in cases.CASES if c.name in ("plain", "lengths", "everything")]
  + [cases.Case("grouped_200", queries=200, kv_heads=2, causal=True)],
  ids=str,
)
def test_16_bit_error_is_at_most_that_of_plain_16_bit(case, dtype, bias):
  """The criterion of 2409.04431's own kernel tests, with room of 1.05."""
  arrays, options, cotangent = cases.draw(case, dtype)
  if not case.bias_per_head:
    options["logit_bias"] = bias
  shifted = dataclasses.replace(case, logit_bias=options["logit_bias"])
  wanted = cases.exact(shifted, arrays, options, cotangent)
  found = run(arrays, options, cotangent)
  plain = plain_16_bit(case, arrays, options, cotangent)
  for name in ("out", "query", "key", "value"):
    # Rounding the output alone costs up to half a unit in the last place.
    unit = float(jnp.finfo(dtype).eps)
    ours, theirs = (
      error(found[name], wanted[name]),
      error(plain[name], wanted[name]),
    )
    assert ours < 1.05 * theirs + 0.2 * unit, name


def plain_16_bit(case, arrays, options, cotangent):
  """What a user would write in jnp, weights kept in 16 bits."""
  seen = jnp.asarray(cases.visible(case, options))
  b, t, s, n, kv, h = case.shape
  scale = h**-0.5 if case.scale is None else case.scale
  activation = {
    "sigmoid": jax.nn.sigmoid,
    "relu": lambda z: jax.nn.relu(z) / s,
    "relu2": lambda z: jax.nn.relu(z) ** 2 / s,
  }[case.kind]
  offset = options["logit_bias"]
  if offset is None:
    offset = -np.log(s) if case.kind == "sigmoid" else 0.0
  extra = np.zeros((b, n, t, s), np.float32)
  extra += np.asarray(offset).reshape(*np.shape(offset), 1, 1)
  if case.bias:
    extra += options["bias"]
  if case.alibi:
    distance = abs(np.arange(t)[:, None] + s - t - np.arange(s)[None])
    extra -= options["alibi_slopes"][:, None, None] * distance

  def f(q, k, v):
    k, v = (jnp.repeat(x, n // kv, axis=2) for x in (k, v))
    z = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    p = jnp.where(seen, activation(z * scale + extra), 0).astype(q.dtype)
    return jnp.einsum("bnts,bsnh->btnh", p, v)

  out, pullback = jax.vjp(f, *map(jnp.asarray, arrays))
  grads = pullback(jnp.asarray(cotangent))
  return dict(zip(("out", "query", "key", "value"), (out, *grads), strict=True))


def check_16_bit(case, dtype):
  """A kernel errs at most twice as much as plain_16_bit, against float64."""
  arrays, options, cotangent = cases.draw(case, dtype)
  found = run_or_skip(arrays, options, cotangent)
  wanted = cases.exact(case, arrays, options, cotangent)
  plain = plain_16_bit(case, arrays, options, cotangent)
  unit = float(jnp.finfo(dtype).eps)
  for name, value in wanted.items():
    # Of the operands' gradients, which are float32, a 16-bit error is allowed.
    theirs = error(plain[name], value) if name in plain else unit
    assert error(found[name], value) <= 2 * theirs + 0.2 * unit, name


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_gradient_that_is_1_percent_off_is_seen(name):
  case = cases.CASES[0]
  arrays, options, cotangent = cases.draw(case)
  wanted = cases.exact(case, arrays, options, cotangent)
  found = run(arrays, options, cotangent)
  assert error(1.01 * found[name], wanted[name]) > 2e-3
  assert error(1.00001 * found[name], wanted[name]) > 2e-6


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("name", ["lengths", "lengths_cross_grouped"])
def test_nan_in_padding_leaks_nowhere(name, form, use):
  use(form)
  check_nan_in_padding(name)


def check_nan_in_padding(name, width=8, dtype="float32"):
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
  found = run(dirty, options, cotangent)
  for name, value in clean.items():
    np.testing.assert_array_equal(found[name], value, name)


def test_nan_behind_a_key_mask_leaks_nowhere():
  (case,) = [c for c in cases.CASES if c.name == "mask_keys"]
  arrays, options, cotangent = cases.draw(case)
  clean = run(arrays, options, cotangent)
  hidden = ~options["mask"][:, 0, 0]
  for x in arrays[1:]:
    x[hidden] = np.nan
  found = run(arrays, options, cotangent)
  for name, value in clean.items():
    np.testing.assert_array_equal(found[name], value, name)


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

  found = jax.grad(
    functools.partial(grad_norm, attention.dot_product_attention)
  )
  wanted = jax.grad(functools.partial(grad_norm, plain))
  np.testing.assert_allclose(found(q), wanted(q), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_jit_vmap_and_checkpoint_change_nothing(causal):
  case = cases.Case("vmapped", causal=causal)
  arrays, options, cotangent = cases.draw(case)
  wanted = run(arrays, options, cotangent)

  def f(q, k, v):
    return attention.dot_product_attention(q, k, v, is_causal=causal)

  for g in (jax.jit(f), jax.vmap(f), jax.checkpoint(f)):
    out, pullback = jax.vjp(g, *arrays)
    for name, value in zip(
      ("out", "query", "key", "value"),
      (out, *pullback(jnp.asarray(cotangent))),
      strict=True,
    ):
      np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-6)


def test_memory_of_forward_and_backward():
  """The plain form keeps several matrices of this size; the benchmark prints
  other lengths, 16,384 among them, which take longer."""
  row = bench.memory(8192)
  assert row["weights_mib"] == 1024
  assert 0 < row["peak_mib"] < 640


def problem(**values):
  case = cases.Case("problem")
  arrays, _, _ = cases.draw(case)
  options = dict(
    kind="sigmoid", scale=1.0, logit_bias=-1.0, normalizer=1.0,
    is_causal=False, window=None,
  )  # fmt: skip
  return kernels.problem.make(*arrays, kernels.Operands(), **options | values)


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
    kernels, "IMPLEMENTATIONS", {"fast": "fast", "xla": "kernels.xla_attn"}
  )
  modules = {"fast": _Declining, "xla": xla_attn}
  monkeypatch.setattr(kernels, "_module", modules.get)
  kernels._choose.cache_clear()
  caplog.set_level(logging.INFO, "kernels")
  assert kernels.choose(problem(is_causal=True)) == "fast"
  assert kernels.choose(problem()) == "xla"
  assert kernels.choose(problem()) == "xla"
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == 2, "one line a problem"
  assert lines[1].endswith("by xla; not fast: only causal")
  with pytest.raises(NotImplementedError, match="fast: only causal"):
    kernels.choose(problem(), "fast")
  with pytest.raises(ValueError, match=r"implementation='slow'.*'fast', 'xla'"):
    kernels.choose(problem(), "slow")
  kernels._choose.cache_clear()


@pytest.mark.parametrize(
  ("lengths", "width", "alibi", "first"),
  [
    ((196, 196), 64, False, "triton"),
    ((1, 2048), 64, False, "mosaic"),
    ((2048, 2048), 64, False, "mosaic"),
    ((2048, 2048), 32, True, "triton"),
    ((2048, 2048), 64, True, "mosaic"),
  ],
)
def test_problems_go_first_to_what_is_fastest(lengths, width, alibi, first):
  queries, keys = lengths
  shapes = kernels.Operands(alibi_slopes=(1, 2) if alibi else None)
  found = dataclasses.replace(
    problem(), query_len=queries, key_len=keys, head_dim=width, shapes=shapes
  )
  names = kernels._fastest_first(found)
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


def test_kernels_stand_alone():
  code = (
    "import sys, kernels, kernels.xla_attn; "
    "bad = [m for m in sys.modules if m.split('.')[0] in "
    "('flax', 'sigattn', 'configs', 'ml_collections', 'optax')]; "
    "sys.exit(str(bad) if bad else 0)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
