"""Blocks against their formulas in NumPy; the stack against a loop."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sigattn import attention, layers, positions
from sigattn.kernels import device

B, T, D, N, H, F = 2, 5, 8, 2, 4, 12
LONGEST = 7  # differs from T: n is the constant of the constructor


def fill(make):
  """Makes a module with random parameters that are neither 0 nor 1, quickly."""
  graphdef, shapes = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(0)
  draw = functools.partial(rng.normal, 0.1, 0.3)
  return nnx.merge(
    graphdef, jax.tree.map(lambda x: jnp.float32(draw(x.shape)), shapes)
  )


def compiled(module, *args, **kwargs):
  graphdef, state = nnx.split(module)
  return jax.jit(lambda s: nnx.merge(graphdef, s)(*args, **kwargs))(state)


def make_stack(depth, **options):
  return layers.Stack(depth, make_block, rngs=nnx.Rngs(0), **options)


def params(module):
  return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module)))


def inputs(length=T, seed=1):
  return jax.random.normal(jax.random.key(seed), (B, length, D))


def make_attention(**options):
  options = dict(max_length=LONGEST, rngs=nnx.Rngs(0)) | options
  return layers.SelfAttention(D, N, **options)


def make_block(rngs, attn=None, mlp="gelu", **options):
  return layers.Block(
    D,
    make_attention(rngs=rngs, **(attn or {})),
    layers.Mlp(D, F, mlp, rngs=rngs),
    rngs=rngs,
    **options,
  )


# The formulas, in NumPy.


def numpy_norm(p, x):
  epsilon = 1e-5
  if "bias" in p:
    x, epsilon = x - x.mean(-1, keepdims=True), 1e-6
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"]
  return x + p.get("bias", 0.0)


def numpy_attention(p, x_BTD, alibi=False, kind="sigmoid"):
  q, k, v = (
    np.einsum("BTD,DNH->BTNH", x_BTD, p[name]["kernel"]) + p[name]["bias"]
    for name in ("query", "key", "value")
  )
  if "query_norm" in p:
    q, k = numpy_norm(p["query_norm"], q), numpy_norm(p["key_norm"], k)
  logits = np.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(H)
  if alibi:
    distance = abs(np.arange(T)[:, None] - np.arange(T))
    logits -= np.array([2.0**-4, 2.0**-8])[:, None, None] * distance
  if "forget_gate" in p:  # only for causal layers
    open_BTN = 1 / (1 + np.exp(-numpy_linear(p["forget_gate"], x_BTD)))
    for i in range(T):
      for j in range(i + 1):
        logits[:, :, i, j] += np.log(open_BTN[:, j + 1 : i + 1]).sum(1)
    logits += np.triu(np.full((T, T), -np.inf), 1)
  weights = 1 / (1 + np.exp(-(logits - math.log(LONGEST))))
  if kind == "softmax":
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  out = np.einsum("BNTS,BSNH->BTNH", weights, v)
  return np.einsum("BTNH,NHD->BTD", out, p["out"]["kernel"]) + p["out"]["bias"]


def numpy_linear(p, x):
  return x @ p["kernel"] + p["bias"]


def numpy_mlp(p, x):
  up = numpy_linear(p["up"], x)
  if "gate" in p:
    gate = numpy_linear(p["gate"], x)
    return numpy_linear(p["down"], gate / (1 + np.exp(-gate)) * up)
  inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
  gelu = up * 0.5 * (1 + np.tanh(inner))
  return numpy_linear(p["down"], gelu)


def numpy_residual(p, x, f, place):
  scale = p["layer_scale"]["scale"] if "layer_scale" in p else 1.0
  if place == "pre":
    return x + scale * f(numpy_norm(p["norm_in"], x))
  if place == "post":
    return numpy_norm(p["norm_out"], x + scale * f(x))
  y = f(numpy_norm(p["norm_in"], x))
  return x + scale * numpy_norm(p["norm_out"], y)


def test_gelu_in_bfloat16_is_rounded_once():
  x = jnp.linspace(-6, 6, 999).astype(jnp.bfloat16)
  y = np.asarray(x, np.float64)
  exact = y / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
  found = np.asarray(layers._gelu_tanh(x), np.float64)
  # jax.nn.gelu is off by 0.6 of the value at -3.
  np.testing.assert_allclose(found, exact, rtol=1.01 * 2**-8)


def test_gelu_of_float64_stays_float64():
  x = np.linspace(-6, 6, 97)
  inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
  slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
  tanh = np.tanh(inner)
  with jax.enable_x64(True):
    found, tangent = jax.jvp(
      layers._gelu_tanh, (jnp.asarray(x),), (jnp.ones(97),)
    )
  np.testing.assert_allclose(found, x * (1 + tanh) / 2, atol=1e-14)
  wanted = (1 + tanh) / 2 + x * (1 - tanh**2) * slope / 2
  np.testing.assert_allclose(tangent, wanted, atol=1e-14)


@pytest.mark.parametrize("kind", ["gelu", "gelu_exact"])
def test_an_mlp_in_bfloat16_keeps_one_hidden_array(kind):
  """Its gradient is that of gelu, recomputed from the output of W_up."""
  x_BTD = jax.random.normal(jax.random.key(0), (2, 3, 8))

  def pull_back(dtype, apply):
    """The gradient, and the hidden arrays that are kept."""
    mlp = layers.Mlp(8, 40, kind, dtype=dtype, rngs=nnx.Rngs(0))
    out, pull = jax.vjp(lambda x: apply(mlp, x), x_BTD.astype(dtype))
    kept = [x for x in jax.tree.leaves(pull) if x.shape == (2, 3, 40)]
    return pull(jnp.ones_like(out))[0].astype("float32"), len(kept)

  def plain(mlp, x_BTD):
    hidden_BTF = jax.nn.gelu(mlp.up(x_BTD), approximate=kind == "gelu")
    return mlp.down(hidden_BTF)

  found, kept = pull_back("bfloat16", layers.Mlp.__call__)
  assert kept == 1
  exact, rounded = (pull_back(x, plain)[0] for x in ("float32", "bfloat16"))
  assert jnp.std(found - exact) <= jnp.std(rounded - exact)


@pytest.mark.parametrize("norm", ["pre", "post", "hybrid"])
@pytest.mark.parametrize(
  ("norm_kind", "layer_scale", "mlp"),
  [("layernorm", None, "gelu"), ("rmsnorm", 0.1, "swiglu")],
)
def test_block_is_its_formula(norm, norm_kind, layer_scale, mlp):
  options = dict(norm=norm, norm_kind=norm_kind, layer_scale=layer_scale)
  block = fill(lambda: make_block(nnx.Rngs(0), mlp=mlp, **options))
  p, x = params(block), inputs()
  attn = functools.partial(numpy_attention, p["attn"])
  expected = numpy_residual(p["attn_residual"], np.asarray(x), attn, norm)
  mlp = functools.partial(numpy_mlp, p["mlp"])
  expected = numpy_residual(p["mlp_residual"], expected, mlp, norm)
  found = compiled(block, x)
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("qk_norm", ["none", "layernorm", "rmsnorm"])
@pytest.mark.parametrize("alibi", [False, True])
def test_attention_is_its_formula(qk_norm, alibi):
  layer = fill(lambda: make_attention(qk_norm=qk_norm, alibi=alibi))
  expected = numpy_attention(params(layer), np.asarray(inputs()), alibi)
  np.testing.assert_allclose(layer(inputs()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_a_forget_gate_is_its_formula(kind):
  layer = fill(
    lambda: make_attention(forget_gate=True, is_causal=True, kind=kind)
  )
  x_BTD = np.asarray(inputs())
  expected = numpy_attention(params(layer), x_BTD, kind=kind)
  np.testing.assert_allclose(layer(x_BTD), expected, rtol=1e-4, atol=1e-5)
  # The sum runs on over the segments, but a token sees only its own one.
  ids = jnp.array([[0] * 2 + [1] * (T - 2)] * B)
  tail = layer(x_BTD[:, 2:])
  packed = layer(x_BTD, segment_ids=ids)[:, 2:]
  np.testing.assert_allclose(packed, tail, rtol=1e-5, atol=1e-6)
  graphdef, state = nnx.split(layer)

  def total(state):
    return (nnx.merge(graphdef, state)(x_BTD) ** 2).sum()

  for part in jax.tree.leaves(jax.grad(total)(state).forget_gate):
    assert (abs(part) > 1e-6).all()


def test_initial_gates_are_nearly_open_and_sums_are_float32():
  gate = layers.ForgetGate(D, N, dtype="bfloat16", rngs=nnx.Rngs(0))
  c_1TN = gate(jnp.zeros((1, 2048, D), "bfloat16"))
  expected = -math.log1p(math.exp(-3)) * np.arange(1, 2049)
  np.testing.assert_allclose(c_1TN[0, :, 0], expected, rtol=1e-5)


def test_row_scaling_divides_by_a_power_of_the_keys_seen():
  options = dict(is_causal=True, use_bias=False)
  plain = fill(lambda: make_attention(**options))
  scaled = fill(lambda: make_attention(row_power=0.5, **options))
  where = jnp.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
  expected = compiled(plain, inputs()) / jnp.sqrt(where + 1)[:, :, None]
  found = compiled(scaled, inputs(), positions=where)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="positions=None; needed"):
    scaled(inputs())


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_token_does_not_see_beyond_its_window(is_causal):
  layer = make_attention(window=2, is_causal=is_causal)
  x_BTD = inputs()
  changed = x_BTD.at[:, 4].add(1.0)
  moved = jnp.abs(layer(changed) - layer(x_BTD)).max((0, 2)) > 1e-6
  last = min(4 + 2, x_BTD.shape[1] - 1)
  wanted = [
    4 <= i <= last if is_causal else abs(i - 4) <= 2
    for i in range(x_BTD.shape[1])
  ]
  assert moved.tolist() == wanted


@pytest.mark.parametrize("kind", attention.KINDS)
def test_every_kind_has_the_same_parameters_and_another_output(kind):
  first, layer = make_attention(kind="sigmoid"), make_attention(kind=kind)
  jax.tree.map(np.testing.assert_array_equal, params(first), params(layer))
  found = layer(inputs())
  assert found.shape == (B, T, D)
  assert np.isfinite(found).all()
  assert (kind == "sigmoid") == np.allclose(found, first(inputs()))


@pytest.mark.parametrize("qk_norm", ["none", "layernorm", "rmsnorm"])
def test_qk_norm_takes_the_scale_out_of_the_projections(qk_norm):
  layer = make_attention(qk_norm=qk_norm)
  before = layer(inputs())
  for projection in (layer.query, layer.key):
    projection.kernel[...] = 7 * projection.kernel[...]
  same = np.allclose(layer(inputs()), before, rtol=1e-4, atol=1e-5)
  assert same == (qk_norm != "none")


def test_rotate_comes_after_the_norm_on_queries_and_keys_alone():
  rotate = functools.partial(positions.rope, positions=np.arange(T))
  plain = make_attention(qk_norm="layernorm")
  layer = make_attention(qk_norm="layernorm", rotate=rotate)
  # This scale differs between features, so it does not commute with rotation.
  scale = jnp.arange(1.0, H + 1)
  for module in (plain, layer):
    module.query_norm.scale[...] = module.key_norm.scale[...] = scale
  x = inputs()
  q, k = (
    rotate(norm(project(x)))
    for norm, project in (
      (plain.query_norm, plain.query),
      (plain.key_norm, plain.key),
    )
  )
  out = attention.dot_product_attention(q, k, plain.value(x), n=LONGEST)
  np.testing.assert_allclose(layer(x), plain.out(out), rtol=1e-5, atol=1e-6)
  assert not np.allclose(layer(x), plain(x), atol=1e-3)


def test_learnt_logit_bias_starts_at_the_fixed_one():
  for kind, start in (("sigmoid", -math.log(LONGEST)), ("relu", 0.0)):
    layer = make_attention(kind=kind, learn_logit_bias=True)
    np.testing.assert_allclose(layer.logit_bias[...], [start] * N, rtol=1e-6)
    fixed = make_attention(kind=kind)
    np.testing.assert_allclose(layer(inputs()), fixed(inputs()), atol=1e-6)
  layer = make_attention(logit_bias=-2.5, learn_logit_bias=True)
  fixed = make_attention(logit_bias=-2.5)
  np.testing.assert_allclose(layer(inputs()), fixed(inputs()), atol=1e-6)
  assert not np.allclose(fixed(inputs()), make_attention()(inputs()))


def test_learnt_logit_bias_has_the_gradient_of_finite_differences():
  layer = make_attention(learn_logit_bias=True)
  x = inputs()

  @jax.jit
  def loss(bias_N):
    state = {"logit_bias": bias_N}
    return (nnx.merge(graphdef, rest | state)(x) ** 2).sum()

  graphdef, rest = nnx.split(layer)
  rest = nnx.to_pure_dict(rest)
  start = rest["logit_bias"]
  found = jax.grad(loss)(start)
  for head in range(N):
    step = jnp.zeros(N).at[head].set(1e-2)
    expected = (loss(start + step) - loss(start - step)) / 2e-2
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(found[head], expected, rtol=1e-2)


def test_fewer_kv_heads_equal_repeated_ones():
  grouped, full = make_attention(num_kv_heads=1), make_attention()
  assert grouped.key.kernel.shape == (D, 1, H)
  for name in ("query", "out"):
    getattr(full, name).kernel[...] = getattr(grouped, name).kernel[...]
  for name in ("key", "value"):
    kernel = getattr(grouped, name).kernel[...]
    getattr(full, name).kernel[...] = jnp.repeat(kernel, N, axis=1)
  x = inputs()
  np.testing.assert_allclose(grouped(x), full(x), rtol=1e-5, atol=1e-6)


def test_causal_output_has_no_gradient_from_later_tokens():
  def jacobian(layer):
    return jax.jacobian(lambda x: layer(x)[0].sum(-1))(inputs())[:, 0]

  later = np.triu(np.ones((T, T)), 1)[:, :, None]
  causal = jacobian(make_attention(is_causal=True))
  assert (np.asarray(causal * later) == 0).all()
  assert (abs(causal).max(-1) > 0).sum() == T * (T + 1) // 2
  assert abs(jacobian(make_attention()) * later).max() > 0


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_padding_segments_and_mask_equal_the_shorter_sequence(kind):
  layer = make_attention(kind=kind)
  x = inputs()
  short = layer(x[:, :3])
  lengths = layer(x, seq_lengths=jnp.full((B,), 3))
  ids = jnp.array([[0, 0, 0, 1, 1]] * B)
  packed = layer(x, segment_ids=ids)
  mask = (jnp.arange(T) < 3)[None, None, None, :]
  masked = layer(x, mask=jnp.broadcast_to(mask, (1, 1, T, T)))
  for found in (lengths, packed, masked):
    np.testing.assert_allclose(found[:, :3], short, rtol=1e-5, atol=1e-6)
  tail = layer(x[:, 3:])
  np.testing.assert_allclose(packed[:, 3:], tail, rtol=1e-5, atol=1e-6)
  assert not np.allclose(layer(x)[:, :3], short, atol=1e-3)


def test_bfloat16_activations_float32_parameters():
  x = inputs()
  options = dict(qk_norm="rmsnorm", dtype=jnp.bfloat16)
  layer, exact = make_attention(**options), make_attention(qk_norm="rmsnorm")
  found = layer(x.astype(jnp.bfloat16))
  assert found.dtype == jnp.bfloat16
  assert {a.dtype.name for a in jax.tree.leaves(params(layer))} == {"float32"}
  difference = np.linalg.norm(found.astype(jnp.float32) - exact(x))
  assert 0 < difference < 0.02 * np.linalg.norm(exact(x))


def test_norm_of_bfloat16_is_computed_in_float32():
  x = (1000 + inputs()).astype(jnp.bfloat16)
  for kind in layers.NORMS:
    norm = layers.make_norm(kind, D, nnx.Rngs(0))
    found = layers.normalize(norm, x)
    exact = norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact)


def test_initial_kernels_are_xavier_uniform_and_biases_zero():

  @jax.jit
  def state():
    return nnx.state(layers.Stack(2, wide_block, rngs=nnx.Rngs(0)))

  found = jax.tree.map(np.asarray, nnx.to_pure_dict(state()))["blocks"]
  for kernel, fans in (
    (found["attn"]["query"]["kernel"], 64 + 64),
    (found["attn"]["out"]["kernel"], 64 + 64),
    (found["mlp"]["up"]["kernel"], 64 + 256),
    (found["mlp"]["down"]["kernel"], 64 + 256),
  ):
    limit = math.sqrt(6 / fans)
    assert 0.99 * limit < abs(kernel).max() <= limit
    assert kernel.std() == pytest.approx(limit / math.sqrt(3), rel=0.03)
    assert (kernel[0] != kernel[1]).all()  # each layer has its own parameters
  assert not found["mlp"]["up"]["bias"].any()
  assert (found["mlp_residual"]["norm_in"]["scale"] == 1).all()
  assert (found["mlp_residual"]["layer_scale"]["scale"] == 1e-4).all()


def wide_block(rngs):
  attn = layers.SelfAttention(64, 2, max_length=T, rngs=rngs)
  mlp = layers.Mlp(64, 256, rngs=rngs)
  return layers.Block(64, attn, mlp, layer_scale=np.float32(1e-4), rngs=rngs)


# The stack.


@pytest.mark.parametrize("depth", [2, layers.MAX_UNROLLED + 1])
def test_stack_equals_a_loop_over_its_layers(depth):
  stack = fill(lambda: make_stack(depth))
  graphdef, states = nnx.split(stack.blocks)
  x = inputs()
  for i in range(depth):
    x = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], states))(x)
  found = compiled(stack, inputs())
  np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


def lowered_lines(depth, **options):
  stack = nnx.eval_shape(lambda: make_stack(depth, **options))
  graphdef, state = nnx.split(stack)

  def loss(state, x):
    return nnx.merge(graphdef, state)(x).sum()

  return jax.jit(jax.grad(loss)).lower(state, inputs()).as_text().count("\n")


def test_program_does_not_grow_with_a_depth_that_is_scanned():
  scanned = layers.MAX_UNROLLED + 1
  assert lowered_lines(scanned) == lowered_lines(4 * scanned)
  scanned = {"remat": "all", "max_unrolled": 0}
  assert lowered_lines(2, **scanned) == lowered_lines(3, **scanned)
  assert lowered_lines(2) < lowered_lines(3)  # unrolled


def test_remat_changes_neither_loss_nor_gradients():
  def run(remat, max_unrolled=0):
    def make():
      def block(rngs):
        return make_block(rngs, {"normalize": True}, "swiglu")

      return layers.Stack(
        2, block, remat=remat, max_unrolled=max_unrolled, drop_path=0.3,
        rngs=nnx.Rngs(0),
      )  # fmt: skip

    graphdef, state = nnx.split(fill(make))

    def loss(state):
      y = nnx.merge(graphdef, state)(inputs(), jax.random.key(2))
      return (y**2).sum()

    function = jax.value_and_grad(loss)
    assert ("remat" in str(jax.make_jaxpr(function)(state))) == (
      remat != "none"
    )
    return jax.jit(function)(state)

  wanted = run("none")
  for found in (run("all"), run("dots", 2), run("attention+up")):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      found,
      wanted,
    )


@pytest.mark.parametrize("remat", ["attention up", "", "dots+attention", "Up"])
def test_remat_must_be_a_policy_or_names(remat):
  wanted = re.escape(f"remat={remat!r}; must be none, dots, all, or some of")
  with pytest.raises(ValueError, match=wanted):
    make_stack(2, remat=remat)


REMATS = {"all": True, "dots": False, "attention": False, "gate+up": True}


@pytest.mark.parametrize(("remat", "again"), REMATS.items())
@pytest.mark.parametrize("normalize", [False, True])
def test_kept_attention_is_not_computed_again(
  remat, again, normalize, monkeypatch
):
  hopper = device.Device("NVIDIA H200", 90)
  monkeypatch.setattr(device, "current", lambda: hopper)
  attn = layers.SelfAttention(
    128, 2, max_length=128, normalize=normalize, dtype="bfloat16",
    rngs=nnx.Rngs(0),
  )  # fmt: skip

  graphdef, state = nnx.split(attn)

  @jax.grad
  def gradient(state, x_BTD):
    def run(state, x_BTD):
      return nnx.merge(graphdef, state)(x_BTD)

    run = jax.checkpoint(run, policy=layers.remat_policy(remat))
    return (run(state, x_BTD).astype(jnp.float32) ** 2).sum()

  x_BTD = jax.ShapeDtypeStruct((1, 128, 128), "bfloat16")
  lowered = (
    jax.jit(gradient).trace(state, x_BTD).lower(lowering_platforms=("cuda",))
  )
  text = lowered.as_text()
  # For short sequences the backward pass has two kernels. With normalised rows,
  # a third one divides do by their sums.
  assert text.count("custom_call @mosaic_gpu") == 3 + normalize
  assert text.count("call @sigattn_attention") == 1 + again
  assert text.count("call @sigattn_pullback") == 1


@pytest.mark.parametrize(("remat", "again"), REMATS.items())
def test_kept_softmax_of_cudnn_is_not_computed_again(remat, again, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000
  )
  attn = layers.SelfAttention(
    128, 2, max_length=128, kind="softmax", implementation="cudnn",
    dtype="bfloat16", rngs=nnx.Rngs(0),
  )  # fmt: skip

  @jax.grad
  def gradient(x_BTD):
    run = jax.checkpoint(attn, policy=layers.remat_policy(remat))
    return (run(x_BTD).astype(jnp.float32) ** 2).sum()

  traced = str(jax.make_jaxpr(gradient)(jnp.ones((1, 128, 128), "bfloat16")))
  assert traced.count("dot_product_attention_fwd") == 1 + again


class Probe(nnx.Module):
  """Records the rate, the rng and the order that a stack gives its layers."""

  def __init__(self, rngs):
    self.unused = nnx.Param(jnp.zeros(()))

  def __call__(self, x_BTD, rng, rate):
    draw = 0.0 if rng is None else jax.random.uniform(rng)
    seen = jnp.stack([jnp.asarray(rate, jnp.float32), jnp.asarray(draw)])
    return jnp.concatenate([x_BTD[:, 1:], seen[None, None]], axis=1)


@pytest.mark.parametrize("depth", [1, 3, layers.MAX_UNROLLED + 2])
def test_drop_rate_is_linear_in_the_depth_and_every_layer_draws_anew(depth):
  stack = layers.Stack(depth, Probe, drop_path=0.6, rngs=nnx.Rngs(0))
  empty = jnp.zeros((1, depth, 2))
  seen = np.asarray(stack(empty, jax.random.key(0))[0])
  rates = [0.6] if depth == 1 else np.linspace(0, 0.6, depth)
  np.testing.assert_allclose(seen[:, 0], rates, rtol=1e-6)
  assert len(set(seen[:, 1].tolist())) == depth
  assert (stack(empty)[0, :, 1] == 0).all()  # no rng: no draws


def test_drop_path_keeps_the_expectation():
  x = jnp.ones((20_000, 2, 3))
  found = np.asarray(layers.drop_path(x, jax.random.key(0), 0.3))
  kept = found[:, 0, 0] > 0
  assert (found == np.where(kept, np.float32(1 / 0.7), 0)[:, None, None]).all()
  assert kept.mean() == pytest.approx(0.7, abs=0.015)
  same = layers.drop_path(x, jax.random.key(0), 0.0)
  np.testing.assert_array_equal(same, x)


def test_block_drops_numbers_of_what_it_adds():
  block = layers.Block(
    D, jnp.ones_like, jnp.ones_like, dropout=0.5, rngs=nnx.Rngs(0)
  )
  x = jnp.zeros((64, T, D))
  found = np.asarray(block(x, jax.random.key(0)))
  assert set(found.ravel().tolist()) == {0.0, 2.0, 4.0}
  # Each branch draws its own mask, so 2, 1 or 0 of the two branches remain.
  assert (found == 2).mean() == pytest.approx(0.5, abs=0.05)
  assert (block(x) == 2).all()


def test_block_drops_its_branches_apart():
  def ones(x_BTD):
    return jnp.ones_like(x_BTD)

  def tens(x_BTD):
    return jnp.full_like(x_BTD, 10)

  block = layers.Block(D, ones, tens, rngs=nnx.Rngs(0))
  x = jnp.zeros((64, T, D))
  found = block(x, jax.random.key(0), 0.5)
  assert (found == found[:, :1, :1]).all()
  assert set(found[:, 0, 0].tolist()) == {0.0, 2.0, 20.0, 22.0}
  assert (block(x, None, 0.5) == 11).all()


def test_stack_without_rng_or_rate_is_deterministic():
  dropping = fill(lambda: make_stack(2, drop_path=0.9))
  plain = fill(lambda: make_stack(2))
  x, key = inputs(), jax.random.key(0)
  expected = compiled(plain, x)
  np.testing.assert_array_equal(compiled(dropping, x), expected)
  np.testing.assert_array_equal(compiled(plain, x, key), expected)
  assert not np.allclose(compiled(dropping, x, key), expected)


def test_stack_hands_masks_to_every_layer():
  stack = fill(lambda: make_stack(2))
  x, lengths = inputs(), jnp.full((B,), 3)
  short = compiled(stack, x[:, :3])
  padded = compiled(stack, x, seq_lengths=lengths)
  np.testing.assert_allclose(padded[:, :3], short, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("shape", "place", "said"),
  [
    ((T, D), None, r"x_BTD\.shape=\(5, 8\); must be .*give x_BTD\[None\]"),
    ((B, T, 7), None, r"x_BTD\.shape=\(2, 5, 7\); must be \(B, T, 8\)$"),
    ((B, T, D), 3, "place=3; must be None without a cache"),
  ],
)
def test_a_senseless_call_is_refused(shape, place, said):
  with pytest.raises(ValueError, match=said):
    make_attention(is_causal=True)(jnp.zeros(shape), place=place)


@pytest.mark.parametrize("name", ["mask", "seq_lengths", "segment_ids"])
def test_a_mask_that_decoding_would_ignore_is_refused(name):
  slots = jnp.zeros((B, 4, N, D // N))
  options = dict(cache=layers.Cache(slots, slots), place=3)
  shape = dict(mask=(1, 1, 1, 4), seq_lengths=(B,), segment_ids=(B, 1))[name]
  options[name] = jnp.ones(shape, bool if name == "mask" else int)
  with pytest.raises(ValueError, match=f"{name} of shape .* with `place`"):
    make_attention(is_causal=True)(jnp.zeros((B, 1, D)), **options)


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda: make_attention(kind="gelu"), "kind='gelu'; choose"),
    (lambda: make_attention(qk_norm="l2"), "qk_norm='l2'; choose"),
    (lambda: make_attention(num_kv_heads=3), "num_kv_heads=3; must divide"),
    (
      lambda: layers.SelfAttention(D, 3, max_length=T, rngs=nnx.Rngs(0)),
      "num_heads=3; must divide width=8",
    ),
    (lambda: make_attention(kind="softmax", logit_bias=0.0), "logit_bias=0.0"),
    (
      lambda: make_attention(kind="softmax", learn_logit_bias=True),
      "learn_logit_bias=True",
    ),
    (lambda: make_attention(row_power=1.0), "row_power=1.0; must be 0"),
    (lambda: make_attention(forget_gate=True), "forget_gate=True; must be F"),
    (lambda: layers.Mlp(D, F, "relu", rngs=nnx.Rngs(0)), "kind='relu'; choose"),
    (lambda: make_attention(dtype="bf16"), "dtype='bf16'; must be a float"),
    (lambda: make_attention(dtype=int), "dtype=<class 'int'>; must be a float"),
    (lambda: make_attention(rotate="rope"), "rotate='rope'; must be None or"),
    (lambda: make_block(nnx.Rngs(0), norm="both"), "norm='both'; choose"),
    (lambda: make_block(nnx.Rngs(0), norm_kind="l"), "norm_kind='l'; choose"),
  ],
)
def test_senseless_argument_is_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()


@pytest.mark.parametrize("forget_gate", [True, False])
def test_a_cache_of_another_layer_is_refused(forget_gate):
  slots = jnp.zeros((B, 4, N, D // N))
  sums = None if forget_gate else slots[..., 0]
  layer = make_attention(is_causal=True, forget_gate=forget_gate)
  said = rf"cache\.forgotten_BSN=.* where forget_gate={forget_gate}"
  with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)):
    layer(jnp.zeros((B, 1, D)), cache=layers.Cache(slots, slots, sums))


def test_a_cache_in_8_bits_saturates_and_keeps_nan():
  """Numbers up to 464 are rounded to 448; astype makes larger ones NaN."""
  attn = fill(
    lambda: layers.SelfAttention(D, N, max_length=9, rngs=nnx.Rngs(0))
  )
  x_1T1 = jnp.array([1.0, 1e4, -1e4, jnp.nan])[None, :, None]
  x_BTD = jnp.broadcast_to(x_1T1, (1, 4, D))
  empty = jnp.zeros((1, 5, N, H), "float8_e4m3fn")
  _, cache = compiled(attn, x_BTD, cache=layers.Cache(empty, empty))
  exact = attn.key(x_BTD), attn.value(x_BTD)
  for found, wanted in zip(cache[:2], exact, strict=True):
    found = found.astype("float32")
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=2**-4)
    np.testing.assert_array_equal(found[:, 1], 448 * jnp.sign(wanted[:, 1]))
    np.testing.assert_array_equal(found[:, 2], 448 * jnp.sign(wanted[:, 2]))
    assert jnp.isnan(found[:, 3]).all()
    assert not found[:, 4].any()
