"""The acoustic encoder: loss, metrics, configs and transcription."""

import copy
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

from configs import speech as speech_config
from configs import speech_sigmoid
from eval import evaluate
from sigattn import positions, validate
from sigattn.data import log_mel
from sigattn.data import speech as data
from sigattn.inference.transcribe import transcribe
from sigattn.tasks import ctc, speech
from sigattn.training import setup
from tests.data.recordings import (
  encode_audio,
  noise,
  recording,
  small,
  write_folder,
)
from train import train

ROOT = pathlib.Path(__file__).parents[2]
KEY = jax.random.key(0)
ALPHABET = speech_config.get_config().data.alphabet


# Positions.


def test_cape_without_rng_is_centred_on_what_is_no_padding():
  positions_BT = positions.cape(None, jnp.array([4, 7]), 7, 5.0, 0.5, 1.5)
  np.testing.assert_allclose(positions_BT[0], np.arange(7) - 1.5)
  np.testing.assert_allclose(positions_BT[1], np.arange(7) - 3)


def test_cape_shifts_and_scales_within_its_limits():
  lengths_B = jnp.full((2000,), 8)
  plain = np.arange(8) - 3.5

  def draw(*limits):
    positions_BT = positions.cape(KEY, lengths_B, 8, *limits)
    return np.asarray(positions_BT)

  shift = draw(5.0, 0.0, 1.0) - plain
  np.testing.assert_allclose(np.ptp(shift, axis=1), 0, atol=1e-5)
  assert -5 <= shift.min() < -4.9
  assert 4.9 < shift.max() <= 5
  local = draw(0.0, 0.5, 1.0) - plain
  assert 0.49 < abs(local).max() <= 0.5
  assert abs(np.corrcoef(local[:, 0], local[:, 1])[0, 1]) < 0.1
  scale = draw(0.0, 0.0, 2.0) / plain
  np.testing.assert_allclose(np.ptp(scale, axis=1), 0, atol=1e-5)
  logs = np.log2(scale[:, 0])
  assert -1 <= logs.min() < -0.99
  assert 0.99 < logs.max() <= 1
  assert abs(logs.mean()) < 0.05


def test_sincos_of_whole_positions_is_the_table():
  table_BTD = positions.sincos(jnp.arange(5.0)[None], 6)
  np.testing.assert_allclose(table_BTD[0], positions.sincos_1d(5, 6), atol=1e-6)


# The encoder.


def fill(config):
  """Makes a model quickly, with random parameters, also of the head."""
  shapes = nnx.eval_shape(lambda: speech.build(config, nnx.Rngs(0)))
  graphdef, shapes = nnx.split(shapes)
  rng = np.random.default_rng(0)
  draw = functools.partial(rng.normal, 0.0, 0.3)
  return graphdef, jax.tree.map(lambda x: jnp.float32(draw(x.shape)), shapes)


def make_batch(seconds=(0.5, 0.2), length=0.6, characters=(5, 2)):
  rng = np.random.default_rng(1)
  return {
    "audio": rng.normal(0, 0.1, (2, int(length * 8000))).astype(np.float32),
    "samples": np.array([int(s * 8000) for s in seconds], np.int32),
    "target": rng.integers(1, 29, (2, 6), np.int32),
    "characters": np.array(characters, np.int32),
    "seconds": np.array(seconds, np.float32),
    "weight": np.ones(2, np.float32),
  }


@pytest.mark.parametrize(
  "values",
  [
    {"attn.alibi": True, "model.convolutions": ((7, 3), (4, 2))},
    {"attn.kind": "softmax", "model.positions": "cape"},
    {"model.positions": "rope", "attn.alibi": False},
  ],
  ids=str,
)
def test_padding_changes_nothing(values):
  config = small(**values)
  graphdef, state = fill(config)

  @jax.jit
  def run(state, batch):
    return nnx.merge(graphdef, state)(*speech.log_mel_of(config, batch))

  batch = make_batch()
  logits_BTV, tokens_B = run(state, batch)
  for i, samples in enumerate(batch["samples"]):
    alone = {
      "audio": batch["audio"][i : i + 1, :samples],
      "samples": batch["samples"][i : i + 1],
    }
    expected, [tokens] = run(state, alone)
    assert tokens == tokens_B[i] == expected.shape[1]
    logits_TV = logits_BTV[i, :tokens]
    np.testing.assert_allclose(logits_TV, expected[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["none", "sincos", "rope"])
def test_positions_tell_the_order_where_alibi_tells_distances_alone(name):
  # A convolution over one frame cannot see the order of frames.
  values = {"model.positions": name, "model.convolutions": ((1, 1),)}
  config = small(**values, **{"attn.alibi": True, "attn.logit_bias": 0.0})
  graphdef, state = fill(config)

  @jax.jit
  def run(state, x_BTM):
    return nnx.merge(graphdef, state)(x_BTM, jnp.array([12]))[0]

  x_BTM = noise(1, 12, 80)
  logits_BTV = run(state, x_BTM)
  mirrored_BTV = run(state, x_BTM[:, ::-1])[:, ::-1]
  same = np.allclose(logits_BTV, mirrored_BTV, rtol=1e-3, atol=1e-4)
  assert same == (name == "none")


@pytest.mark.parametrize(
  "values",
  [
    {"model.positions": "cape", "model.norm": "hybrid", "dtype": "bfloat16"},
    {"attn.kind": "softmax", "model.norm": "post", "model.remat": "all"},
  ],
  ids=str,
)
def test_every_parameter_has_a_finite_gradient(values):
  config = small(**values)
  validate.fields(config, speech.FIELDS, speech.RULES)
  graphdef, state = fill(config)

  @functools.partial(jax.grad, has_aux=True)
  def gradients(state):
    return speech.loss(config, nnx.merge(graphdef, state), make_batch(), KEY)

  grads, metrics = jax.jit(gradients)(state)
  for path, x in nnx.to_flat_state(grads):
    assert np.isfinite(x).all(), path
    assert path[-2:] == ("key", "bias") or abs(x[...]).max() > 0, path
  assert metrics.keys() == {"loss"}


def test_first_loss_is_that_of_equal_probabilities():
  config = small(**{"augment.time_masks": 0, "augment.freq_masks": 0})
  params = jax.tree.map(np.asarray, setup.init(config)[1])
  assert not params["head"]["kernel"].any()
  batch = make_batch(characters=(1, 1))
  static = setup.graphdef(config)

  @jax.jit
  def loss(params):
    return speech.loss(config, nnx.merge(static, params), batch, KEY)[0]

  tokens_B = [-(-log_mel.frames(s, 8000) // 3) for s in batch["samples"]]
  # A path is a run of tokens with the character, and blanks elsewhere. That
  # makes T (T + 1) / 2 paths.
  expected = [t * np.log(29) - np.log(t * (t + 1) / 2) for t in tokens_B]
  assert loss(params) == pytest.approx(np.mean(expected), rel=1e-4)


def test_n_is_the_tokens_of_the_longest_utterance():
  config = small(**{"data.bucket_seconds": (1.0, 16.0)})
  model = nnx.eval_shape(lambda: speech.build(config, nnx.Rngs(0)))
  assert model.encoder.blocks.attn.max_length == -(-(1600 - 2) // 3)


# Decoding and metrics.


def test_decode_searches_with_the_width_of_the_config():
  x_TV = np.random.default_rng(3).normal(0, 0.6, (5, 3))
  x_TV -= np.log(np.exp(x_TV).sum(1, keepdims=True))
  # The padding after the tokens would change the text.
  outputs = {"tokens": 5, "log_probs": np.append(x_TV, x_TV, axis=0)}
  config = small(**{"eval.beam_width": 50, "data.alphabet": "ab"})
  assert speech.decode(config, outputs) == ctc.prefix_beam(x_TV, "ab", 50)
  outputs = {"tokens": 3, "path": np.array([1, 0, 2, 2, 1])}
  config.eval.beam_width = 1
  assert speech.decode(config, outputs) == "ab"


def test_score_and_results_sum_over_utterances_and_by_length():
  config = small()
  texts = ["press two", "no", "star", "x"]
  hypotheses = ["pres two", "", "star", "y"]
  rows = [data.encode(" ".join(text), ALPHABET) for text in hypotheses]
  outputs = {
    "target": data._padded([data.encode(t, ALPHABET) for t in texts], 9, int),
    "characters": np.array([len(text) for text in texts]),
    "seconds": np.array([3.0, 10.0, 31.0, 5.0]),
    "weight": np.array([1, 1, 1, 0]),
    "loss": np.array([9.0, 2.0, 4.0, 100.0]),
    "tokens": np.array([len(row) for row in rows]),
    "path": data._padded(rows, 20, int),
  }
  # Replace the spaces that joined the letters by blanks.
  spaces = outputs["path"] == ALPHABET.index(" ") + 1
  places = np.arange(20) % 2 == 1
  outputs["path"] = np.where(spaces & places[None], ctc.BLANK, outputs["path"])
  results = speech.results(config, speech.score(config, outputs))
  assert results == pytest.approx(
    {
      "loss": 15 / 15,
      "cer": 3 / 15, "cer_0_10": 1 / 9, "cer_10_20": 1.0, "cer_30_up": 0.0,
      "wer": 2 / 4, "wer_0_10": 1 / 2, "wer_10_20": 1.0, "wer_30_up": 0.0,
    }
  )  # fmt: skip


# From training to text.


def test_trains_evaluates_and_transcribes(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
  (tmp_path / "data").mkdir()
  rows = [(recording(0.5), "one"), (recording(0.7), "two")]
  values = write_folder(tmp_path / "data", rows)
  config = small(**values, **{"data.bucket_seconds": (1.0,)})
  state = train(config, tmp_path / "run")
  start = setup.init(config)[1]
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, start)
  assert all(jax.tree.leaves(moved["head"]))
  results = evaluate(tmp_path / "run")
  assert {"loss", "cer", "wer", "cer_0_10", "wer_0_10"} <= results.keys()
  audio = noise(8000) / 20
  files = [tmp_path / "a.wav", tmp_path / "b.wav"]
  soundfile.write(files[0], audio, 8000, subtype="FLOAT")
  stereo = np.stack([audio, audio], axis=1)
  soundfile.write(files[1], stereo, 8000, subtype="FLOAT")
  texts = list(transcribe(tmp_path / "run", files))
  assert texts[0] == texts[1]
  (tmp_path / "empty.wav").write_bytes(
    encode_audio(np.zeros(0), 8000).getvalue()
  )
  (tmp_path / "text.wav").write_text("no sound")
  for name, message in [
    ("none.wav", "no such file"),
    ("text.wav", "cannot be read"),
    ("empty.wav", "holds no sound"),
  ]:
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
      next(transcribe(tmp_path / "run", [files[0], tmp_path / name]))
  done = subprocess.run(
    [
      sys.executable, "-m", "sigattn", "transcribe",
      f"--workdir={tmp_path / 'run'}", *files,
    ],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert done.stdout == f"{texts[0]}\n{texts[1]}\n"


# Configs.


ARGS = (
  None, "gpu", "runlocal", "librispeech", "100h", "librispeech,960h,runlocal",
)  # fmt: skip


@pytest.mark.parametrize("arg", ARGS)
def test_config_is_valid_and_differs_by_the_kind_alone(arg):
  for module in (speech_config, speech_sigmoid):
    config = module.get_config(arg)
    assert config.is_locked
    if config.data.source != "spoken_prompts":
      # Validate everything except the data: a test cannot reach the Hub.
      config = copy.deepcopy(config)
      config.data.update(
        source="spoken_prompts", train_split="train", eval_split="test"
      )
    setup.validate_config(config)
  softmax, sigmoid = (
    module.get_config(arg) for module in (speech_config, speech_sigmoid)
  )
  sigmoid.attn.kind = "softmax"
  assert sigmoid == softmax


def test_librispeech_encoder_is_the_papers():
  config = speech_config.get_config("librispeech")
  model = nnx.eval_shape(lambda: speech.build(config, nnx.Rngs(0)))
  kernels = [
    x.size
    for path, x in nnx.to_flat_state(nnx.state(model.encoder))
    if path[-1] == "kernel"
  ]
  assert sum(kernels) == 36 * 12 * 768**2


@pytest.mark.parametrize("arg", ["librispech", "100h,960h", "gpu,100h", "h200"])
def test_bad_argument_is_refused(arg):
  with pytest.raises(ValueError, match=f"configs/speech.py:{arg}"):
    speech_config.get_config(arg)


BAD = [
  ("model.width", 15),
  ("model.mel_bins", 0),
  ("model.convolutions", ((7,),)),
  ("model.positions", "learned"),
  ("model.cape_scale", 0.5),
  ("augment.speeds", (1.1, 0.9)),
  ("augment.speeds", (0.333,)),
  ("augment.time_masks", -1),
  ("augment.time_share", 1.5),
  ("eval.beam_width", 0),
  ("ckpt.best_metric", "accuracy"),
  ("data.source", "spoken_prompt"),
  ("data.train_split", "train+dev"),
  ("data.eval_split", "validation"),
  ("data.sample_rate", 0),
  ("data.alphabet", "aba"),
  ("data.bucket_seconds", ()),
  ("data.bucket_seconds", (4.0, float("inf"))),
]


@pytest.mark.parametrize(
  ("path", "value"), BAD, ids=[f"{path}={value}" for path, value in BAD]
)
def test_bad_value_is_refused_with_its_path_and_value(path, value):
  config = speech_sigmoid.get_config()
  config.update_from_flattened_dict({path: value})
  with pytest.raises(ValueError, match=rf"config\.{path}") as error:
    setup.validate_config(config)
  assert repr(value) in str(error.value)
