"""Meshes: what a device holds, what is refused, and equal results of all."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import lm_sigmoid, vit_sigmoid
from eval import evaluate
from sigattn import tasks
from sigattn.inference import generate
from sigattn.training import mesh, optim, setup
from tests.training import small_mesh
from train import train

# Every kind of split, and all ways in which four axes can share eight devices.
SOME = ["2,2,2,1", "1,1,2,4"]
ALL = [
  f"{data},{fsdp},{tensor},{8 // (data * fsdp * tensor)}"
  for data in (1, 2, 4, 8)
  for fsdp in (1, 2, 4, 8)
  for tensor in (1, 2, 4, 8)
  if data * fsdp * tensor <= 8
]


def on_eight_devices(*words):
  """Runs meshes_on_eight_devices.py and returns what it prints."""
  command = [sys.executable, "-m", "tests.training.meshes_on_eight_devices"]
  run = subprocess.run(
    [*command, *map(str, words)], capture_output=True, text=True, check=False
  )
  assert run.returncode == 0, run.stderr[-3000:]
  return run.stdout


@pytest.mark.timeout(1200)
def test_loss_and_gradients_on_every_mesh_equal_one_device(request):
  shapes = ALL if request.config.getoption("--all-meshes") else SOME
  on_eight_devices("gradients", *shapes)


def test_runs_go_on_and_are_evaluated_on_any_mesh(tmp_path, monkeypatch):
  monkeypatch.setattr(tasks, "eval_batches", small_mesh.few_eval_batches)
  one, eight, whole = (tmp_path / x for x in ("one", "eight", "whole"))

  def last(folder):
    return json.loads((folder / "DONE.json").read_text())["loss"]

  train(small_mesh.run(), one)
  begun = last(one)
  evaluated = on_eight_devices("runs", one, eight).splitlines()[-1]
  assert float(evaluated) == pytest.approx(begun, rel=1e-5)
  train(small_mesh.run(total_steps=2), whole)
  assert last(one) == pytest.approx(last(whole), rel=1e-5)
  # Now a run moves from eight devices to one.
  assert last(eight) == pytest.approx(begun, rel=1e-5)
  assert evaluate(eight)["loss"] == pytest.approx(begun, rel=1e-5)
  assert generate.Generator.load(eight)(["And God said"])
  train(small_mesh.run(total_steps=2), eight)
  assert last(eight) == pytest.approx(last(whole), rel=1e-5)


def test_batch_is_split_and_the_rest_is_replicated():
  devices = mesh.make()
  size = 2 * jax.device_count()
  batch = mesh.put({"x": np.arange(size)}, devices)
  np.testing.assert_array_equal(batch["x"], np.arange(size))
  assert batch["x"].sharding.is_equivalent_to(mesh.batch(devices), 1)
  assert mesh.replicated(devices).is_fully_replicated


def test_batch_that_the_devices_cannot_share_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 3)
  config = vit_sigmoid.get_config("runlocal")  # 8 images per batch
  with pytest.raises(ValueError, match=r"config\.batch_size=8 .*the 3 devices"):
    setup.validate_config(config)


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ({"mesh.fsdp": 3}, r"config\.mesh\.fsdp=3 .* must divide the 8 that"),
    ({"mesh.data": 2}, r"config\.mesh\.data=2 .*: 2 devices; must be the 8"),
    (
      {"mesh.fsdp": None},
      r"data=None x config\.mesh\.fsdp=None .* one of them may be None",
    ),
    (
      {"mesh.tensor": 4},
      r"config\.mesh\.tensor=4; must divide config\.model\.num_heads=2",
    ),
    (
      {"mesh.tensor": 2, "model.mlp_dim": 33},
      r"config\.mesh\.tensor=2; must divide 33, axis \d of the parameter "
      r"stack/blocks/mlp/\w+/kernel",
    ),
    (
      {"mesh.data": 1, "mesh.fsdp": 8, "model.width": 12},
      r"config\.mesh\.fsdp=8; must divide 12, axis 1 of the parameter embed",
    ),
    (
      {"mesh.sequence": 2, "attn.kind": "softmax", "attn.normalize": False},
      r"config\.mesh\.sequence=2; must be 1 with config\.attn\.kind='softmax'",
    ),
    (
      {"mesh.sequence": 8, "data.length": 36},
      r"config\.mesh\.sequence=8; must divide config\.data\.length=36",
    ),
    (
      {"mesh.tensor": 2, "model.num_heads": 4, "attn.num_kv_heads": 3},
      r"config\.attn\.num_kv_heads=3",
    ),
    ({"mesh.exchange": "tree"}, r"config\.mesh\.exchange='tree'; choose from"),
  ],
)
def test_sizes_that_do_not_divide_are_refused_by_path(
  values, said, monkeypatch
):
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  config = lm_sigmoid.get_config("runlocal")
  with config.ignore_type():
    config.update_from_flattened_dict(values)
  with pytest.raises(ValueError, match=said):
    setup.validate_config(config)


def abstract(config, devices):
  """A mesh without devices, and the shapes of the parameters on it."""
  sizes = mesh.sizes(config, devices)
  meshed = jax.sharding.AbstractMesh((*sizes.values(),), mesh.AXES)
  params = setup.shapes(config)
  return meshed, on_mesh(params, mesh.parameters(params, meshed))


def on_mesh(shapes, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def test_the_7b_model_fits_eight_cards_of_80_gb_by_count():
  """It counts parameters, optimizer, gradients and activations.

  Gradients count twice, because micro-batches are added up. Activations are the
  input and the results of the matrix products of each layer, which
  remat="dots" stores; three copies of everything that one layer computes; and
  three arrays for a chunk of the float32 logits: the logits, the softmax and
  the cotangent. XLA needs more memory than this count.
  """
  config = lm_sigmoid.get_config("7b")
  meshed, params = abstract(config, 8)
  tx = optim.make(config, params)
  state = on_mesh(
    jax.eval_shape(tx.init, params), mesh.optimizer(tx, params, meshed)
  )
  held = mesh.bytes_a_device(params)
  model, data = config.model, config.data
  rows = config.batch_size // config.optim.accumulate // 8
  tokens, width = rows * data.length, model.width
  layer = tokens * (6 * width + 3 * model.mlp_dim) * 2
  one_layers_parameters = (4 * width**2 + 3 * width * model.mlp_dim) * 4
  parts = {
    "parameters": held,
    "optimizer": mesh.bytes_a_device(state),
    "gradients": 2 * held,
    "layers": model.depth * tokens * (7 * width + 2 * model.mlp_dim) * 2,
    "one layer": 3 * layer + 2 * one_layers_parameters,
    "logits": 3 * tokens // model.loss_chunks * data.vocab_size * 4,
  }
  count = sum(x.size for x in jax.tree.leaves(params))
  assert count == pytest.approx(6.48e9 + data.vocab_size * width, rel=0.01)
  # Nearly all of it is split: the parameters and AdamW's two moments, float32.
  assert parts["optimizer"] == pytest.approx(2 * held, rel=0.01)
  assert held == pytest.approx(4 * count / 8, rel=0.01)
  total = sum(parts.values())
  assert model.remat == "dots"
  assert total == pytest.approx(48e9, rel=0.02), parts
  # With only the axis `data` it would not fit.
  with config.unlocked():
    config.mesh.update(data=8, fsdp=1)
  assert 4 * mesh.bytes_a_device(abstract(config, 8)[1]) > 80e9


def test_table_names_the_split_the_rule_and_what_a_device_holds():
  config = small_mesh.config(**{"mesh.fsdp": 2, "mesh.tensor": 4})
  _, params = abstract(config, 8)
  params["new"] = on_mesh(
    {"thing": jax.ShapeDtypeStruct((1024, 1024), "float32")},
    {"thing": mesh.replicated(params["embed"].sharding.mesh)},
  )
  table = mesh.table(params)
  columns = [[*column.cells] for column in table.columns]
  rows = {name: rest for name, *rest in zip(*columns, strict=True)}
  assert rows["embed"] == ["64x32", "0 tensor, 1 fsdp", "0.00"]
  name = "stack/blocks/attn/query/kernel"
  assert rows[name] == ["1x32x8x4", "1 fsdp, 2 tensor", "0.00"]
  assert rows["stack/blocks/attn/logit_bias"] == ["1x8", "1 tensor", "0.00"]
  assert rows["norm/scale"] == ["32", "replicated, no rule", "0.00"]
  assert rows["new/thing"] == ["1024x1024", "replicated, no rule", "4.00"]
  total = sum(x.size for x in jax.tree.leaves(params))
  assert rows["all"][0] == f"{total:,}"


def test_evaluation_fits_the_devices_that_there_are(monkeypatch):
  made = []
  monkeypatch.setattr(mesh, "_mesh", lambda sizes: made.append(sizes))
  config = lm_sigmoid.get_config("runlocal")  # 8 rows
  config.mesh.update(fsdp=4, tensor=2)
  for count in (8, 12):
    monkeypatch.setattr(jax, "device_count", lambda count=count: count)
    mesh.for_evaluation(config)
  assert made == [
    {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1},
    {"fsdp": 4, "tensor": 3},
  ]
