"""The vision transformer: sizes, symmetries, mixing, losses, validation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import vit as vit_config
from configs import vit_sigmoid
from sigattn import attention, validate
from sigattn.tasks import vit

KEY = jax.random.key(0)


def small(**values):
  """A config with four patches of 4 x 4 pixels, width 16 and one layer."""
  config = vit_sigmoid.get_config("runlocal")
  config.data.image_size = 8
  config.augment.mixup = 0.0
  config.model.update(depth=1, patch_size=4, position_std=0.02)
  config.update_from_flattened_dict(values)
  return config


def fill(config):
  """Makes a model quickly, with random parameters, also of the head."""
  shapes = nnx.eval_shape(lambda: vit.build(config, nnx.Rngs(0)))
  graphdef, shapes = nnx.split(shapes)
  rng = np.random.default_rng(0)
  draw = functools.partial(rng.normal, 0.1, 0.4)
  return nnx.merge(
    graphdef, jax.tree.map(lambda x: jnp.float32(draw(x.shape)), shapes)
  )


def compiled(function, model, *args):
  graphdef, state = nnx.split(model)
  return jax.jit(lambda s, *a: function(nnx.merge(graphdef, s), *a))(
    state, *args
  )


def logits(model, images_BHWC):
  return compiled(lambda m, x: m(x), model, images_BHWC)


def images(batch=3, side=8, channels=1):
  rng = np.random.default_rng(1)
  return rng.normal(size=(batch, side, side, channels)).astype(np.float32)


def make_batch(size=6, classes=10):
  rng = np.random.default_rng(2)
  return {
    "image": rng.integers(0, 256, (size, 8, 8, 1), np.uint8),
    "target": rng.integers(0, classes, size, np.int32),
    "weight": np.ones(size, np.float32),
  }


@pytest.mark.parametrize(
  ("size", "count"),
  [
    ("Ti/16", 5_717_416),
    ("S/16", 22_050_664),
    ("B/16", 86_567_656),
    ("L/16", 304_326_632),
  ],
)
def test_published_parameter_count(size, count):
  config = vit_config.get_config(f"imagenet,{size}")
  model = nnx.eval_shape(lambda: vit.build(config, nnx.Rngs(0)))
  assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == count


def test_state_is_parameters_alone_and_named_for_the_weight_decay():
  config = small(
    **{
      "attn.learn_logit_bias": True,
      "attn.qk_norm": "layernorm",
      "model.layer_scale": 1e-4,
      "model.pool": "class",
    }
  )
  model = nnx.eval_shape(lambda: vit.build(config, nnx.Rngs(0)))
  assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
  kernels, other = set(), set()
  for path, x in nnx.to_flat_state(nnx.state(model)):
    assert x.dtype == jnp.float32
    (kernels if path[-1] == "kernel" else other).add("/".join(path))
  blocks = "encoder/blocks"
  assert kernels == {
    "embed/kernel",
    *(f"{blocks}/attn/{x}/kernel" for x in ("query", "key", "value", "out")),
    *(f"{blocks}/mlp/{x}/kernel" for x in ("up", "down")),
    "head/kernel",
  }
  assert {
    "class_token",
    "position",
    f"{blocks}/attn/logit_bias",
    f"{blocks}/attn/query_norm/scale",
    f"{blocks}/attn_residual/layer_scale/scale",
  } < other


def test_first_logits_are_zero_and_the_rest_is_not():
  config = small(**{"model.pool": "class"})
  p = jax.jit(lambda: nnx.state(vit.build(config, nnx.Rngs(0))))()
  p = jax.tree.map(np.asarray, nnx.to_pure_dict(p))
  assert not p["head"]["kernel"].any()
  assert not p["class_token"].any()
  assert p["position"].std() == pytest.approx(0.02, rel=0.3)
  assert p["embed"]["kernel"].std() == pytest.approx(0.25, rel=0.2)


def permuted(x_BHWC):
  """The same patches of 4 x 4 in another order."""
  top, bottom = np.split(x_BHWC, 2, axis=1)
  return np.concatenate([bottom, np.roll(top, 4, axis=2)], axis=1)


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize(
  ("positions", "alibi"),
  [(name, False) for name in vit.POSITIONS] + [("none", True)],
)
def test_order_of_patches_matters_unless_there_are_no_positions(
  pool, positions, alibi
):
  config = small(
    **{
      "model.pool": pool, "model.positions": positions, "attn.alibi": alibi
    }
  )  # fmt: skip
  both = np.concatenate([images(), permuted(images())])
  original, reordered = np.split(logits(fill(config), both), 2)
  assert original.shape == (3, 10)
  same = np.allclose(original, reordered, rtol=1e-4, atol=1e-4)
  assert same == (positions == "none" and not alibi)


def test_patches_are_squares_in_raster_order():
  model = fill(small())
  x = images()
  expected = [
    x[:, row : row + 4, column : column + 4].reshape(3, 16)
    for row in (0, 4)
    for column in (0, 4)
  ]
  np.testing.assert_array_equal(model.patches(x), np.stack(expected, axis=1))
  with pytest.raises(ValueError, match="8 x 8"):
    model.patches(images(side=12))


def test_rope_turns_patches_by_row_and_column_not_the_class_token():
  for pool in ("mean", "class"):
    config = small(**{"model.positions": "rope", "model.pool": pool})
    place = vit._rotate(config.model, (2, 2)).keywords["positions"]
    expected = [(0, 0)] * (pool == "class") + [(1, 1), (1, 2), (2, 1), (2, 2)]
    np.testing.assert_array_equal(place, expected)


def test_fixed_table_is_added_to_the_patches_alone():
  for name in ("sincos1d", "sincos2d"):
    config = small(**{"model.positions": name, "model.pool": "class"})
    added = fill(config)._add_positions(jnp.zeros((1, 5, 16)))[0]
    assert (added[0] == 0).all()
    np.testing.assert_array_equal(added[1:], vit._fixed_table(name, (2, 2), 16))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_features_are_the_pooled_tokens(norm):
  for pool in ("mean", "class"):
    model = fill(small(**{"model.pool": pool, "model.norm": norm}))
    x_BTD = compiled(lambda m, x: m.encode(m.tokens(x)), model, images())
    pooled_BD = x_BTD[:, 0] if pool == "class" else x_BTD.mean(1)
    found_BD = compiled(lambda m, x: m.features(x), model, images())
    np.testing.assert_allclose(found_BD, pooled_BD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("pool", "tokens"), [("mean", 4), ("class", 5)])
def test_n_is_the_token_count(pool, tokens):
  config = small(**{"model.pool": pool})
  model = nnx.eval_shape(lambda: vit.build(config, nnx.Rngs(0)))
  assert model.encoder.blocks.attn.max_length == tokens


@pytest.mark.parametrize(
  "values",
  [
    *({"attn.kind": kind} for kind in attention.KINDS),
    {"model.mlp": "swiglu", "model.norm": "hybrid", "attn.num_kv_heads": 1},
    {"model.norm": "post", "model.positions": "rope", "model.remat": "all"},
    {"model.layer_scale": 1e-4, "attn.learn_logit_bias": True},
    {"dtype": "bfloat16", "attn.qk_norm": "layernorm"},
    {"dtype": "bfloat16", "attn.kind": "softmax", "attn.alibi": True},
  ],
  ids=str,
)
def test_every_parameter_of_every_variant_has_a_finite_gradient(values):
  config = small(**values)
  validate.fields(config, vit.FIELDS, vit.RULES)
  graphdef, state = nnx.split(fill(config))

  @functools.partial(jax.grad, has_aux=True)
  def gradients(state):
    return vit.loss(config, nnx.merge(graphdef, state), make_batch(), KEY)

  grads, metrics = jax.jit(gradients)(state)
  for path, x in nnx.to_flat_state(grads):
    assert np.isfinite(x).all(), path
    # A bias of the keys adds a constant to each row. Softmax cancels it.
    assert path[-2:] == ("key", "bias") or abs(x[...]).max() > 0, path
  assert metrics.keys() == {"loss", "accuracy"}
  assert all(x.dtype == jnp.float32 for x in metrics.values())


def test_post_norm_has_no_norm_before_the_head():
  assert not hasattr(fill(small(**{"model.norm": "post"})), "norm")
  assert fill(small(**{"model.norm_kind": "rmsnorm"})).norm.scale.shape == (16,)


# The losses.


def test_loss_is_the_smoothed_cross_entropy_of_normalised_images():
  config, batch = small(**{"augment.label_smoothing": 0.2}), make_batch()
  model = fill(config)
  loss = functools.partial(vit.loss, config)
  value, metrics = compiled(loss, model, batch, KEY)
  out = logits(model, (batch["image"] / np.float32(255) - 0.2860) / 0.3530)
  logs = np.asarray(jax.nn.log_softmax(out))
  target_BV = np.eye(10)[batch["target"]] * 0.8 + 0.02
  expected = -(target_BV * logs).sum(-1).mean()
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  np.testing.assert_array_equal(value, metrics["loss"])
  accuracy = (out.argmax(-1) == batch["target"]).mean()
  np.testing.assert_allclose(metrics["accuracy"], accuracy)


def test_evaluation_sums_by_weight_and_is_deterministic():
  config, batch = small(**{"data.num_classes": 20}), make_batch(8, 20)
  model = fill(config)
  batch["weight"] = np.float32([1, 1, 1, 1, 1, 0, 0, 2])
  evaluate = functools.partial(vit.evaluate, config)
  sums = compiled(evaluate, model, batch)
  out = np.asarray(logits(model, vit.normalize(config.data, batch["image"])))
  target, weight = batch["target"], batch["weight"]
  each = optax.softmax_cross_entropy_with_integer_labels(out, target)
  better = (out > out[np.arange(8), target][:, None]).sum(-1)
  expected = {
    "loss": weight @ each,
    "accuracy": weight @ (better < 1),
    "accuracy_top5": weight @ (better < 5),
    "weight": 7,
  }
  assert sums.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(sums[name], value, rtol=1e-4)
  assert 0 < expected["accuracy_top5"] < 7
  random = {"model.drop_path": 0.5, "augment.mixup": 1.0}
  config.update_from_flattened_dict(random)
  again = compiled(evaluate, fill(config), batch)
  jax.tree.map(np.testing.assert_array_equal, again, sums)


def test_ten_classes_have_no_top5():
  config = small()
  evaluate = functools.partial(vit.evaluate, config)
  sums = compiled(evaluate, fill(config), make_batch())
  assert sums.keys() == {"loss", "accuracy", "weight"}
  config.ckpt.best_metric = "accuracy_top5"
  with pytest.raises(ValueError, match=r"config\.ckpt\.best_metric="):
    validate.fields(config, vit.FIELDS, vit.RULES)


def test_rng_of_the_loss_drives_drop_path():
  config = small(**{"model.drop_path": 0.5})
  model, batch = fill(config), make_batch()
  graphdef, state = nnx.split(model)

  @jax.jit
  def loss(rng):
    return vit.loss(config, nnx.merge(graphdef, state), batch, rng)[0]

  values = [float(loss(jax.random.key(i))) for i in (0, 0, 1)]
  assert values[0] == values[1] != values[2]


# Mixup and cutmix.


@functools.cache
def mixed(**alphas):
  """500 draws of mixed images and targets.

  Before mixing, all pixels of image i are i, and its target is class i.
  """
  augment = small(**{f"augment.{k}": v for k, v in alphas.items()}).augment
  number = jnp.arange(4.0)
  x_BHWC = jnp.broadcast_to(number[:, None, None, None], (4, 8, 12, 1))

  def mix(rng):
    return vit.mix(augment, rng, x_BHWC, jnp.eye(4))

  images_and_targets = jax.jit(jax.vmap(mix))(jax.random.split(KEY, 500))
  return [np.asarray(x) for x in images_and_targets]


@pytest.mark.parametrize(
  "alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]
)
def test_target_has_the_share_of_each_image(alphas):
  x, targets = mixed(**alphas)
  np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-5)
  mean_pixel = x.mean((2, 3, 4))
  np.testing.assert_allclose(mean_pixel, targets @ np.arange(4.0), atol=1e-5)
  neighbours = np.eye(4) + np.roll(np.eye(4), 1, axis=0)
  assert (targets[:, neighbours == 0] == 0).all()
  share = targets[:, 0, 0]
  assert share.std() > 0.1
  assert len(set(share.tolist())) > 20


def is_cut(x):
  """Whether each pixel of a draw comes from one of the four images."""
  return (x == np.round(x)).all((1, 2, 3, 4))


def test_mixup_blends_cutmix_cuts_and_both_are_either():
  blended, targets = mixed(mixup=0.8)
  assert (blended == blended[:, :, :1, :1]).all()
  assert targets[:, 0, 0].mean() == pytest.approx(0.5, abs=0.08)
  assert not is_cut(blended).all()
  cut, _ = mixed(cutmix=1.0)
  assert is_cut(cut).all()
  both = is_cut(mixed(mixup=0.8, cutmix=1.0)[0])
  assert both.mean() == pytest.approx(0.5, abs=0.1)
  x, targets = mixed()
  assert (targets == np.eye(4)).all()


def test_cutmix_replaces_one_box_with_the_share_of_the_area():
  inside = mixed(cutmix=1.0)[0][:, 1, :, :, 0] == 0  # parts of image 0 in 1
  rows, columns = inside.any(2), inside.any(1)
  box = rows[:, :, None] & columns[:, None, :]
  np.testing.assert_array_equal(inside, box)
  for line in (rows, columns):  # one interval in each
    assert (np.abs(np.diff(line.astype(int), axis=1)).sum(1) <= 2).all()
  # lambda is uniform. The box has the side s = sqrt(1 - lambda). The border may
  # cut it, so its expected area is (s - s^2 / 4)^2.
  s = np.sqrt(np.linspace(0, 1, 1001))
  expected = ((s - s**2 / 4) ** 2).mean()
  assert inside.mean() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("share", "accuracy"), [(0.6, 0.0), (0.4, 1.0)])
def test_accuracy_is_against_the_dominant_target(share, accuracy, monkeypatch):
  def mix(augment, rng, images_BHWC, targets_BV):
    return images_BHWC, share * targets_BV + (1 - share) * jnp.eye(10)[7:8]

  monkeypatch.setattr(vit, "mix", mix)
  config, batch = small(), make_batch()
  batch["target"] = np.arange(6, dtype=np.int32)
  model = fill(config)
  model.head.kernel[...] = jnp.zeros((16, 10))
  model.head.bias[...] = jnp.eye(10)[7]  # the model always answers 7
  loss = functools.partial(vit.loss, config)
  metrics = compiled(loss, model, batch, KEY)[1]
  assert metrics["accuracy"] == accuracy


# Validation.


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("attn.kind", "sigmiod"),
    ("attn.qk_norm", "layer"),
    ("attn.logit_bias", float("nan")),
    ("attn.logit_bias", float("inf")),
    ("attn.num_kv_heads", 0),
    ("attn.num_kv_heads", 3),
    ("attn.implementation", "cuda"),
    ("model.width", 97),
    ("model.width", 0),
    ("model.depth", 0),
    ("model.num_heads", 5),
    ("model.mlp_dim", -1),
    ("model.patch_size", 5),
    ("model.pool", "max"),
    ("model.positions", "sincos"),
    ("model.mlp", "relu"),
    ("model.norm", "both"),
    ("model.norm_kind", "batchnorm"),
    ("model.drop_path", 1.0),
    ("model.drop_path", -0.1),
    ("model.drop_path", float("nan")),
    ("model.layer_scale", -1e-4),
    ("model.layer_scale", float("inf")),
    ("augment.mixup", -0.1),
    ("augment.cutmix", float("inf")),
    ("augment.label_smoothing", 1.0),
  ],
)
def test_bad_value_is_refused_with_its_path_and_value(path, value):
  config = small(**{path: value})
  with pytest.raises(ValueError, match=rf"config\.{path}") as error:
    validate.fields(config, vit.FIELDS, vit.RULES)
  assert repr(value) in str(error.value)


@pytest.mark.parametrize(
  ("name", "width"), [("sincos1d", 15), ("sincos2d", 18), ("rope", 12)]
)
def test_width_that_the_positions_cannot_have_is_refused(name, width):
  values = {"model.width": width, "model.positions": name}
  config = small(**values, **{"model.num_heads": 3 if width == 15 else 2})
  with pytest.raises(ValueError, match=rf"config\.model\.positions='{name}'"):
    validate.fields(config, vit.FIELDS, vit.RULES)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
  ("key", "value"), [("logit_bias", 0.0), ("learn_logit_bias", True)]
)
def test_logit_bias_is_refused_with_softmax_alone(kind, key, value):
  config = small(**{"attn.kind": kind, f"attn.{key}": value})
  if kind == "sigmoid":
    validate.fields(config, vit.FIELDS, vit.RULES)
    return
  with pytest.raises(ValueError, match=rf"config\.attn\.{key}={value}"):
    validate.fields(config, vit.FIELDS, vit.RULES)
