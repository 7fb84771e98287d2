"""Telemetry has the same numbers as NumPy, and does not change training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import lm_sigmoid, vit_sigmoid
from sigattn import attention, layers, positions, tasks
from sigattn.analysis import attention_maps, telemetry
from sigattn.training import metrics, setup
from train import train

KINDS = ("sigmoid", "softmax", "relu", "relu2")
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_WIDTH, N = 3, 6, 4, 2, 8, 9
WIDTH = HEADS * HEAD_WIDTH

# Rows end in padding. Lengths or segment 0 mark it.
SEQ_LENGTHS = np.array([6, 4, 1], np.int32)
SEGMENTS = np.array([[1] * 6, [1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0]], np.int32)
REAL = np.arange(LENGTH)[None] < SEQ_LENGTHS[:, None]
MASKS = {
  "lengths": dict(
    query_seq_lengths=SEQ_LENGTHS, key_value_seq_lengths=SEQ_LENGTHS
  ),
  "segments": dict(
    query_segment_ids=SEGMENTS, key_value_segment_ids=SEGMENTS, is_causal=True
  ),
  "mask": dict(mask=np.tril(np.ones((1, 1, LENGTH, LENGTH), bool), 1)),
}


def visible(name):
  """bool (B, T, S): which keys each row sees; none for padding rows."""
  i, j = np.mgrid[:LENGTH, :LENGTH]
  if name == "lengths":
    seen = REAL[:, None, :]
  elif name == "segments":
    seen = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (j <= i)
  else:
    seen = (j <= i + 1)[None]
  return seen & REAL[:, :, None]


def arrays(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  heads = HEADS, KV_HEADS, KV_HEADS
  return [
    2 * jax.random.normal(key, (BATCH, LENGTH, n, HEAD_WIDTH))
    for key, n in zip(keys, heads, strict=True)
  ]


def numpy_logits(query, key, bias, slopes):
  """Logits (B, N, T, S) in float64, as the sum of their terms."""
  q, k = (np.asarray(x, np.float64) for x in (query, key))
  k = np.repeat(k, HEADS // KV_HEADS, axis=2)
  z = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(HEAD_WIDTH)
  distance = abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)))
  return z + bias - slopes[:, None, None] * distance


def numpy_statistics(kind, z, seen, value, kernel):
  """{name: (N,)}, computed by loops over heads, examples and rows."""
  value = np.repeat(np.asarray(value, np.float64), HEADS // KV_HEADS, axis=2)
  statistics = {}
  for head in range(HEADS):
    norms, sums, entropies, logits, weights = [], [], [], [], []
    for example in range(BATCH):
      rows = []
      for row in np.flatnonzero(seen[example].any(-1)):
        keys = seen[example, row]
        logit = z[example, head, row, keys]
        weight = {
          "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
          "softmax": lambda x: np.exp(x) / np.exp(x).sum(),
          "relu": lambda x: np.maximum(x, 0) / N,
          "relu2": lambda x: np.maximum(x, 0) ** 2 / N,
        }[kind](logit)
        rows.append(np.zeros(LENGTH))
        rows[-1][keys] = weight
        sums.append(weight.sum())
        p = weight[weight > 0] / weight.sum()
        entropies.append(-(p * np.log(p)).sum())
        logits += [*logit]
        weights += [*weight]
      a_TS = np.array(rows)
      out_TH = a_TS @ value[example, :, head]
      projected = out_TH @ np.asarray(kernel, np.float64)[head]
      norms.append([np.linalg.norm(x) for x in (a_TS, out_TH, projected)])
    weights = np.array(weights)
    saturated = (
      weights > 0.99 if kind in ("sigmoid", "softmax") else weights == 0
    )
    values = dict(
      zip(
        ("attention_norm", "attention_v_norm", "projection_norm"),
        np.mean(norms, axis=0),
        strict=True,
      ),
      row_sum_mean=np.mean(sums),
      row_sum_max=np.max(sums),
      logit_max=np.max(logits),
      logit_std=np.std(logits),
      entropy=np.mean(entropies),
      saturated=saturated.mean(),
    )
    for name, x in values.items():
      statistics.setdefault(name, []).append(x)
  return statistics


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_numpy_and_padding_does_not_count(kind, name):
  query, key, value = arrays()
  query = 4 * query  # so that some weights are saturated
  attn = layers.SelfAttention(
    WIDTH, HEADS, num_kv_heads=KV_HEADS, max_length=N, kind=kind,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  bias = attention.default_logit_bias(kind, N)
  slopes = positions.alibi_slopes(HEADS)
  options = dict(
    kind=kind, n=N, logit_bias=None, alibi_slopes=slopes, **MASKS[name]
  )
  measured = jax.jit(
    lambda *qkv: telemetry.statistics(
      attn, *qkv, real_BT=jnp.asarray(REAL), **options
    )
  )(query, key, value)
  expected = numpy_statistics(
    kind,
    numpy_logits(query, key, bias, slopes),
    visible(name),
    value,
    attn.out.kernel[...],
  )
  assert measured.keys() == expected.keys()
  assert max(expected["saturated"]) > 0
  for quantity, x_N in expected.items():
    np.testing.assert_allclose(
      measured[quantity], x_N, rtol=2e-5, atol=1e-6, err_msg=quantity
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_times_values_are_the_attention(kind, name):
  query, key, value = arrays()
  learnt = None if kind == "softmax" else jnp.linspace(-1, 1, HEADS)
  options = dict(
    kind=kind, n=N, logit_bias=learnt,
    alibi_slopes=positions.alibi_slopes(HEADS), **MASKS[name],
  )  # fmt: skip

  @jax.jit
  def weights_product_and_output(query, key, value):
    computed = attention.attention_weights(query, key, **options)
    v_BSNH = jnp.repeat(value, HEADS // KV_HEADS, axis=2)
    product = jnp.einsum("BNTS,BSNH->BTNH", computed.weights_BNTS, v_BSNH)
    out = attention.dot_product_attention(query, key, value, **options)
    return computed, product, out

  computed, product, out = weights_product_and_output(query, key, value)
  seen = visible(name).any(-1)[:, :, None, None]
  np.testing.assert_allclose(
    np.where(seen, product, 0), np.where(seen, out, 0), rtol=1e-5, atol=1e-5
  )
  assert not computed.weights_BNTS[~computed.visible_BNTS].any()


def test_logits_of_a_forget_gate_do_not_grow_with_the_position():
  """Softmax gets only half of the gate, the numbers of the keys."""
  query, key, value = arrays()
  c_BNT = -100.0 * jnp.ones((BATCH, HEADS, LENGTH)).cumsum(2)
  found = {}
  for kind in ("sigmoid", "softmax"):
    attn = layers.SelfAttention(
      WIDTH, HEADS, num_kv_heads=KV_HEADS, max_length=N, kind=kind,
      is_causal=True, forget_gate=True, rngs=nnx.Rngs(0),
    )  # fmt: skip
    vectors = attn._decay(*[c_BNT.swapaxes(1, 2)] * 2)
    bias = {"logit_bias": 0.0} if kind == "sigmoid" else {}
    found[kind] = telemetry.statistics(
      attn, query, key, value, real_BT=jnp.asarray(REAL), kind=kind,
      is_causal=True, **vectors, **bias,
    )  # fmt: skip
  for name in ("logit_max", "logit_std"):
    np.testing.assert_allclose(
      found["softmax"][name], found["sigmoid"][name], rtol=1e-4
    )


def test_softmax_weights_refuse_a_bias():
  query, key, _ = arrays()
  with pytest.raises(ValueError, match="softmax cancels"):
    attention.attention_weights(query, key, kind="softmax", logit_bias=1.0)


def vit(**values):
  config = vit_sigmoid.get_config("runlocal")
  config.update_from_flattened_dict(values)
  return config


def test_collect_sees_the_arguments_of_every_layer():
  config = vit(**{"model.positions": "rope", "attn.qk_norm": "layernorm"})
  _, params = setup.init(config)
  batch = next(iter(tasks.eval_batches(config, "test")))

  @jax.jit
  def collected(params, batch):
    return telemetry.collect(
      config, params, batch, lambda attn, q, k, v, **_: (q, v)
    )["encoder"]

  @jax.jit
  def layer_by_layer(params, batch):
    qv = []
    model = setup.model(config, params)
    graphdef, states = nnx.split(model.encoder.blocks)

    def stack(x_BTD, rng):
      for i in range(config.model.depth):
        block = nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], states))
        y_BTD = block.attn_residual.norm_in(x_BTD)
        q_BTNH = block.attn.query_norm(block.attn.query(y_BTD))
        qv.append((block.attn.rotate(q_BTNH), block.attn.value(y_BTD)))
        x_BTD = block(x_BTD, rng)
      return x_BTD

    model.encoder = stack
    tasks.get("vit").evaluate(config, model, batch)
    return qv

  q_LBTNH, v_LBTNH = collected(params, batch)
  for i, (q_BTNH, v_BTNH) in enumerate(layer_by_layer(params, batch)):
    np.testing.assert_allclose(q_LBTNH[i], q_BTNH, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(v_LBTNH[i], v_BTNH, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "values",
  [
    dict(row_power=0.5),
    dict(kind="softmax", normalize=False, forget_gate=True),
  ],
)
def test_weights_are_those_that_the_layer_applies(values):
  config = lm_sigmoid.get_config("runlocal")
  config.attn.update(values)
  config.model.norm = "pre"  # then attention adds exactly A V W_out
  _, params = setup.init(config)
  token = np.random.default_rng(0).integers(1, 50, (2, 13))
  segment = np.array([[1] * 8 + [2] * 5, [1] * 13])
  batch = {"token": token, "segment": segment, "weight": np.ones(2)}

  def measure(attn, query, key, value, *, streams, **options):
    weights_BNTS = attention_maps._weights(
      attn, query, key, value, streams=streams, **options
    )
    projected = telemetry._values(attn, value, weights_BNTS)["projection"]
    sums = telemetry.statistics(attn, query, key, value, **options)
    return (
      projected.sum(1), streams["attn_added"],
      weights_BNTS.sum(3).mean((0, 2)), sums["row_sum_mean"],
    )  # fmt: skip

  projected, added, rows, measured = jax.jit(
    lambda *args: telemetry.collect(config, *args, measure)
  )(params, batch)["stack"]
  np.testing.assert_allclose(projected, added, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(measured, rows, rtol=1e-5)


@pytest.mark.parametrize("norm", layers.NORM_PLACES)
def test_norms_of_the_residual_stream_and_of_what_blocks_add(norm):
  config = vit(**{"model.norm": norm, "model.layer_scale": 0.3})
  _, params = setup.init(config)
  batch = next(iter(tasks.eval_batches(config, "test")))
  batch["weight"] = np.r_[np.ones(5), np.zeros(3)]

  @jax.jit
  def measured_and_by_hand(params, batch):
    measured = telemetry.collect(config, params, batch, telemetry.statistics)
    model = setup.model(config, params)
    graphdef, states = nnx.split(model.encoder.blocks)
    by_hand = []

    def stack(x_BTD, rng):
      for i in range(config.model.depth):
        block = nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], states))
        parts = {}
        for part in ("attn", "mlp"):
          residual = getattr(block, f"{part}_residual")
          y_BTD = x_BTD if norm == "post" else residual.norm_in(x_BTD)
          y_BTD = getattr(block, part)(y_BTD)
          if norm == "hybrid":
            y_BTD = residual.norm_out(y_BTD)
          y_BTD = 0.3 * y_BTD
          x_BTD = x_BTD + y_BTD
          if norm == "post":
            x_BTD = residual.norm_out(x_BTD)
          parts[f"{part}_added"] = y_BTD
        by_hand.append(parts | {"residual": x_BTD})
      return x_BTD

    model.encoder = stack
    tasks.get("vit").evaluate(config, model, batch)
    return measured["encoder"], by_hand

  statistics, by_hand = measured_and_by_hand(params, batch)
  for layer, parts in enumerate(by_hand):
    for name, x_BTD in parts.items():
      expected = np.mean([np.linalg.norm(x_TD) for x_TD in x_BTD[:5]])
      measured = statistics[f"{name}_norm"][layer]
      np.testing.assert_allclose(measured, expected, rtol=1e-4, err_msg=name)


def test_padding_of_packed_rows_does_not_count():
  config = lm_sigmoid.get_config("runlocal")
  config.attn.normalize = False  # The sum of a normalised row is 1.
  _, params = setup.init(config)
  token = np.random.default_rng(0).integers(1, 50, (2, 13))
  segment = np.array([[1] * 8 + [2] * 5, [1] * 13])
  pad = ((0, 0), (0, 4))

  def measure(token, segment, weight):
    batch = {"token": token, "segment": segment, "weight": np.array(weight)}
    return jax.jit(
      lambda *args: telemetry.collect(config, *args, telemetry.statistics)
    )(params, batch)["stack"]

  unpadded = measure(token, segment, [1.0, 1.0])
  padded = measure(
    np.pad(token, pad, constant_values=-1), np.pad(segment, pad), [1.0, 1.0]
  )
  # The model reads all tokens but the last. With four padding tokens it
  # therefore also reads the last real token, which it does not read in the
  # shorter row. `longer` reads it too, because it has one more token.
  longer = measure(
    np.pad(token, ((0, 0), (0, 1)), constant_values=7),
    np.pad(segment, ((0, 0), (0, 1)), mode="edge"),
    [1.0, 1.0],
  )
  filled = measure(
    np.concatenate([token, token[:1]]),
    np.concatenate([segment, segment[:1]]),
    [1.0, 1.0, 0.0],
  )
  for name, x_LN in unpadded.items():
    np.testing.assert_allclose(padded[name], longer[name], rtol=1e-5)
    np.testing.assert_allclose(filled[name], x_LN, rtol=1e-5)
  assert not np.allclose(padded["row_sum_mean"], unpadded["row_sum_mean"])


def test_norms_are_of_modules_and_of_each_layer():
  tree = {
    "embed": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((4,), 4.0)},
    "stack": {
      "blocks": {"a": jnp.array([[3.0], [6.0]]), "b": jnp.array([4.0, 8.0])}
    },
    "position": jnp.array([-2.0]),
  }
  norms = telemetry.norms(tree, [("stack",)])
  assert norms.keys() == {"embed", "stack", "position"}
  assert float(norms["embed"]) == 10.0
  assert float(norms["position"]) == 2.0
  np.testing.assert_array_equal(norms["stack"], [5.0, 10.0])


def test_telemetry_does_not_change_training(tmp_path, monkeypatch):
  eval_batches = tasks.eval_batches
  monkeypatch.setattr(
    tasks, "eval_batches", lambda *args: [next(iter(eval_batches(*args)))]
  )
  values = {"eval.every_steps": 0, "optim.schedule": "constant"}
  on = {"telemetry.every_steps": 2, "telemetry.examples": 3}
  train(vit(total_steps=5, **values), tmp_path / "off")
  # This run is stopped and resumed: no line may be missing or occur twice.
  train(vit(total_steps=3, **values, **on), tmp_path / "on")
  state = train(vit(total_steps=5, **values, **on), tmp_path / "on")

  def lines(name, split):
    return {
      line["step"]: {
        k: v for k, v in line.items() if k not in ("per_second", "data_seconds")
      }
      for line in metrics.read(tmp_path / name)
      if line["split"] == split
    }

  assert not lines("off", "telemetry")
  plain = lines("on", "train")
  assert plain == lines("off", "train")
  measured = lines("on", "telemetry")
  all_lines = metrics.read(tmp_path / "on")
  assert [x["step"] for x in all_lines if x["split"] == "telemetry"] == [
    1,
    2,
    4,
  ]
  for step, line in measured.items():
    numbers = {k: v for k, v in line.items() if k not in ("step", "split")}
    assert np.isfinite([*numbers.values()]).all()
    grads = [v for k, v in numbers.items() if k.startswith("grads_norm/")]
    total = np.linalg.norm(grads)
    assert total == pytest.approx(plain[step]["grad_norm"], rel=1e-5)
  stream = [k for k in measured[1] if k.startswith("residual_norm/")]
  assert stream == [f"residual_norm/encoder/layer{i}" for i in range(2)]
  # There are two layers with two heads; the classifier starts from zero.
  assert len([k for k in measured[1] if k.startswith("entropy/encoder/")]) == 4
  assert (
    measured[1]["params_norm/head"] == 0.0 < measured[2]["params_norm/head"]
  )
  assert measured[1]["mu_norm/head"] == pytest.approx(
    0.1 * min(1, 1 / plain[1]["grad_norm"]) * measured[1]["grads_norm/head"],
    rel=1e-4,
  )
  assert int(state.step) == 5
