"""SimCLR, BYOL and MAE: losses, runs, linear probes and configs."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

import eval as evaluation_command
from configs import (
  byol,
  byol_sigmoid,
  mae,
  mae_sigmoid,
  simclr,
  simclr_sigmoid,
  vit_sigmoid,
)
from sigattn import tasks
from sigattn.analysis import features
from sigattn.tasks import byol as byol_task
from sigattn.tasks import mae as mae_task
from sigattn.tasks import selfsup
from sigattn.tasks import simclr as simclr_task
from sigattn.training import (
  checkpoint,
  evaluate,
  init_from,
  mesh,
  setup,
  step,
  transfer,
)
from tests.data import idx
from train import train

ROOT = pathlib.Path(__file__).parents[2]
rng = functools.partial(np.random.default_rng, 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder of 64 training images and 32 for evaluation."""
  return idx.write(tmp_path_factory.mktemp("data") / "x", train=64, test=32)


def small(module, data, **values):
  config = module.get_config("runlocal")
  config.model.depth = 1
  config.data.source = str(data)
  config.update_from_flattened_dict(values)
  return config


@pytest.fixture(scope="module")
def byol_run(data, tmp_path_factory):
  """A run of BYOL: (folder, the State that train returned, the config)."""
  folder = tmp_path_factory.mktemp("byol") / "run"
  values = {"ckpt.every_steps": 2, "ckpt.keep": 2, "eval.every_steps": 4}
  config = small(byol_sigmoid, data, total_steps=4, **values)
  return folder, train(config, folder), config


@pytest.fixture(scope="module")
def untrained_mae(data):
  """(config, parameters)"""
  config = small(mae, data)
  return config, setup.init(config)[1]


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# Losses.


def test_nt_xent_is_that_of_optax_and_so_is_its_gradient():
  z_BF = jnp.asarray(rng().normal(size=(10, 6)), jnp.float32)
  owner_B = jnp.tile(jnp.arange(5), 2)

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(None, 0))
  def both(z_BF, temperature):
    ours = jax.value_and_grad(simclr_task.nt_xent)(z_BF, temperature)
    theirs = jax.value_and_grad(optax.losses.ntxent)(z_BF, owner_B, temperature)
    return ours, theirs

  for x, y in zip(*both(z_BF, jnp.array([0.1, 1.0])), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(600)
def test_loss_and_gradients_on_four_devices_equal_those_on_one(request):
  """Negatives and batch statistics are those of the whole batch.

  MAE has neither: its loss is a mean over images.
  """
  names = ["simclr", "byol"]
  if request.config.getoption("--all-meshes"):
    names.append("mae")
  run = subprocess.run(
    [sys.executable, "-m", "tests.training.selfsup_on_four_devices", *names],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr[-3000:]


def test_the_momentum_of_the_target_rises_to_one_by_a_cosine():
  config = byol.get_config()
  momentum = byol_task.target_momentum(config)
  steps = np.array([0, 0.5, 1]) * config.total_steps
  np.testing.assert_allclose(
    [momentum(x) for x in steps], [0.98, 0.99, 1.0], rtol=1e-6
  )


def test_the_encoder_of_mae_sees_no_masked_pixel(untrained_mae):
  config, params = untrained_mae
  model = setup.model(config, params)
  images = rng().normal(size=(2, 28, 28, 1)).astype(np.float32)
  patches = model.patches(images)
  np.testing.assert_array_equal(model.images(patches), images)
  order_BP, kept = mae_task.mask(config, model, jax.random.key(1), 2)
  count = patches.shape[1]
  assert kept == count // 4
  equal(jnp.sort(order_BP), jnp.tile(jnp.arange(count), (2, 1)))
  is_left_BP1 = (order_BP.argsort(1) < kept)[:, :, None]
  draw = nnx.jit(lambda model, x: model.reconstruct(x, order_BP, kept))
  outputs = [
    draw(model, model.images(jnp.where(is_left_BP1, patches, noise)))
    for noise in (0.0, 9.0)
  ]
  equal(*outputs)
  seen = draw(model, model.images(jnp.where(is_left_BP1, 9.0, patches)))
  assert not np.allclose(seen[1], outputs[0][1])


def test_neighbours_vote_by_their_similarity():
  """If all weigh the same, two distant neighbours outvote a near one."""
  config = mae.get_config("runlocal")
  angle_M = np.radians([0, 30, 30, 1])
  bank = {
    "feature": jnp.stack([np.cos(angle_M), np.sin(angle_M)], -1),
    "target": jnp.array([0, 1, 1, 2]),
    "weight": jnp.array([1.0, 1.0, 1.0, 0.0]),  # the last one is padding
  }
  query_12 = jnp.array([[1.0, 0.0]])
  config.eval.knn_neighbours = 3
  for temperature, expected in ((0.07, 0), (10.0, 1)):
    config.eval.knn_temperature = temperature
    assert selfsup.nearest(config, query_12, bank) == expected
  config.eval.knn_neighbours = 1
  assert selfsup.nearest(config, query_12, bank) == 0


def test_neighbours_are_looked_for_in_the_whole_training_split(data):
  """The first ten images alone would have the classes 0 to 9 in order."""
  config = small(mae, data, **{"eval.knn_examples": 10})
  batches = list(selfsup.reference(config))
  weight_M, target_M = (
    np.concatenate([x[name] for x in batches]) for name in ("weight", "target")
  )
  places = np.arange(10) * 64 // 10
  np.testing.assert_array_equal(target_M[weight_M > 0], places % 10)
  config.eval.update(knn_examples=100, knn_neighbours=65)
  with pytest.raises(
    ValueError, match=r"knn_neighbours=65; must be at most 64"
  ):
    selfsup.reference(config)


# Runs.


def test_a_killed_run_of_byol_goes_on_bit_for_bit(byol_run, tmp_path):
  """The target, the views and the masks follow from the seed and the step."""
  folder, state, config = byol_run
  shutil.copytree(folder, tmp_path / "killed")
  shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
  (tmp_path / "killed" / "DONE.json").unlink()
  assert checkpoint.load(tmp_path / "killed")[2] == 2
  again = train(config, tmp_path / "killed")
  equal(again, state)
  # The target follows the parameters, but differs from them.
  differs = jax.tree.map(lambda x, y: bool((x != y).any()), *state[1:4:2])
  assert all(jax.tree.leaves(differs["embed"]))


def test_features_that_are_all_the_same_are_said_to_have_collapsed(
  byol_run, monkeypatch
):
  _, state, config = byol_run
  lines = []
  monkeypatch.setattr(
    selfsup.logging, "warning", lambda line, *args: lines.append(line % args)
  )
  run = evaluate.evaluator(config, mesh.make())
  batches = tasks.eval_batches(config, "test")
  healthy = run(state.params, batches)
  assert healthy["feature_std"] > selfsup.COLLAPSED
  assert not lines
  params = jax.tree.map(jnp.copy, state.params)
  params["norm"]["scale"] *= 0  # only the bias remains
  params["norm"]["bias"] += 1
  assert run(params, batches)["feature_std"] < 1e-3
  [line] = lines
  assert "the features have collapsed: feature_std=0.000" in line


def test_an_encoder_starts_supervised_training_at_another_size(byol_run, data):
  folder, state, _ = byol_run
  config = small(vit_sigmoid, data, init_from=str(folder))
  config.data.image_size = 42
  config.model.position_std = 0.5
  setup.validate_config(config)
  initial, _ = step.init(config, mesh.make())
  params = init_from.start(config, initial).params
  equal(params["encoder"], state.params["encoder"])
  equal(params["embed"], state.params["embed"])
  equal(params["head"], initial.params["head"])
  theirs = np.asarray(state.params["position"]).reshape(4, 4, -1)
  channel = Image.fromarray(theirs[:, :, 3])
  expected = np.asarray(channel.resize((6, 6), Image.Resampling.BICUBIC))
  actual = np.asarray(params["position"]).reshape(6, 6, -1)[:, :, 3]
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  wider = small(vit_sigmoid, data, init_from=str(folder))
  wider.model.update(width=32)
  with pytest.raises(
    ValueError,
    match=r"config\.model\.width=32; must be 16 .*: --config\.model\.width=16",
  ):
    setup.validate_config(wider)


def numbered(config):
  """Replaces the initialisation of parameters by numbers from 0 on."""
  return jax.tree.map(
    lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape),
    setup.shapes(config),
  )


def test_positions_follow_the_class_token(data):
  theirs, ours = small(byol, data), small(vit_sigmoid, data)
  theirs.model.pool = "class"
  before = numbered(theirs)["position"]
  for pool, expected in (("class", before), ("mean", before[1:])):
    ours.model.pool = pool
    taken, _ = transfer.take(ours, numbered(ours), theirs, numbered(theirs))
    np.testing.assert_allclose(taken["position"], expected, rtol=1e-6)
  theirs.model.pool, ours.model.pool = "mean", "class"
  with pytest.raises(ValueError, match=r"pool='class'; must be 'mean'"):
    transfer.take(ours, numbered(ours), theirs, numbered(theirs))


def test_eval_probes_the_frozen_features(byol_run):
  folder, *_ = byol_run
  run = subprocess.run(
    [
      sys.executable, "eval.py", f"--workdir={folder}", "--eval=linear_probe",
    ],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr[-3000:]
  assert "random encoder" in run.stdout
  results = json.loads((folder / "linear_probe.json").read_text())
  # With 16 features a probe partly separates 64 noisy images of ten classes.
  assert 0.2 < results["train_accuracy"] <= 1
  assert 0 <= results["accuracy"] <= 1
  assert results["random_encoder"].keys() == {"accuracy", "train_accuracy"}


def test_features_and_what_mae_draws_are_drawn(untrained_mae, tmp_path):
  config, params = untrained_mae
  paths = features.draw(config, params, "test", mesh.make(), tmp_path)
  assert [path.name for path in paths] == ["features.png", "drawings.png"]
  for path in paths:
    assert Image.open(path).size > (100, 100)
  # Pictures of another split do not overwrite those of the run's own.
  paths = features.draw(
    config, params, "train", mesh.make(), tmp_path, "_train"
  )
  assert [path.name for path in paths] == [
    "features_train.png", "drawings_train.png",
  ]  # fmt: skip


def test_eval_fine_tunes(byol_run, monkeypatch):
  whole = evaluation_command.finetune_config.get_config

  def short(workdir):
    config = whole(workdir)
    config.total_steps = 1
    config.ckpt.every_steps = 1
    return config

  folder, *_ = byol_run
  monkeypatch.setattr(evaluation_command.finetune_config, "get_config", short)
  results = evaluation_command.finetune(folder)
  assert results["step"] == 1
  assert {"accuracy", "loss"} < results.keys()
  state = setup.model(*checkpoint.load(folder / "finetune")[:2])
  assert state(np.zeros((1, 28, 28, 1), np.float32)).shape == (1, 10)


def test_principal_components_are_those_of_the_covariance():
  x_MD = rng().normal(size=(50, 4)) * [1, 5, 0.1, 3]
  xy_M2, share_2 = features.principal_components(x_MD)
  values = np.linalg.eigvalsh(np.cov(x_MD.T))[::-1]
  np.testing.assert_allclose(xy_M2.var(0, ddof=1), values[:2], rtol=1e-6)
  np.testing.assert_allclose(share_2, values[:2] / values.sum(), rtol=1e-6)


# Configs.

TWINS = ((simclr, simclr_sigmoid), (byol, byol_sigmoid), (mae, mae_sigmoid))


@pytest.mark.parametrize("arg", [None, "runlocal", "gpu", "imagenet"])
@pytest.mark.parametrize("twins", TWINS, ids=lambda x: x[0].__name__)
def test_sigmoid_differs_from_its_softmax_twin_by_the_kind_alone(
  twins, arg, data
):
  softmax, sigmoid = (module.get_config(arg) for module in twins)
  assert sigmoid.attn.kind == "sigmoid"
  if arg != "imagenet":  # that one is traced below
    sigmoid.data.source = str(data)
    setup.validate_config(sigmoid)
    sigmoid.data.source = softmax.data.source
  sigmoid.attn.kind = "softmax"
  assert sigmoid == softmax
  assert softmax.is_locked


@pytest.mark.parametrize(
  "module", [x for pair in TWINS for x in pair], ids=lambda x: x.__name__
)
def test_the_recipe_for_imagenet_traces_at_its_size(module):
  config = module.get_config("imagenet")
  # Validate everything except the data: a test cannot reach the Hub.
  config.data.update(source="fashion_mnist", eval_split="test", num_classes=10)
  setup.validate_config(config)
  side = config.data.canvas_size
  batch = {
    "image": jax.ShapeDtypeStruct((4096, side, side, 3), jnp.uint8),
    "target": jax.ShapeDtypeStruct((4096,), jnp.int32),
  }

  def first(batch):
    state, update = step.init(config, mesh.make())
    return update(state, batch)

  *_, state, metrics = jax.eval_shape(first, batch)
  depth, width = (24, 1024) if config.task == "mae" else (12, 768)
  shape = state.params["encoder"]["blocks"]["attn"]["out"]["kernel"].shape
  assert shape[0] == depth
  assert shape[-1] == width
  assert metrics["loss"].shape == ()


BAD = [
  (simclr, "model.temperature", 0.0),
  (simclr, "model.projection_dim", 0),
  (simclr, "augment.blur_shares", (0.5,)),
  (simclr, "augment.solarize_shares", (0.5, 1.5)),
  (simclr, "augment.brightness", 1.0),
  (simclr, "augment.hue", 0.6),
  (simclr, "augment.min_area", 0.0),
  (simclr, "data.canvas_size", 27),
  (simclr, "eval.knn_neighbours", 17),  # of 16
  (simclr, "ckpt.best_metric", "accuracy"),
  (byol, "model.target_momentum", 1.5),
  (byol, "optim.ema_decay", 0.9),
  (mae, "model.mask_share", 1.0),
  (mae, "model.mask_share", 0.99),  # of 49 patches
  (mae, "model.mask_share", 0.0),
  (mae, "model.positions", "rope"),
  (mae, "attn.alibi", True),
  (mae, "attn.window", 2),
  (mae, "model.decoder_heads", 3),
  (mae, "model.decoder_width", 66),
]


@pytest.mark.parametrize(
  ("module", "path", "value"),
  BAD,
  ids=[f"{module.__name__}-{path}={value}" for module, path, value in BAD],
)
def test_bad_value_is_refused_with_its_path(module, path, value):
  config = module.get_config("runlocal")
  config.update_from_flattened_dict({path: value})
  with pytest.raises(ValueError, match=rf"config\.{path}"):
    setup.validate_config(config)
