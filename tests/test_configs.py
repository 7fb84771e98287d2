"""Every config builds and passes validation; wrong values are refused."""

import copy

import pytest
from ml_collections import ConfigDict

from configs import (
  byol_sigmoid,
  lm_sigmoid,
  mae_sigmoid,
  simclr_sigmoid,
  speech_sigmoid,
  synthetic_sigmoid,
  vit,
  vit_sigmoid,
)
from sigattn.kernels.problem import SIGNED
from sigattn.training import setup

ARGS = (None, "runlocal", "imagenet", "Ti/16", "imagenet,S/16", "L/16,runlocal")


@pytest.mark.parametrize("arg", ARGS)
@pytest.mark.parametrize("module", [vit, vit_sigmoid])
def test_config_passes_its_check(module, arg):
  config = module.get_config(arg)
  assert config.is_locked
  if config.data.source == "fashion_mnist":
    setup.validate_config(config)
  else:  # Everything except the data: a test cannot reach the Hub.
    local = copy.deepcopy(config)
    local.data.source = "fashion_mnist"
    local.data.update(channels=1, num_classes=10, mean=(0.3,), std=(0.4,))
    local.data.eval_split = "test"
    setup.validate_config(local)


@pytest.mark.parametrize("arg", ARGS)
def test_sigmoid_differs_from_its_softmax_twin_by_the_kind_alone(arg):
  softmax, sigmoid = vit.get_config(arg), vit_sigmoid.get_config(arg)
  assert sigmoid.attn.kind == "sigmoid"
  sigmoid.attn.kind = "softmax"
  assert sigmoid == softmax


@pytest.mark.parametrize("arg", ["imagnet", "B/16,L/16", "b/16"])
def test_bad_argument_is_refused_with_the_choices(arg):
  with pytest.raises(ValueError, match=f"configs/vit.py:{arg}"):
    vit.get_config(arg)


def test_misspelt_key_is_refused():
  with pytest.raises(AttributeError, match="kidn"):
    vit.get_config().attn.kidn = "relu"


def test_references_follow_total_steps():
  config = vit.get_config()
  assert config.log.every_steps == 100
  config.total_steps = 400
  assert config.optim.warmup_steps == 20
  assert config.eval.every_steps == 40
  assert config.log.every_steps == 9
  config.total_steps = 2
  assert config.log.every_steps == 1


def leaves(config, prefix=""):
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key


@pytest.mark.parametrize(
  "module",
  [
    vit_sigmoid,
    lm_sigmoid,
    speech_sigmoid,
    synthetic_sigmoid,
    simclr_sigmoid,
    byol_sigmoid,
    mae_sigmoid,
  ],
  ids=lambda module: module.__name__,
)
def test_every_field_of_a_config_is_validated_and_no_other(module):
  config = module.get_config()
  fields, _ = setup.tables(config.task)
  assert set(leaves(config)) == set(fields)


BAD = [
  ("task", "vti"),
  ("dtype", "float64"),
  ("total_steps", 0),
  ("batch_size", 0),
  ("attn.kind", "sigmiod"),
  ("attn.qk_norm", "layer"),
  ("attn.logit_bias", float("nan")),
  ("attn.row_power", 1.0),
  ("attn.forget_gate", True),
  ("attn.num_kv_heads", 4),
  ("attn.implementation", "cuda"),
  ("model.width", 97),
  ("model.depth", 0),
  ("model.num_heads", 5),
  ("model.patch_size", 5),
  ("model.pool", "max"),
  ("model.positions", "sincos"),
  ("model.position_std", -1.0),
  ("model.mlp", "relu"),
  ("model.norm", "both"),
  ("model.norm_kind", "batchnorm"),
  ("model.drop_path", 1.0),
  ("model.layer_scale", -1e-4),
  ("augment.crop", "random"),
  ("augment.mixup", -0.1),
  ("augment.cutmix", float("inf")),
  ("augment.label_smoothing", 1.0),
  ("augment.randaugment_magnitude", 11),
  ("data.source", "fashion_mnits"),
  ("data.eval_split", "valid"),
  ("data.eval_split", "validation"),  # a part of the training data
  ("data.image_size", 0),
  ("data.channels", 2),
  ("data.num_classes", 9),
  ("data.mean", (0.1, 0.2)),
  ("data.std", (0.0,)),
  ("data.num_workers", -1),
  ("optim.name", "adam"),
  ("optim.schedule", "cosin"),
  ("optim.lr", 0.0),
  ("optim.lr", float("nan")),
  ("optim.b2", 1.5),
  ("optim.clip_norm", -1.0),
  ("optim.b1", 1.0),
  ("optim.b2", 1.0),
  ("optim.eps", 0.0),
  ("optim.eps", float("inf")),
  ("optim.weight_decay", float("inf")),
  ("optim.clip_norm", 1e-300),
  ("optim.warmup_steps", 10**12),
  ("optim.warmup_steps", 4501),
  ("optim.decay_groups", ((".*", -1.0),)),
  ("optim.decay_groups", ((".*", float("nan")),)),
  ("optim.decay_groups", (("(", 1.0),)),
  ("optim.lr_groups", ((".*", -1.0),)),
  ("optim.lr_groups", (("no_such_parameter", 1.0),)),
  ("seed", 2**63),
  ("seed", 2**32),
  ("batch_size", 10_001),
  ("optim.accumulate", 3),
  ("optim.ema_decay", 2.0),
  ("eval.every_steps", -1),
  ("ckpt.keep", 0),
  ("ckpt.best_metric", "acuracy"),
  ("ckpt.best_mode", "maximum"),
  ("log.every_steps", 0),
  ("telemetry.every_steps", -1),
  ("telemetry.examples", 0),
]


@pytest.mark.parametrize(
  ("path", "value"), BAD, ids=[f"{path}={value}" for path, value in BAD]
)
def test_bad_value_is_refused_with_its_path_and_value(path, value):
  config = vit_sigmoid.get_config()
  config.update_from_flattened_dict({path: value})
  with pytest.raises(ValueError, match=rf"config\.{path}") as error:
    setup.validate_config(config)
  # If a group matches no parameter, the error names only its pattern.
  pattern = "no_such_parameter"
  assert repr(value) in str(error.value) or repr(pattern) in str(error.value)


def test_normalized_rows_refuse_a_second_division():
  config = lm_sigmoid.get_config()
  config.attn.update(normalize=True, row_power=1.0)
  with pytest.raises(ValueError, match=r"config\.attn\.row_power=1\.0"):
    setup.validate_config(config)


def test_normalized_rows_refuse_a_bias_whose_weights_are_zero():
  config = lm_sigmoid.get_config()
  config.attn.update(normalize=True, logit_bias=-81.0)
  said = r"config\.attn\.logit_bias=-81\.0; must be at least -80"
  with pytest.raises(ValueError, match=said):
    setup.validate_config(config)
  for right in ({"logit_bias": -80.0}, {"normalize": False}):
    config = lm_sigmoid.get_config()
    config.attn.update(**{"normalize": True, "logit_bias": -81.0} | right)
    setup.validate_config(config)


def test_a_window_refuses_row_power():
  config = lm_sigmoid.get_config()
  config.attn.update(window=8, row_power=1.0, normalize=False)
  with pytest.raises(ValueError, match=r"config\.attn\.row_power=1\.0.*window"):
    setup.validate_config(config)


@pytest.mark.parametrize("kind", SIGNED)
def test_negative_weights_refuse_normalization(kind):
  config = lm_sigmoid.get_config()
  config.attn.update(kind=kind, normalize=True)
  with pytest.raises(ValueError, match=f"normalize=True.*'{kind}', whose"):
    setup.validate_config(config)


def test_softmax_refuses_a_second_normalization():
  config = vit.get_config()
  config.attn.normalize = True
  with pytest.raises(ValueError, match=r"config\.attn\.normalize=True"):
    setup.validate_config(config)


def test_softmax_refuses_a_logit_bias():
  config = vit.get_config()
  config.attn.logit_bias = -3.0
  with pytest.raises(ValueError, match=r"config\.attn\.logit_bias=-3\.0"):
    setup.validate_config(config)
  config = vit.get_config()
  config.attn.learn_logit_bias = True
  with pytest.raises(ValueError, match=r"config\.attn\.learn_logit_bias=True"):
    setup.validate_config(config)
