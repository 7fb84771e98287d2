"""The public operation: its arguments, shapes, derivatives and errors."""

import functools
import inspect
import logging
import sys

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sigattn
from sigattn.attention import KINDS, cannot_normalize, dot_product_attention
from sigattn.kernels import decoding
from sigattn.kernels.problem import SIGNED
from tests.kernels import cases, compare

POINTWISE = [kind for kind in KINDS if kind != "softmax"]
SMALL = cases.Case("small", queries=6, keys=9, heads=4, width=8)


def draw(case=SMALL, dtype="float32"):
  return [jnp.asarray(x) for x in cases.draw(case, dtype)[0]]


def close(found, wanted, rtol=1e-5, atol=1e-6):
  np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


def test_it_takes_the_arguments_of_jax_nn_in_their_order():
  ours = inspect.signature(sigattn.dot_product_attention).parameters
  theirs = dict(inspect.signature(jax.nn.dot_product_attention).parameters)
  assert list(ours)[:5] == list(theirs)[:5]
  for name, parameter in theirs.items():
    assert ours[name].kind == parameter.kind
    assert ours[name].default == parameter.default


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"is_causal": True},
    {"local_window_size": (2, 1)},
    {"local_window_size": 2, "scale": 0.3},
    {"query_seq_lengths": [6, 2], "key_value_seq_lengths": [9, 4]},
    {"bias": True, "mask": True},
  ],
  ids=str,
)
def test_softmax_is_jax_nn_and_sigmoid_sees_the_same_pairs(options):
  query, key, value = draw()
  options = dict(options)
  for name in ("query_seq_lengths", "key_value_seq_lengths"):
    if name in options:
      options[name] = jnp.array(options[name], jnp.int32)
  if options.get("bias"):
    rng = np.random.default_rng(0)
    options["bias"] = jnp.asarray(rng.standard_normal((2, 4, 6, 9)))
    options["mask"] = jnp.asarray(rng.random((2, 1, 6, 9)) < 0.7)
  wanted = jax.nn.dot_product_attention(query, key, value, **options)
  found = dot_product_attention(query, key, value, kind="softmax", **options)
  np.testing.assert_array_equal(found, wanted)

  def sees(attend):  # which keys influence which rows of the output
    jacobian = jax.jacrev(lambda v: attend(query, key, v, **options))(value)
    return abs(jacobian).sum((2, 3, 6, 7)) > 0

  lengths = np.asarray(options.get("query_seq_lengths", [6, 6]))
  rows = (np.arange(6) < lengths[:, None])[:, :, None, None]
  theirs = sees(jax.nn.dot_product_attention)
  np.testing.assert_array_equal(sees(dot_product_attention) & rows, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_batch_axis(kind):
  query, key, value = draw()
  wanted = dot_product_attention(query, key, value, kind=kind)
  for i in range(2):
    found = dot_product_attention(query[i], key[i], value[i], kind=kind)
    close(found, wanted[i])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_has_the_dtype_of_the_query(kind, dtype):
  arrays = draw(dtype=dtype)
  assert dot_product_attention(*arrays, kind=kind).dtype == dtype


@pytest.mark.parametrize(
  "options",
  [
    {}, {"normalize": True, "return_residual": True}, {"kind": "softmax"},
    {"kind": "softmax", "return_residual": True},
  ],
  ids=str,
)  # fmt: skip
def test_keys_in_8_bits_are_cast(options):
  query, *keys = draw(dtype="bfloat16")
  keys = [x.astype("float8_e4m3fn") for x in keys]
  found = dot_product_attention(query, *keys, **options)
  keys = [x.astype("bfloat16") for x in keys]
  wanted = dot_product_attention(query, *keys, **options)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
  ("dtypes", "said"),
  [
    (("float32", "float8_e4m3fn", "float32"), r"key\.dtype=float8_e4m3fn; cho"),
    (("float32", "float8_e5m2", "float8_e5m2"), r"key\.dtype=float8_e5m2; cho"),
    (3 * ("float8_e4m3fn",), r"query\.dtype=float8_e4m3fn; choose from"),
    (("bfloat16", "float32", "float32"), r"key\.dtype=float32; must be the qu"),
  ],
)
def test_other_mixed_dtypes_are_refused(dtypes, said):
  arrays = [x.astype(t) for x, t in zip(draw(), dtypes, strict=True)]
  with pytest.raises(ValueError, match=said):
    dot_product_attention(*arrays)


def test_sigmoid_from_any_softmax_with_a_log_sum_exp():
  """It equals softmax(logsigmoid(u)) v exp(lse), by jax.nn's softmax."""
  query, key, value = draw()
  eye = jnp.broadcast_to(jnp.eye(9)[None, :, None], (2, 9, 4, 9))
  # The oracle changes the logits, so it takes them as a bias.
  u = jnp.einsum("BTNH,BSNH->BNTS", query, key) / np.sqrt(8) - np.log(9)
  zeros = jnp.zeros((2, 6, 4, 9))
  weights, lse = jax.nn.dot_product_attention(
    zeros, jnp.zeros_like(eye), eye, jax.nn.log_sigmoid(u),
    return_residual=True,
  )  # fmt: skip
  wanted = (
    jnp.einsum("BTNS,BSNH->BTNH", weights, value) * jnp.exp(lse)[..., None]
  )
  close(dot_product_attention(query, key, value), wanted)


@pytest.mark.parametrize("n", [1, 7, 197])
def test_zero_logits_give_the_mean_of_the_values(n):
  value = jax.random.normal(jax.random.key(0), (1, n, 2, 4))
  zeros = jnp.zeros_like(value)
  found = dot_product_attention(zeros, zeros, value)
  mean = value.mean(1, keepdims=True) * n / (n + 1)
  close(found, jnp.broadcast_to(mean, value.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_keys_add_up_except_for_softmax(kind):
  query, key, value = draw()

  def attend(part):
    return dot_product_attention(
      query, key[:, part], value[:, part], kind=kind, n=9
    )

  whole, parts = attend(slice(9)), attend(slice(4)) + attend(slice(4, 9))
  if kind == "softmax":
    assert abs(whole - parts).max() > 0.1
  else:
    close(parts, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_have_no_order(kind):
  query, key, value = draw()
  order = np.random.default_rng(0).permutation(9)
  close(
    dot_product_attention(query, key[:, order], value[:, order], kind=kind),
    dot_product_attention(query, key, value, kind=kind),
  )


@pytest.mark.parametrize("kind", POINTWISE)
def test_a_masked_key_is_an_absent_key_at_the_same_n(kind):
  query, key, value = draw()
  seen = np.array([1, 1, 0, 1, 0, 0, 1, 1, 0], bool)
  found = dot_product_attention(
    query, key, value, mask=jnp.asarray(seen)[None, None, None], kind=kind, n=9
  )
  wanted = dot_product_attention(
    query, key[:, seen], value[:, seen], kind=kind, n=9
  )
  close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_causality_by_gradient(kind):
  case = cases.Case("causal", batch=1, queries=7, heads=2, width=4)
  query, key, value = draw(case)
  # The bias keeps ReLU away from its flat side, where gradients are 0.
  bias = 10.0 if kind in cases.FLAT else None

  def attend(x):
    return dot_product_attention(
      query, key + x, value + x, kind=kind, is_causal=True, logit_bias=bias
    )

  jacobian = jax.jacrev(attend)(jnp.zeros_like(key))
  moved = abs(jacobian).sum((0, 2, 3, 4, 6, 7)) > 0
  np.testing.assert_array_equal(moved, np.tril(np.ones((7, 7), bool)))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_do_not_see_each_other(kind):
  case = cases.Case("packed", batch=1, queries=10, heads=2, width=4)
  query, key, value = draw(case)
  ids = jnp.array([[3] * 4 + [1] * 6])
  packed = dot_product_attention(
    query, key, value, kind=kind, n=10, is_causal=True,
    query_segment_ids=ids, key_value_segment_ids=ids,
  )  # fmt: skip
  for part in (slice(4), slice(4, 10)):
    alone = dot_product_attention(
      query[:, part], key[:, part], value[:, part],
      kind=kind, n=10, is_causal=True,
    )  # fmt: skip
    close(packed[:, part], alone)


@pytest.mark.parametrize("kind", POINTWISE)
def test_a_row_that_sees_nothing_is_zero_with_zero_gradients(kind):
  query, key, value = draw()
  lengths = jnp.array([0, 9], jnp.int32)

  def attend(*arrays):
    return dot_product_attention(
      *arrays, kind=kind, key_value_seq_lengths=lengths
    )

  out, pullback = jax.vjp(attend, query, key, value)
  grads = pullback(jnp.ones_like(out))
  assert not out[0].any()
  assert out[1].any()
  for grad in grads:
    assert not grad[0].any()
    assert np.isfinite(grad[1]).all()
    assert grad[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_alibi_of_a_decoded_token_is_its_row_of_the_whole(kind):
  case = cases.Case("decode", batch=2, queries=9, heads=4)
  query, key, value = draw(case)
  options = dict(kind=kind, n=9, alibi_slopes=2.0 ** -jnp.arange(1.0, 5.0))
  whole = dot_product_attention(query, key, value, is_causal=True, **options)
  last = dot_product_attention(query[:, -1:], key, value, **options)
  close(last, whole[:, -1:])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_offset_makes_a_row_of_the_whole_of_a_decoded_token(kind, traced):
  """The cache has slots that are not filled yet. All masks of positions act."""
  case = cases.Case("decode", batch=2, queries=9, keys=9, heads=4)
  query, key, value = draw(case)
  options = dict(
    kind=kind, n=9, alibi_slopes=2.0 ** -jnp.arange(1.0, 5.0), is_causal=True,
    local_window_size=(5, 0),
  )  # fmt: skip
  whole = dot_product_attention(query, key, value, **options)

  def decode(query, offset):
    return dot_product_attention(
      query, key, value, query_offset=offset, **options
    )

  if traced:
    decode = jax.jit(decode)
  for place in (0, 4, 8):
    token = query[:, place : place + 1]
    close(decode(token, place), whole[:, place : place + 1])
  chunk = decode(query[:, 3:6], jnp.array([3, 3]))
  close(chunk, whole[:, 3:6])


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_examples_have_offsets_of_their_own(kind):
  query, key, value = draw()
  options = dict(kind=kind, is_causal=True, n=9)
  found = dot_product_attention(
    query, key, value, query_offset=jnp.array([1, 3]), **options
  )
  for example, offset in enumerate((1, 3)):
    alone = (x[example] for x in (query, key, value))
    wanted = dot_product_attention(*alone, query_offset=offset, **options)
    close(found[example], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_vector_of_minus_infinity_is_a_mask_of_keys(kind):
  query, key, value = draw()
  seen = jnp.array([True, False, True, True, False, True, True, True, True])

  def with_gradients(**options):
    def attend(*arrays):
      return dot_product_attention(*arrays, kind=kind, **options)

    out, pull_back = jax.vjp(attend, query, key, value)
    return out, *pull_back(jnp.cos(out))

  wanted = with_gradients(mask=seen[None, None, None])
  found = with_gradients(key_logit_bias=jnp.where(seen, 0.0, -jnp.inf))
  for x, y in zip(found, wanted, strict=True):
    close(x, y)


def test_logit_vectors_make_a_forget_gate():
  """2503.02130: sums of log forget gates are subtracted from the logits."""
  query, key, value = draw(cases.Case("gated", queries=9, heads=4))
  rng = np.random.default_rng(0)
  gate = np.log(rng.uniform(0.5, 1, (2, 4, 9)).astype(np.float32))
  total = np.cumsum(gate, -1)
  found = dot_product_attention(
    query, key, value, query_logit_bias=total, key_logit_bias=-total,
    is_causal=True,
  )  # fmt: skip
  bias = total[..., :, None] - total[..., None, :]
  wanted = dot_product_attention(query, key, value, bias=bias, is_causal=True)
  close(found, wanted)
  shared = dot_product_attention(
    query, key, value, query_logit_bias=total[0, 0]
  )
  full = jnp.broadcast_to(total[0, 0], (2, 4, 9))
  close(shared, dot_product_attention(query, key, value, query_logit_bias=full))


@pytest.mark.parametrize("kind", POINTWISE)
def test_logit_bias_as_float_array_and_per_head(kind):
  query, key, value = draw()
  number = dot_product_attention(query, key, value, kind=kind, logit_bias=-0.5)
  for shape in ((), (4,), (2, 4)):
    array = jnp.full(shape, -0.5)
    close(
      dot_product_attention(query, key, value, kind=kind, logit_bias=array),
      number,
    )
  heads = jnp.array([-3.0, -2.0, -1.0, 0.0])
  found = dot_product_attention(query, key, value, kind=kind, logit_bias=heads)
  for i in range(4):
    alone = dot_product_attention(
      query[:, :, i : i + 1], key[:, :, i : i + 1], value[:, :, i : i + 1],
      kind=kind, logit_bias=float(heads[i]),
    )  # fmt: skip
    close(found[:, :, i : i + 1], alone)


def test_the_default_bias_is_minus_log_n():
  query, key, value = draw()
  found = dot_product_attention(query, key, value)
  close(
    found,
    dot_product_attention(query, key, value, logit_bias=-float(np.log(9))),
  )
  assert abs(found - dot_product_attention(query, key, value, n=90)).max() > 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_as_attention_fn_of_nnx(causal):
  layer = nnx.MultiHeadAttention(
    num_heads=4,
    in_features=16,
    decode=False,
    attention_fn=sigattn.flax_attention_fn,
    rngs=nnx.Rngs(0),
  )
  x = jax.random.normal(jax.random.key(1), (2, 7, 16))
  mask = nnx.make_causal_mask(x[..., 0]) if causal else None
  found = layer(x, mask=mask)
  query, key, value = layer.query(x), layer.key(x), layer.value(x)
  wanted = dot_product_attention(query, key, value, is_causal=causal)
  close(found, layer.out(wanted))
  grads = nnx.grad(lambda layer: (layer(x, mask=mask) ** 2).sum())(layer)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("causal", [False, True])
def test_as_attention_fn_of_linen(causal):
  x = jax.random.normal(jax.random.key(1), (2, 7, 16))
  mask = flax.linen.make_causal_mask(x[..., 0]) if causal else None

  def layer(attention_fn):
    return flax.linen.MultiHeadDotProductAttention(
      num_heads=4, attention_fn=attention_fn
    )

  ours = layer(sigattn.flax_attention_fn)
  params = ours.init(jax.random.key(0), x)
  taken = []

  def spy(query, key, value, **_):
    taken.extend((query, key, value))
    return query

  layer(spy).apply(params, x)
  wanted = dot_product_attention(*taken, is_causal=causal)
  out = params["params"]["out"]
  wanted = jnp.einsum("BTNH,NHD->BTD", wanted, out["kernel"])
  close(ours.apply(params, x, mask=mask), wanted + out["bias"][None, None])


def test_active_dropout_is_refused_in_flax():
  layer = nnx.MultiHeadAttention(
    num_heads=2, in_features=8, dropout_rate=0.1, decode=False,
    attention_fn=sigattn.flax_attention_fn, rngs=nnx.Rngs(0),
  )  # fmt: skip
  x = jnp.ones((1, 3, 8))
  with pytest.raises(ValueError, match=r"dropout_rate=0\.1"):
    layer(x, deterministic=False)
  assert layer(x, deterministic=True).shape == x.shape


@pytest.mark.parametrize(
  ("options", "layer"),
  [
    (dict(precision="highest"), dict()),
    (dict(precision=jax.lax.Precision.HIGH), dict()),
    (dict(dtype=jnp.bfloat16), dict()),
    (dict(num_kv_heads=2), dict()),
    (dict(), dict(is_causal=True)),
  ],
  ids=str,
)
def test_what_nnx_layers_may_pass(options, layer):
  """Flax passes two batch axes, and a mask of zeros and ones."""
  module = nnx.MultiHeadAttention(
    4, 16, decode=False, attention_fn=sigattn.flax_attention_fn,
    rngs=nnx.Rngs(0), **options,
  )  # fmt: skip
  x = jax.random.normal(jax.random.key(1), (2, 3, 7, 16))
  mask = nnx.make_attention_mask(
    jnp.arange(7)[None, None] < jnp.array([7, 5, 2])[None, :, None],
    jnp.ones((1, 3, 7)),
  )
  assert mask.dtype == jnp.float32
  found = module(x, mask=mask, **layer)
  query, key, value = (
    y.reshape(6, *y.shape[2:])
    for y in (module.query(x), module.key(x), module.value(x))
  )
  wanted = dot_product_attention(
    query, key, value,
    mask=jnp.broadcast_to(mask, (2, *mask.shape[1:])).reshape(6, 1, 7, 7) != 0,
    **layer,
  )  # fmt: skip
  wanted = module.out(wanted.reshape(2, 3, *wanted.shape[1:]))
  tolerance = 3e-2 if "dtype" in options else 1e-5
  close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_sown_weights_are_those_of_the_operation(library):
  attend = functools.partial(sigattn.flax_attention_fn, kind="relu", n=5)
  x = jax.random.normal(jax.random.key(1), (2, 7, 16))
  if library == "nnx":
    module = nnx.MultiHeadAttention(
      4, 16, decode=False, attention_fn=attend, rngs=nnx.Rngs(0)
    )
    module(x, sow_weights=True)
    [sown] = module.attention_weights.get_value()
    query, key = module.query(x), module.key(x)
  else:
    module = flax.linen.MultiHeadDotProductAttention(4, attention_fn=attend)
    params = module.init(jax.random.key(0), x)
    _, state = module.apply(
      params, x, sow_weights=True, mutable=["intermediates"],
      capture_intermediates=lambda module, _: module.name in ("query", "key"),
    )  # fmt: skip
    state = state["intermediates"]
    [sown] = state["attention_weights"]
    [query], [key] = (state[k]["__call__"] for k in ("query", "key"))
  for name, value, said in (
    ("normalise", True, "'normalise': did you mean 'normalize'"),
    ("key_seq_lengths", [1], "'key_seq_lengths': did you mean 'key_value_seq"),
    ("implementation", "xla", r"attention_weights\(\) got .*'implementation'"),
  ):
    with pytest.raises(TypeError, match=said):
      sigattn.attention_weights(query, key, **{name: value})
  weights = sigattn.attention_weights(query, key, kind="relu", n=5)
  close(sown, weights.weights_BNTS)


@pytest.mark.parametrize(
  "name", ["qk_attn_weights_einsum", "attn_weights_value_einsum",
           "input_positions"]
)  # fmt: skip
def test_what_flax_may_pass_and_has_no_meaning_here_is_refused(name):
  x = jnp.ones((1, 3, 2, 4))
  with pytest.raises(ValueError, match=f"{name}=.*; must be None"):
    sigattn.flax_attention_fn(x, x, x, **{name: jnp.einsum})


@pytest.mark.parametrize("window", [2**31 - 1, (0, 2**31 - 1), (2**40, 3)])
def test_a_window_longer_than_the_sequences_is_no_window(window):
  query, key, value = draw()
  pair = window if isinstance(window, tuple) else (window, window)
  wanted = dot_product_attention(
    query, key, value, local_window_size=tuple(min(x, 100) for x in pair)
  )
  found = dot_product_attention(query, key, value, local_window_size=window)
  close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [(None, 1), (2, None), (None, None)])
def test_a_window_may_be_open_on_a_side(window, kind):
  query, key, value = draw()
  wanted = dot_product_attention(
    query, key, value, kind=kind,
    local_window_size=tuple(100 if x is None else x for x in window),
  )  # fmt: skip
  for each in (
    window,
    tuple(None if x is None else np.int64(x) for x in window),
  ):
    found = dot_product_attention(
      query, key, value, kind=kind, local_window_size=each
    )
    close(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
  "window", [(3, 0), (3, 2), (None, 0), (np.int64(2), np.int64(0))]
)
def test_cudnn_is_told_of_the_future_that_a_window_hides(
  window, causal, monkeypatch
):
  """Without a causal mask, jax passes only the left bound to cuDNN."""
  if window[1] and not causal:
    pytest.skip("jax refuses it by name")
  query, key, value = draw(cases.Case("square", queries=9))
  options = dict(kind="softmax", is_causal=causal, local_window_size=window)
  wanted = dot_product_attention(query, key, value, **options)
  plain, asked = jax.nn.dot_product_attention, []

  def spy(*arrays, implementation, **options):
    asked.append((implementation, options))
    return plain(*arrays, **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
  found = dot_product_attention(
    query, key, value, implementation="cudnn", **options
  )
  close(found, wanted)
  [(implementation, asked)] = asked
  assert implementation == "cudnn"
  assert asked["is_causal"]
  assert asked["local_window_size"] == (
    None if window[0] is None else (window[0], 0)
  )


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_scale_is_a_number_with_a_gradient(kind):
  query, key, value = draw()

  def loss(scale, factor=1.0):
    out = dot_product_attention(
      factor * query, key, value, kind=kind, scale=scale
    )
    return (out**2).sum()

  found, slope = jax.jit(jax.value_and_grad(loss))(0.3)
  close(found, loss(0.3), rtol=1e-4)
  wanted = jax.grad(lambda factor: loss(1.0, factor))(0.3)
  close(slope, wanted, rtol=1e-4)
  with pytest.raises(
    ValueError, match="scale=.*; must be a float, or a traced"
  ):
    jax.jit(loss)(jnp.ones(3))


def test_the_gradient_of_a_traced_scale_ignores_hidden_nan():
  query, key, value = draw()
  lengths = jnp.array([6, 2], jnp.int32)

  def loss(scale, query):
    out = dot_product_attention(
      query, key, value, scale=scale, query_seq_lengths=lengths
    )
    return (out**2).sum()

  wanted = jax.grad(loss)(0.3, query)
  found = jax.grad(loss)(0.3, query.at[1, 2:].set(jnp.nan))
  close(found, wanted)
  assert abs(wanted) > 1e-3


@pytest.mark.parametrize("kind", POINTWISE)
def test_a_traced_scalar_logit_bias_has_a_gradient(kind):
  query, key, value = draw()

  def loss(bias):
    out = dot_product_attention(query, key, value, kind=kind, logit_bias=bias)
    return (out**2).sum()

  found, slope = jax.jit(jax.value_and_grad(loss))(0.3)
  close(found, loss(0.3))
  wanted = jax.grad(loss)(jnp.full(4, 0.3))  # one for each head
  close(slope, wanted.sum(), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_arrays(empty, masked, kind):
  size = {"batch": 2, "queries": 6, "keys": 9} | {empty: 0}
  query = jnp.ones((size["batch"], size["queries"], 4, 8))
  key = jnp.ones((size["batch"], size["keys"], 2, 8))
  options = dict(is_causal=True, local_window_size=2) if masked else {}
  if masked and kind != "softmax":
    options |= dict(normalize=kind not in SIGNED, alibi_slopes=jnp.ones(4))
  out, pull_back = jax.vjp(
    lambda *x: dot_product_attention(*x, kind=kind, **options), query, key, key
  )
  assert out.shape == query.shape
  assert (out == 0).all()
  for x, grad in zip((query, key, key), pull_back(out), strict=True):
    assert grad.shape == x.shape
    assert (grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  "options",
  [{}, dict(is_causal=True, local_window_size=(3, None)), dict(alibi=True),
   dict(normalize=True)],
  ids=str,
)  # fmt: skip
def test_export_with_an_open_batch_and_lengths(options, kind):
  options = dict(options)
  if options.pop("alibi", False):
    options["alibi_slopes"] = jnp.ones(4)
  if options.get("normalize") and cannot_normalize(kind):
    pytest.skip("these are refused")

  @jax.jit
  def gradients(*arrays):
    def loss(*arrays):
      return (dot_product_attention(*arrays, kind=kind, **options) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(*arrays)

  b, t, s = jax.export.symbolic_shape("b, t, s")
  of_keys = jax.ShapeDtypeStruct((b, s, 2, 8), "float32")
  exported = jax.export.export(gradients)(
    jax.ShapeDtypeStruct((b, t, 4, 8), "float32"), of_keys, of_keys
  )
  for queries, keys in ((6, 9), (4, 4)):
    case = cases.Case("open", queries=queries, keys=keys, kv_heads=2)
    arrays = draw(case)
    found, wanted = exported.call(*arrays), gradients(*arrays)
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_where_promotion_is_forbidden(kind, dtype):
  """Other operands are float32, as the parameters of models are."""
  arrays = draw(dtype=dtype)
  options = dict(
    kind=kind, is_causal=True, local_window_size=(4, 0),
    bias=jnp.ones((4, 6, 9)), alibi_slopes=jnp.ones(4),
    key_logit_bias=jnp.ones(9), query_offset=jnp.array([2, 3]),
    key_value_seq_lengths=jnp.array([9, 7]),
    query_segment_ids=Z((2, 6), int), key_value_segment_ids=Z((2, 9), int),
  )  # fmt: skip
  if kind != "softmax":
    options |= dict(
      logit_bias=jnp.ones(4), query_logit_bias=jnp.ones(6),
      normalize=kind not in SIGNED,
    )  # fmt: skip

  def gradients(scale, *arrays):
    def loss(scale, *arrays):
      out = dot_product_attention(*arrays, scale=scale, **options)
      assert out.dtype == dtype
      return (out.astype("float32") ** 2).sum()

    return jax.value_and_grad(loss, (0, 1, 2, 3))(scale, *arrays)

  wanted = gradients(jnp.float32(0.4), *arrays)
  with jax.numpy_dtype_promotion("strict"):
    if (kind, dtype) == ("softmax", "bfloat16"):
      with pytest.raises(
        ValueError, match=r"jax_numpy_dtype_promotion='strict"
      ):
        gradients(jnp.float32(0.4), *arrays)
      return
    found = gradients(jnp.float32(0.4), *arrays)
  for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_bias_beside_bfloat16(kind):
  bias = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 9)))

  def gradients(dtype):
    arrays = draw(dtype=dtype)

    def loss(bias):
      out = dot_product_attention(*arrays, bias, kind=kind)
      return (out.astype("float32") ** 2).sum()

    return jax.value_and_grad(loss)(bias)

  (found, grad), (wanted, exact) = gradients("bfloat16"), gradients("float32")
  assert grad.dtype == "float32"
  close(found, wanted, rtol=2e-2)
  assert compare.error(grad, exact) < 2e-2


@pytest.mark.parametrize("kind", KINDS)
def test_nested_vmap(kind):
  rng = np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(rng.standard_normal((2, 3, 2, 5, 2, 4)), "float32")
    for _ in range(3)
  )

  def gradient(query, key, value):
    def loss(*arrays):
      out = dot_product_attention(*arrays, kind=kind, is_causal=True)
      return (out**2).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)

  inner = jax.vmap(gradient, in_axes=(0, None, 0))
  found = jax.vmap(inner, in_axes=(1, 0, 0))(
    jnp.swapaxes(query, 0, 1), key[:, 0], value
  )
  for i in range(2):
    for j in range(3):
      wanted = gradient(query[i, j], key[i, 0], value[i, j])
      jax.tree.map(lambda x, y: close(x[i, j], y, rtol=1e-4), found, wanted)  # noqa: B023


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_decoding_in_flax_is_right_or_refused(library):
  """Flax passes the whole cache, with a mask of the filled part."""
  attend = functools.partial(sigattn.flax_attention_fn, n=5)
  x = jax.random.normal(jax.random.key(1), (2, 5, 16))
  if library == "nnx":
    layer = nnx.MultiHeadAttention(
      4, 16, decode=False, attention_fn=attend, rngs=nnx.Rngs(0)
    )
    whole = layer(x, is_causal=True)
    layer.init_cache(x.shape)

    def step(token, **causal):
      return layer(token, decode=True, **causal)

  else:

    def linen(attend, **decode):
      return flax.linen.MultiHeadDotProductAttention(
        4, attention_fn=attend, **decode
      )

    causal = functools.partial(attend, is_causal=True)
    params = linen(causal).init(jax.random.key(0), x)
    whole = linen(causal).apply(params, x)
    cache = linen(attend, decode=True).init(jax.random.key(0), x)["cache"]

    def step(token, **causal):
      nonlocal cache
      out, state = linen(
        functools.partial(attend, **causal), decode=True
      ).apply(params | {"cache": cache}, token, mutable=["cache"])
      cache = state["cache"]
      return out

  with pytest.raises(ValueError, match="is_causal with 1 query, 5 keys and a"):
    step(x[:, :1], is_causal=True)
  if library == "nnx":
    layer.init_cache(x.shape)
  for place in range(5):
    close(step(x[:, place : place + 1]), whole[:, place : place + 1], atol=1e-5)


def test_a_step_of_flax_knows_its_place_by_query_offset():
  query, key, value = draw(cases.Case("cache", queries=9))
  options = dict(is_causal=True, local_window_size=3, alibi_slopes=jnp.ones(4))
  whole = dot_product_attention(query, key, value, **options)
  filled = (jnp.arange(9) <= 4)[None, None, None]
  token = query[:, 4:5], key, value, None, filled
  found = sigattn.flax_attention_fn(*token, query_offset=4, **options)
  close(found, whole[:, 4:5])
  names = "local_window_size, alibi_slopes, is_causal with 1 query.* slot of"
  with pytest.raises(ValueError, match=names):
    sigattn.flax_attention_fn(*token, **options)


def test_a_variable_that_would_not_be_trained_is_refused():
  x, bias = jnp.ones((1, 3, 2, 4)), nnx.Param(jnp.zeros(2))
  with pytest.raises(ValueError, match="logit_bias is an nnx.Param.*not train"):
    functools.partial(sigattn.flax_attention_fn, logit_bias=bias)(x, x, x)


def test_a_mask_of_numbers_to_add_is_refused_by_the_adapter():
  x = jnp.ones((1, 3, 2, 4))
  mask = jnp.where(nnx.make_causal_mask(x[..., 0, 0]) == 1, 0, -1e9)
  with pytest.raises(ValueError, match="mask has the number -1000000000"):
    sigattn.flax_attention_fn(x, x, x, mask=mask)


def test_weights_need_a_batch_axis():
  x = jnp.ones((3, 2, 4))
  with pytest.raises(ValueError, match=r"\(3, 2, 4\).*give query\[None\]"):
    sigattn.attention_weights(x, x)


def test_cudnn_without_a_gpu_is_refused_as_other_implementations_are():
  if jax.default_backend() == "gpu":
    pytest.skip("cuDNN is there")
  x = jnp.ones((1, 3, 2, 4), "bfloat16")
  with pytest.raises(NotImplementedError, match="device is cpu; pass .*None"):
    dot_product_attention(x, x, x, kind="softmax", implementation="cudnn")


def test_the_log_says_what_computes_a_softmax_of_few_queries(
  caplog, monkeypatch
):
  """Other softmax is not decoding, and jax.nn always computes it."""
  old = decoding.device.Device("Tesla V100", 70)
  monkeypatch.setattr(decoding.device, "current", lambda: old)
  decoding._reason.cache_clear()
  caplog.set_level(logging.INFO, "sigattn.kernels")
  x = jnp.ones((1, 17, 2, 4))
  dot_product_attention(x, x, x, kind="softmax")
  assert not caplog.records
  dot_product_attention(x[:, :2], x, x, kind="softmax")
  [line] = caplog.records
  assert line.getMessage().startswith(
    "decoding attention softmax B1 T2 S17 N2 K2 H4 float32 by jax.nn; not"
  )


def test_one_slope_is_that_of_every_head():
  arrays = draw()
  found = dot_product_attention(*arrays, alibi_slopes=0.5)
  close(found, dot_product_attention(*arrays, alibi_slopes=np.full(4, 0.5)))


def test_the_adapter_names_a_misspelt_option():
  x = jnp.ones((1, 3, 2, 4))
  attend = functools.partial(sigattn.flax_attention_fn, normalise=True)
  with pytest.raises(TypeError, match=r"flax_attention_fn\(\).*'normalize'\?"):
    attend(x, x, x)


def test_paired_biases_need_both():
  x = jnp.ones((1, 3, 2, 4))
  vectors = dict(query_logit_bias=jnp.ones(3), key_logit_bias=-jnp.ones(3))
  sigattn.attention_weights(x, x, paired_biases=True, **vectors)
  with pytest.raises(ValueError, match="paired_biases=True; needs"):
    dot_product_attention(
      x, x, x, paired_biases=True, key_logit_bias=jnp.ones(3)
    )


def test_the_adapter_refuses_to_return_two_arrays():
  x = jnp.ones((1, 3, 2, 4))
  with pytest.raises(ValueError, match="return_residual=True; Flax's layers"):
    sigattn.flax_attention_fn(x, x, x, normalize=True, return_residual=True)


def test_a_mask_of_numbers_is_refused_by_the_plain_operation():
  x, mask = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 1, 3, 3))
  with pytest.raises(ValueError, match="mask.dtype=float32; must be bool"):
    sigattn.dot_product_attention(x, x, x, mask=mask)


Z = np.zeros
BAD = [
  (dict(kind="sigmiod"), "kind='sigmiod'; choose from"),
  (dict(implementation="mosiac"), "implementation='mosiac'.*'xla'"),
  (dict(kind="softmax", implementation="mosaic"), "'xla', 'cudnn'"),
  (dict(implementation="cudnn"), "'cudnn'.*'xla'.*computes softmax only"),
  (dict(kind="softmax", logit_bias=-1.0), "logit_bias=-1.0"),
  (dict(kind="softmax", normalize=True), "normalize=True with kind='softmax'"),
  *(
    (dict(kind=kind, normalize=True), f"normalize=True with kind='{kind}'")
    for kind in SIGNED
  ),
  (dict(kind="softmax", query_logit_bias=Z(6)), "query_logit_bias of shape"),
  (dict(query_logit_bias=Z(9)), r"query_logit_bias.shape=\(9,\)"),
  (dict(key_logit_bias=Z((3, 9))), r"key_logit_bias.shape=\(3, 9\)"),
  (dict(key_logit_bias=Z((2, 9))), r"give key_logit_bias\[:, None, :\]"),
  (dict(mask=Z((2, 9), bool)), r"\(2, 9\);.*give mask\[:, None, None, :\]"),
  (dict(mask=Z((2, 1, 9), bool)), r"\(2, 1, 9\);.*give mask\[:, :, None\]"),
  (dict(mask=Z((2, 6, 9), bool)), r"\(2, 6, 9\);.*give mask\[:, None\]"),
  (dict(bias="softmax"), "bias='softmax'; must be an array.*kind='softmax'"),
  (dict(query_offset=3), "query_offset=3; has no effect without is_causal"),
  (dict(query_offset=3, local_window_size=(None, None)), "has no effect"),
  (dict(kind="softmax", query_offset=Z(2, int)), "has no effect without"),
  (dict(key_value_seq_lengths=[3, 10]), "from 3 to 10; must be from 0 to 9"),
  (dict(query_seq_lengths=np.array([-1, 2])), "from -1 to 2; must be from 0"),
  (dict(is_causal=True, query_offset=1.5), "=1.5; must be an integer"),
  (dict(is_causal=True, query_offset=True), "=True; must be an integer"),
  (dict(is_causal=True, query_offset=Z(3, int)), "must be an integer, or"),
  (dict(is_causal=True, query_offset=2**31), "=2147483648; must be from"),
  (dict(return_residual=True), "return_residual=True; rows are divided by no"),
  (dict(logit_bias=float("nan")), "logit_bias=nan; must be finite"),
  (dict(logit_bias=Z(3)), r"logit_bias.shape=\(3,\); must be \(4,\)"),
  (dict(alibi_slopes=Z(3)), "alibi_slopes.shape"),
  (dict(logit_bias="x"), "logit_bias='x'; must be an array of numbers"),
  (dict(logit_bias=True), "logit_bias.dtype=bool; must be a float"),
  (dict(alibi_slopes="x"), "alibi_slopes='x'; must be an array of numbers"),
  (dict(mask="x"), "mask='x'; must be an array of numbers"),
  (dict(is_causal=True, query_offset="x"), "query_offset='x'; must be an"),
  (dict(value=None), "value=None; must be an array of numbers"),
  (dict(key="x"), "key='x'; must be an array of numbers"),
  (dict(query_seq_lengths="x"), "query_seq_lengths.dtype=str32; must be an"),
  (dict(normalize="yes"), "normalize='yes'; must be True or False"),
  (dict(is_causal="no"), "is_causal='no'; must be True or False"),
  (dict(is_causal=Z(1, bool)), r"is_causal=array\(.*; must be True or False"),
  (dict(return_residual=1), "return_residual=1; must be True or False"),
  (dict(n="128"), "n='128'; must be a finite number"),
  (dict(n=True), "n=True; must be a finite number"),
  (dict(scale="1"), "scale='1'; must be a finite number"),
  (dict(n=0), "n=0; must be > 0"),
  (dict(scale=float("inf")), "scale=inf; must be a finite number"),
  (dict(scale=jnp.ones(2)), "scale=.*must be a finite number"),
  (dict(kind="softmax", scale=float("nan")), "scale=nan; must be a finite"),
  (dict(n=float("inf")), "n=inf; must be a finite number"),
  (dict(local_window_size=1.5), "local_window_size=1.5; must be a number"),
  (dict(local_window_size=(True, 1)), r"local_window_size=\(True, 1\)"),
  (dict(kind="softmax", local_window_size=(-1, 2)), "local_window_size="),
  (dict(bias=Z((6, 9), bool)), r"bias.dtype=bool; .* \(a bool array is a mask"),
  (dict(bias=Z((6, 9), complex)), "bias.dtype=complex64; must be a float"),
  (dict(kind="softmax", bias=Z((6, 9), bool)), "bias.dtype=bool; must be"),
  (dict(alibi_slopes=Z(4, complex)), "alibi_slopes.dtype=complex64"),
  (dict(kind="softmax", query_segment_ids=np.full((2, 6), 2**32 + 1),
        key_value_segment_ids=Z((2, 9), int)), "query_segment_ids from 42949"),
  (dict(query_seq_lengths=np.array([1, 2**32 + 1])), "from 1 to 4294967297"),
  (dict(local_window_size=(-1, 2)), r"local_window_size=\(-1, 2\)"),
  (dict(mask=Z((2, 1, 6, 9))), "mask.dtype=float32; must be bool"),
  (dict(mask=Z((2, 3, 6, 9), bool)), r"mask.shape=\(2, 3, 6, 9\)"),
  (dict(bias=Z((5, 4, 6, 9))), "bias.shape"),
  (dict(query_seq_lengths=Z(3, int)), "query_seq_lengths.shape"),
  (dict(key_value_seq_lengths=Z(2)), "key_value_seq_lengths.dtype"),
  (dict(query_segment_ids=Z((2, 6), int)), "give both or neither"),
  (dict(value=Z((2, 8, 4, 8), np.float32)), "must have the same shape"),
  (dict(key=Z((2, 9, 3, 8), np.float32)), r"key.shape=\(2, 9, 3, 8\), value"),
  (dict(query=Z((2, 6, 4, 7), np.float32)), "key.shape"),
  (dict(query=Z((2, 6, 3, 8), np.float32)), "4 heads; must divide the"),
  (dict(query=Z((6, 8), np.float32)), "query.shape"),
  (dict(query=Z((2, 6, 4, 8), np.float16)), "key.dtype=float32"),
]  # fmt: skip


@pytest.mark.parametrize(
  ("change", "message"), BAD, ids=[str(list(bad)) + m for bad, m in BAD]
)
def test_bad_arguments_are_refused_by_name(change, message):
  query, key, value = draw()
  arguments = dict(query=query, key=key, value=value) | change
  with pytest.raises(ValueError, match=message):
    dot_product_attention(**arguments)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_causal_queries_beyond_all_keys_see_all_of_them(kind):
  """The keys may be a part of the text that ends before the queries."""
  arrays = draw()
  expected = dot_product_attention(*arrays, kind=kind)
  found = dot_product_attention(
    *arrays, kind=kind, is_causal=True, query_offset=300
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("array", [np.bool_, np.asarray, jnp.asarray])
def test_a_bool_may_be_an_array(array):
  arrays = draw()
  found = dot_product_attention(*arrays, is_causal=array(True))
  wanted = dot_product_attention(*arrays, is_causal=True)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
  "static",
  [
    dict(is_causal=True),
    dict(normalize=True),
    dict(return_residual=True),
    dict(n=128),
    dict(local_window_size=(3, 0)),
  ],
  ids=str,
)
def test_a_traced_argument_that_must_be_known_is_refused(static):
  """The program is compiled for these; jax itself refuses traced strings."""
  [name] = static
  said = f"{name}=.*; must be a Python value.* static_argnames='{name}'"
  with pytest.raises(ValueError, match=said):
    jax.jit(dot_product_attention)(*draw(), **static)


@pytest.mark.parametrize("causal", [False, True])
def test_a_low_bias_makes_normalized_sigmoid_softmax(causal):
  """With logits far below -b, sigmoid(z + b) is e^(z + b)."""
  query, key, value = draw()
  wanted = dot_product_attention(
    query, key, value, kind="softmax", is_causal=causal
  )
  found = dot_product_attention(
    query, key, value, logit_bias=-20.0, normalize=True, is_causal=causal
  )
  close(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("logit", [-80.0, -120.0])
def test_a_row_whose_weights_underflow_is_zero_with_finite_gradients(logit):
  """With logits of -80 - 14, weights are below float32's smallest number."""
  query, key, value = (jnp.ones((1, 3, 1, 4)) for _ in range(3))

  def loss(query, key, value):
    out, sums = dot_product_attention(
      query, key, value, scale=logit / 4, logit_bias=-14.0, normalize=True,
      return_residual=True,
    )  # fmt: skip
    return out.sum() + sums.sum(), (out, sums)

  (_, (out, sums)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
    query, key, value
  )
  assert (out == 0).all()
  assert (sums == 0).all()
  assert all(np.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("kind", ["sigmoid", "relu", "relu2"])
def test_normalized_rows_add_up_to_one_and_the_residual_is_their_sum(kind):
  query, key, value = draw()
  ones = jnp.ones_like(value)
  options = dict(kind=kind, is_causal=True, normalize=True)
  out, sums = dot_product_attention(
    query, key, ones, return_residual=True, **options
  )
  assert sums.dtype == jnp.float32
  seen = sums > 0  # a row of ReLU may have no weight at all
  close(out, jnp.broadcast_to(seen[..., None], out.shape) * 1.0, rtol=1e-5)
  plain = dot_product_attention(query, key, ones, kind=kind, is_causal=True)
  close(sums, plain[..., 0], rtol=1e-5)
  weights = sigattn.attention_weights(query, key, **options)
  close(weights.weights_BNTS.sum(-1), jnp.moveaxis(seen, 1, 2) * 1.0, 1e-5)
  one = dot_product_attention(
    query[0], key[0], ones[0], return_residual=True, **options
  )
  close(one[1], sums[0])


def test_residual_of_softmax_is_that_of_jax_nn():
  query, key, value = draw()
  options = dict(is_causal=True, return_residual=True)
  wanted = jax.nn.dot_product_attention(query, key, value, **options)
  found = dot_product_attention(query, key, value, kind="softmax", **options)
  for x, y in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(x, y)


def test_a_call_of_a_compiled_program_runs_no_python():
  """As with jax.nn: a training step would pay it for each of its arrays."""
  x = jnp.ones((1, 8, 2, 4))
  ours = jax.jit(lambda x: sigattn.dot_product_attention(x, x, x))
  plain = jax.jit(lambda x: x + 1)

  def python_calls(function):
    for _ in range(3):
      function(x)
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(event))
    function(x)
    sys.setprofile(None)
    return seen.count("call")

  assert python_calls(ours) == python_calls(plain)
