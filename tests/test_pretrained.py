"""Compares models of transformers and timm with the libraries' own outputs.

tests/references/make.py made the models and the outputs.
"""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
import tokenizers

from configs import lm_sigmoid, vit, vit_sigmoid
from sigattn import pretrained
from sigattn.training import (
  checkpoint,
  init_from,
  mesh,
  metrics,
  setup,
  step,
)
from train import train

ROOT = pathlib.Path(__file__).parents[1]
REFERENCES = ROOT / "tests" / "references"
LANGUAGE, VISION = ("llama", "gpt_neox"), ("vit", "timm", "timm_mean")


def make(name, **values):
  """The config of a reference, with softmax."""
  folder = REFERENCES / name
  if name in LANGUAGE:
    config = lm_sigmoid.get_config("runlocal")
    config.attn.update(alibi=False, qk_norm="none")
    config.data.update(tokenizer="bytes", length=16)
  else:
    config = vit_sigmoid.get_config("runlocal")
    config.data.update(mean=(0.5,) * 3, std=(0.5,) * 3)
  config.update_from_flattened_dict(pretrained.values(folder))
  config.init_from = str(folder)
  config.attn.update(kind="softmax", normalize=False)
  config.update_from_flattened_dict(values)
  return config


def initial(config):
  """Parameters of the right shapes. Their values will be overwritten."""
  shapes = jax.eval_shape(lambda: setup.init(config)[1])
  return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)


def started(config):
  return pretrained.start(config, initial(config)).params


def loaded(config):
  params = started(config)
  return setup.model(config, jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("name", [*LANGUAGE, *VISION])
def test_loaded_models_compute_what_theirs_do(name):
  expected = np.load(REFERENCES / name / "expected.npz")
  model = loaded(make(name))
  if name in LANGUAGE:
    logits = model(jnp.asarray(expected["token"]))
  else:
    logits = model(jnp.asarray(expected["image"].transpose(0, 2, 3, 1)))
  assert np.ptp(expected["logits"]) > 1
  np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=2e-5)


def test_a_share_of_rope_is_that_of_gpt_neox_alone(tmp_path):
  """transformers' Llama ignores it, and GPT-NeoX rotates 0.25 by default."""
  rope = {"rope_theta": 5e5, "rope_type": "default"}
  folder = altered(
    tmp_path, rope_parameters=rope | {"partial_rotary_factor": 0.5}
  )
  expected = np.load(REFERENCES / "llama" / "expected.npz")
  config = make("llama", **pretrained.values(folder))
  config.init_from = str(folder)
  logits = loaded(config)(jnp.asarray(expected["token"]))
  np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=2e-5)
  del rope["rope_type"]
  neox = altered(tmp_path, "gpt_neox", rope_parameters=rope)
  assert pretrained.values(neox)["model.rope_share"] == 0.25


def test_a_setting_of_rope_that_is_null_is_as_if_it_were_not_given(tmp_path):
  settings = "rope_theta", "rotary_emb_base", "rotary_pct"
  null = dict.fromkeys((*settings, "partial_rotary_factor", "rope_parameters"))
  values = pretrained.values(altered(tmp_path, "gpt_neox", **null))
  assert values["model.rope_base"] == 10_000
  assert values["model.rope_share"] == 0.25


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "vit"])
def test_saved_models_are_theirs_bit_for_bit(name, tmp_path):
  config = make(name)
  params = started(config)
  pretrained.save(config, params, tmp_path / "saved")
  ours, theirs = (
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (tmp_path / "saved", REFERENCES / name)
  )
  assert ours.keys() == theirs.keys()
  modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
  assert len(modes) == 1  # whoever reads the config reads the tensors
  for key, tensor in theirs.items():
    np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
  # The saved config has the same values when it is loaded.
  assert pretrained.values(tmp_path / "saved") == pretrained.values(
    REFERENCES / name
  )


def test_several_files_and_bfloat16_are_read(tmp_path):
  folder = tmp_path / "llama"
  shutil.copytree(REFERENCES / "llama", folder)
  tensors = safetensors.flax.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  names = sorted(tensors)
  for i, part in enumerate((names[:7], names[7:])):
    safetensors.flax.save_file(
      {x: tensors[x].astype("bfloat16") for x in part},
      folder / f"model-0000{i + 1}-of-00002.safetensors",
    )
  config = make("llama", init_from=str(folder))
  params = started(config)
  wanted = np.asarray(tensors["model.embed_tokens.weight"])
  np.testing.assert_allclose(params["embed"], wanted, rtol=2**-8)
  assert params["embed"].dtype == np.float32


def command(*words):
  done = subprocess.run(
    [sys.executable, *words], cwd=ROOT, capture_output=True, text=True
  )
  return done.returncode, done.stdout + done.stderr


def test_the_command_names_what_the_model_needs():
  code, said = command(
    "train.py", "--config=configs/lm_sigmoid.py:runlocal",
    f"--config.init_from={REFERENCES / 'llama'}",
  )  # fmt: skip
  assert code == 1
  assert (
    "train.py: config.model.norm='hybrid'; must be 'pre' for config" in said
  )
  assert "--config.model.rope_base=500000.0 " in said
  assert "--config.attn.alibi=False" in said


def test_a_field_of_another_group_is_named():
  code, said = command(
    "train.py", "--config=configs/lm_sigmoid.py:runlocal",
    "--config.model.num_kv_heads=2",
  )  # fmt: skip
  assert code == 1
  assert (
    "config.model has no field 'num_kv_heads'; did you mean "
    "config.attn.num_kv_heads?\n" in said
  )


def test_a_softmax_model_goes_on_with_sigmoid_and_is_saved(tmp_path, capsys):
  text = tmp_path / "a.txt"
  text.write_text("hello jello yellow fellow " * 30)
  config = make(
    "llama",
    **{
      "attn.kind": "sigmoid", "attn.learn_logit_bias": True,
      "data.source": str(text), "data.tokenizer": "characters",
      "batch_size": 2, "total_steps": 1, "optim.lr": 1e-6,
      "optim.ema_decay": 0.9,
    },
  )  # fmt: skip
  state = train(config, tmp_path / "run")
  said = capsys.readouterr().out
  assert f"{REFERENCES / 'llama'}: llama, 12 of 13 arrays" in said
  assert "initial values: stack/blocks/attn/logit_bias" in said
  first = metrics.read(tmp_path / "run")[0]
  assert (first["step"], first["split"]) == (0, "test")
  start = started(config)
  for tree in (state.params, state.ema):
    np.testing.assert_allclose(tree["embed"], start["embed"], atol=1e-5)
  bias_LN = state.params["stack"]["blocks"]["attn"]["logit_bias"]
  np.testing.assert_allclose(bias_LN, -np.log(16), atol=1e-4)
  config.total_steps = 2  # this run starts from the checkpoint
  assert int(train(config, tmp_path / "run").step) == 2
  with pytest.raises(
    ValueError,
    match=r"is llama, but config\.attn\.kind='sigmoid', not 'softmax'\. .*"
    r"use `python -m sigattn generate`, .* or eval\.py on the run$",
  ):
    pretrained.save(config, state.params, tmp_path / "out")
  image = make("vit", **{"attn.kind": "sigmoid"})
  with pytest.raises(ValueError, match=r"attention; use eval\.py on the run$"):
    pretrained.save(image, {}, tmp_path / "out")
  gated = make("llama", **{"attn.forget_gate": True})
  with pytest.raises(ValueError, match=r"attn\.forget_gate=True, not False$"):
    pretrained.save(gated, state.params, tmp_path / "out")
  with pytest.raises(ValueError, match=r"forget_gate=True; must be False for"):
    setup.validate_config(gated)
  assert not (tmp_path / "out").exists()


def write_tokenizer(path):
  """A tokenizer of the letters of the text below."""
  names = ["<|endoftext|>", *" \nefhjlowy"]
  vocabulary = {name: i for i, name in enumerate(names)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.save(str(path))


def files(folder):
  return [x for x in pathlib.Path(folder).rglob("*") if x.is_file()]


def test_a_run_is_exported_and_read_again(tmp_path):
  text = tmp_path / "a.txt"
  text.write_text("hello jello yellow fellow " * 30)
  write_tokenizer(tmp_path / "letters.json")
  config = make(
    "gpt_neox",
    **{
      "data.source": str(text), "batch_size": 2, "total_steps": 1,
      "data.tokenizer": str(tmp_path / "letters.json"),
    },
  )  # fmt: skip
  train(config, tmp_path / "run")
  out = str(tmp_path / "out")
  code, said = command(
    "-m", "sigattn", "export", f"--workdir={tmp_path / 'run'}", f"--out={out}"
  )
  assert code == 0, said
  assert said.startswith(f"{out}: the model of step 1\n"), said
  assert not re.search(r"^I\d{4} ", said, re.MULTILINE), said  # Orbax says it
  config.init_from = out
  again = started(config)
  _, params, _ = checkpoint.load(tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))
  # What is there is not overwritten: neither a model nor a run.
  for folder in (out, str(tmp_path / "run")):
    before = {x: x.read_bytes() for x in files(folder)}
    code, said = command(
      "-m", "sigattn", "export", f"--workdir={tmp_path / 'run'}",
      f"--out={folder}",
    )  # fmt: skip
    assert code == 1
    assert said.startswith(f"sigattn export: --out={folder!r}: has ")
    assert said.endswith("delete it or name another folder\n")
    assert {x: x.read_bytes() for x in files(folder)} == before
  # Characters have other ids than the tokenizer of the folder.
  config.data.tokenizer = "characters"
  with pytest.raises(ValueError, match=rf"tokenizer={out}/tokenizer\.json$"):
    setup.validate_config(config)


def test_another_number_of_classes_gets_a_new_head():
  config = make("timm", **{"data.num_classes": 7})
  params = started(config)
  assert params["head"]["kernel"].shape == (8, 7)
  assert not params["head"]["kernel"].any()
  assert params["position"].any()


def altered(tmp_path, name="llama", **changes):
  """A reference with other settings in its config."""
  folder = tmp_path / name
  shutil.copytree(REFERENCES / name, folder)
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  return folder


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "gemma2"}, r"model_type='gemma2', must be one of"),
    ({"attention_bias": True}, r"attention_bias=True; must be one of \[False"),
    ({"hidden_act": "relu"}, r"hidden_act='relu'; must be one of \['silu'"),
    ({"head_dim": 8}, r"head_dim=8; must be one of \[4\]"),
    (
      {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
      r"rope_type='llama3'; must be one of \['default'\]",
    ),
    (
      {"rope_scaling": {"type": "linear", "factor": 2.0}},
      r"rope_type='linear'; must be one of \['default'\]",
    ),
    (
      {"quantization_config": {"quant_method": "fp8"}},
      r"quantization_config=.*'fp8'.*; must be null: save",
    ),
    ({"model_type": []}, r"json: model_type=\[\]; must be a string"),
    ({"hidden_size": "64"}, r"hidden_size='64'; must be a whole number >= 1$"),
    ({"num_attention_heads": 0}, r"num_attention_heads=0; must be a whole"),
    ({"num_attention_heads": None}, r"num_attention_heads=None; must be a who"),
    ({"num_attention_heads": [4]}, r"num_attention_heads=\[4\]; must be a who"),
    ({"rope_parameters": 1.5}, r"json: rope_parameters=1\.5; must be an obj"),
    (
      {"rope_parameters": {"rope_theta": "1"}},
      r"init_from=.*: rope_parameters\.rope_theta='1'; must be a finite number",
    ),
    ({"tie_word_embeddings": "no"}, r"tie_word_embeddings='no'; must be True"),
    ({"num_hidden_layers": 3}, r"disagree: .* no tensor 'model\.layers\.2"),
    (
      {"num_hidden_layers": 1},
      r"disagree: unknown tensors are \['model\.layers\.1",
    ),
    (
      {"intermediate_size": 20},
      r"disagree: .*\(24, 16\), which does not fit .*\(16, 20\)",
    ),
  ],
)
def test_a_model_that_ours_cannot_be_is_refused(change, message, tmp_path):
  folder = altered(tmp_path, **change)

  def read():
    config = make("llama")
    config.update_from_flattened_dict(pretrained.values(folder))
    config.init_from = str(folder)
    started(config)

  with pytest.raises(ValueError, match=message):
    read()


def test_a_missing_head_is_not_taken_for_a_tied_one(tmp_path):
  """lerobot issue 1529: lm_head is not saved if it is the embedding."""
  for tied in (True, False):
    folder = altered(tmp_path / str(tied), tie_word_embeddings=tied)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    if tied:
      config = make("llama", **pretrained.values(folder))
      config.init_from = str(folder)
      assert "head" not in started(config)
      continue
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight', and"):
      pretrained.values(folder)


def test_the_error_has_all_flags_of_an_image_model(tmp_path):
  folder = tmp_path / "vit"
  shutil.copytree(REFERENCES / "vit", folder)
  (folder / "preprocessor_config.json").write_text(
    json.dumps({"image_mean": [0.5, 0.5, 0.4], "image_std": [0.5, 0.5, 0.6]})
  )
  config = vit_sigmoid.get_config("runlocal")
  config.model.num_heads = 4
  config.init_from = str(folder)
  with pytest.raises(ValueError, match="whose model needs") as caught:
    setup.validate_config(config)
  words = shlex.split(str(caught.value).split("needs: ")[1])
  assert "--config.data.mean=(0.5, 0.5, 0.4)" in words
  assert "--config.data.std=(0.5, 0.5, 0.6)" in words
  assert words[-1] == "--config.data.num_classes=3"
  # None means as many heads of keys as the flags give to the queries.
  assert "--config.model.num_heads=2" in words
  assert not [x for x in words if "num_kv_heads" in x]
  with pytest.raises(ValueError, match=r"use configs/vit_sigmoid\.py"):
    setup.validate_config(make("llama", init_from=str(folder)))


def test_an_unknown_normalisation_is_asked_for(caplog):
  """The reference was saved without a preprocessor."""
  config = vit_sigmoid.get_config("runlocal")
  config.init_from = str(REFERENCES / "vit")
  said = r"Also give --config\.data\.mean and .*\.std, 3 numbers each"
  with pytest.raises(ValueError, match=said):
    setup.validate_config(config)
  config.data.update(mean=(0.5,) * 3, std=(0.5,) * 3)
  with pytest.raises(ValueError, match=r"needs: ") as caught:
    setup.validate_config(config)
  assert "Also give" not in str(caught.value)
  # If the number of channels fits, the values of the config are named.
  config = make("vit")
  config.data.update(mean=(0.5, 0.4, 0.3), std=(0.5,) * 3)
  state = step.init(config, mesh.make())[0]
  init_from.start(config, state)
  assert "'--config.data.mean=(0.5, 0.4, 0.3)'" in caplog.text


def test_a_folder_without_a_model_is_refused(tmp_path):
  config = vit.get_config()
  config.init_from = str(tmp_path)
  with pytest.raises(ValueError, match=r"init_from='.*'; needs a config\.json"):
    setup.validate_config(config)
  shutil.copy(REFERENCES / "vit" / "config.json", tmp_path)
  (tmp_path / "pytorch_model.bin").touch()
  for folder, message in (
    ("google/vit-tiny", r"no such folder.*hf download NAME --local-dir"),
    (tmp_path / "config.json", rf"is a file; give its folder, '{tmp_path}'"),
    (tmp_path, r"has pytorch_model\.bin.*again with save_pretrained"),
  ):
    config.init_from = str(folder)
    with pytest.raises(ValueError, match=message):
      setup.validate_config(config)
  config.init_from = str(REFERENCES / "llama")
  with pytest.raises(
    ValueError, match=r"of the task 'lm', not of config\.task"
  ):
    setup.validate_config(config)
