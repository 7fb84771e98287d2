"""Pictures of attention maps: the chosen example, its labels, and the files."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs import lm_sigmoid, speech_sigmoid, synthetic_sigmoid, vit_sigmoid
from sigattn import tasks
from sigattn.analysis import attention_maps, plots, telemetry
from sigattn.training import checkpoint, run_dir, setup


def vit(**values):
  config = vit_sigmoid.get_config("runlocal")
  config.update_from_flattened_dict(values)
  return config


def test_example_returns_the_example_with_that_index():
  config = vit()
  [batch] = [next(iter(tasks.eval_batches(config, "test")))]
  example = attention_maps.example(config, 3)
  np.testing.assert_array_equal(example["image"], batch["image"][3:4])
  assert config.batch_size == 8
  with pytest.raises(ValueError, match=r"example=2000; 'test' has 2000"):
    attention_maps.example(config, 2000)
  with pytest.raises(ValueError, match=r"example=-1"):
    attention_maps.example(config, -1)


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_patch_attention_is_of_the_pooled_or_the_class_token(pool):
  config = vit(**{"model.pool": pool})
  tokens = 16 + (pool == "class")
  weights = np.random.default_rng(0).random((2, 2, tokens, tokens))
  patches_LNRC = tasks.get("vit").patch_attention(config, weights)
  assert patches_LNRC.shape == (2, 2, 4, 4)
  row_T = weights[1, 0].mean(0) if pool == "mean" else weights[1, 0, 0, 1:]
  assert patches_LNRC[1, 0, 2, 3] == pytest.approx(row_T[2 * 4 + 3])


@pytest.mark.parametrize(
  ("module", "arg"),
  [
    (lm_sigmoid, "runlocal"),
    (speech_sigmoid, "runlocal"),
    (synthetic_sigmoid, "summation,runlocal"),
    (synthetic_sigmoid, "recall,runlocal"),
  ],
)
def test_every_token_that_attends_has_a_tick_label(module, arg):
  config = module.get_config(arg)
  task, batch = tasks.get(config.task), attention_maps.example(config, 1)
  tick_labels = task.tick_labels(config, batch)
  params = jax.eval_shape(lambda: setup.init(config)[1])
  shapes = jax.eval_shape(
    lambda *args: telemetry.collect(config, *args, attention_maps._weights),
    params,
    batch,
  )
  [shape] = [x.shape for x in shapes.values()]
  assert shape[1] == 1
  # An utterance is padded to the length of its bucket.
  assert len(tick_labels) == shape[-1] or config.task == "speech"
  assert 0 < len(tick_labels) <= shape[-1]
  assert all(isinstance(label, str) for label in tick_labels)


def test_draw_writes_one_map_per_layer(tmp_path, monkeypatch):
  config = lm_sigmoid.get_config("runlocal")
  _, params = setup.init(config)
  with run_dir.RunDir(tmp_path, config) as folder:
    folder.begin()
  monkeypatch.setattr(checkpoint, "load", lambda *_: (config, params, 2))
  drawn = []
  monkeypatch.setattr(
    plots,
    "matrices",
    lambda *args: drawn.append(args) or plots._figure(1, 1)[0],
  )
  paths = attention_maps.draw(tmp_path, 1, tokens=5)
  names = [f"example1_stack_layer{i}.png" for i in range(2)]
  assert [path.name for path in paths] == names
  other = tmp_path / "other.txt"
  other.write_text("In the beginning " * 99)
  monkeypatch.chdir(tmp_path)
  others = attention_maps.draw(tmp_path, 1, tokens=5, source="other.txt")
  assert [path.name for path in others] == [
    f"example1_stack_layer{i}_other.txt.png" for i in range(2)
  ]
  assert all(path.exists() for path in paths)
  drawn[:2], drawn[2:] = drawn[2:], drawn[:2]
  del drawn[:2]
  assert Image.open(paths[0]).size[0] > 100
  weights_NTS, tick_labels, title = drawn[1]
  assert len(tick_labels) == 5
  assert title.endswith("query by key, the first 5 of 32 tokens")
  # Attention is causal, so the first token sees only itself.
  assert weights_NTS.shape == (2, 32, 32)
  assert (weights_NTS[:, 0, 0] > 0).all()
  assert not weights_NTS[:, 0, 1:].any()
