"""The language model: sizes, causality, packing, metrics, and configs."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import lm as lm_config
from configs import lm_sigmoid
from eval import evaluate
from sigattn import positions, tasks
from sigattn.data import text
from sigattn.inference import generate
from sigattn.tasks import lm
from sigattn.training import setup
from tests.tasks.small_lm import (
  ALIBI,
  SINES,
  SOFTMAX,
  V,
  compiled,
  logits,
  make,
  small,
  tokens,
)
from train import train

# Width, MLP width, layers, head width.
GALA = {
  "85m": (768, 2048, 12, 64),
  "1b": (2048, 5632, 24, 64),
  "7b": (4096, 11008, 32, 128),
}


@pytest.mark.parametrize(
  ("size", "published"), [("85m", 84.9e6), ("1b", 1.23e9), ("7b", 6.48e9)]
)
def test_published_parameter_count(size, published):
  config = lm_sigmoid.get_config(size)
  model = nnx.eval_shape(lambda: lm.build(config, nnx.Rngs(0)))
  count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
  width, hidden, depth, head = GALA[size]
  kernels = 4 * width**2 + 3 * width * hidden
  norms = 4 * width + 2 * head
  embedding = 32768 * width
  assert count == depth * (kernels + norms) + width + embedding
  assert count - embedding == pytest.approx(published, rel=5e-3)


def test_parameters_are_named_for_their_groups_and_start_as_published():
  _, params = setup.init(small(**{"model.width": 64, "model.mlp_dim": 128}))
  blocks = params["stack"]["blocks"]
  names = {
    path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)
  }
  assert names == {"embed", "kernel", "scale"}
  assert params["embed"].std() == pytest.approx(64**-0.5, rel=0.05)
  assert blocks["mlp"]["down"]["kernel"].std() == pytest.approx(
    128**-0.5, rel=0.05
  )
  out = blocks["attn"]["out"]["kernel"]
  assert out.std() == pytest.approx(64**-0.5, rel=0.05)


@pytest.mark.parametrize("values", [{}, ALIBI, SINES, SOFTMAX])
def test_a_token_changes_nothing_before_it(values):
  model = make(small(**values))
  token_BT = tokens(2, 12)
  other_BT = token_BT.copy()
  other_BT[:, 7] += 1
  a, b = logits(model, token_BT), logits(model, other_BT % V)
  np.testing.assert_array_equal(a[:, :7], b[:, :7])
  assert (a[:, 7:] != b[:, 7:]).any((0, 2)).all()


@pytest.mark.parametrize("values", [{}, ALIBI, SINES, SOFTMAX])
def test_packed_documents_are_as_if_alone(values):
  model = make(small(**values))
  first, second = tokens(1, 5), tokens(1, 8, seed=1)
  packed = np.concatenate([first, second, [[-1, -1]]], axis=1)
  segments = np.array([[1] * 5 + [2] * 8 + [0] * 2])
  packed_BTV = logits(model, packed, segments)
  for part, alone in (
    (packed_BTV[:, :5], first),
    (packed_BTV[:, 5:13], second),
  ):
    np.testing.assert_allclose(part, logits(model, alone), rtol=2e-4, atol=2e-4)


def test_offsets_begin_anew_in_each_segment():
  segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 3, 3, 3, 3]])
  offsets_BT = lm.offsets(segments, segments)
  np.testing.assert_array_equal(
    offsets_BT, [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
  )


# The loss and the metrics.


def test_loss_is_of_the_tokens_that_have_one_of_their_own_before():
  config = small()
  model = make(config)
  token = np.concatenate([tokens(2, 9), -np.ones((2, 2), np.int32)], axis=1)
  segment = np.array([[1] * 4 + [2] * 5 + [0] * 2] * 2)
  batch = {"token": token, "segment": segment}
  log_p = jax.nn.log_softmax(logits(model, token[:, :-1], segment[:, :-1]))
  places = [(i, t) for i in range(2) for t in (0, 1, 2, 4, 5, 6, 7)]
  nats = [-log_p[i, t, token[i, t + 1]] for i, t in places]
  is_correct = [log_p[i, t].argmax() == token[i, t + 1] for i, t in places]
  loss, metrics = compiled(
    lambda m, b: lm.loss(config, m, b, None), model, batch
  )
  assert loss == pytest.approx(np.mean(nats), rel=1e-5)
  assert metrics["accuracy"] == pytest.approx(np.mean(is_correct))

  config.eval.by_position = True
  batch["weight"] = np.array([1, 0], np.float32)
  sums = compiled(lambda m, b: lm.evaluate(config, m, b), model, batch)
  assert sums["weight"] == 7
  metrics = lm.results(config, jax.device_get(sums))
  assert metrics["loss"] == pytest.approx(np.mean(nats[:7]), rel=1e-5)
  assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
  assert metrics["loss@0:10"] == pytest.approx(metrics["loss"])
  size = text.tokenizer(config).num_bytes()
  count = sum(size[token[0, t + 1]] for _, t in places[:7])
  bits = np.sum(nats[:7]) / math.log(2) / count
  assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_loss_by_position_is_in_powers_of_two():
  loss_T = np.arange(40.0)
  assert lm._by_position(loss_T, np.ones(40)) == {
    "loss@0:16": 7.5, "loss@16:32": 23.5, "loss@32:40": 35.5,
  }  # fmt: skip


def test_variants_are_longer_rows_with_the_same_n():
  config = small()
  variants = lm.evaluation_variants(config)
  assert list(variants) == ["1 x 32", "2 x 32", "4 x 32", "8 x 32"]
  longest = variants["8 x 32"]
  assert (longest.data.length, longest.model.max_length) == (256, 32)
  model = nnx.eval_shape(lambda: lm.build(longest, nnx.Rngs(0)))
  assert model.stack.blocks.attn.max_length == 32


def test_n_of_the_test_is_the_evaluated_length():
  config = small(**{"eval.length_factors": (2,)})
  config.eval.max_length_of = ("training", "test")
  max_lengths = {
    k: x.model.max_length for k, x in lm.evaluation_variants(config).items()
  }
  assert max_lengths == {"2 x 32": 32, "2 x 32, n of the test": 64}


def test_sines_have_the_weight_of_the_embedding():
  model = lm.build(small(**SINES), nnx.Rngs(0))
  token_BT = tokens(1, 32)
  at = lambda first: model._embed(token_BT, first + jnp.arange(32)[None])  # noqa: E731
  table = positions.sincos_1d(40, 16)
  np.testing.assert_allclose(
    at(8) - at(0), (table[8:] - table[:32])[None] / 4, atol=1e-6
  )


def test_run_is_evaluated_at_other_lengths_and_continues_texts(
  tmp_path, monkeypatch, caplog
):
  whole = tasks.eval_batches
  monkeypatch.setattr(
    tasks, "eval_batches", lambda *args: [next(iter(whole(*args)))]
  )
  train(small(**{"eval.length_factors": (2,)}), tmp_path)
  done = json.loads((tmp_path / "DONE.json").read_text())
  caplog.clear()
  results = evaluate(tmp_path)
  assert not [x for x in caplog.messages if "read" in x], "Orbax's warnings"
  assert json.loads((tmp_path / "eval.json").read_text()) == results
  assert results["loss"] == pytest.approx(done["loss"], rel=1e-5)
  [twice] = results["variants"].values()
  assert twice.keys() - results.keys() == {
    "loss@0:16", "loss@16:32", "loss@32:64",
  }  # fmt: skip
  [other] = evaluate(tmp_path, "train", length_factors=[3])["variants"]
  assert other == "3 x 32"
  # The results of the other split have not replaced these.
  assert json.loads((tmp_path / "eval.json").read_text()) == results
  with pytest.raises(ValueError, match=r"length_factors=\[0\]; must be"):
    evaluate(tmp_path, length_factors=[0])
  [continuation] = generate.Generator.load(tmp_path)(["In the"], max_tokens=5)
  assert len(continuation) <= 5


# Configs.


BAD = [
  ("model.positions", "alibi"),
  ("model.max_length", 0),
  ("model.norm", "both"),
  ("attn.kind", "sigmiod"),
  ("data.source", "kvj"),
  ("data.eval_split", "valid"),
  ("data.eval_split", "validation"),  # a part of the training data
  ("data.tokenizer", "character"),
  ("data.vocab_size", 63),
  ("data.length", 0),
  ("data.shuffle_window", 0),
  ("data.packing_window", 0),
  ("eval.rows", 0),
  ("eval.length_factors", (1, 0)),
  ("eval.max_length_of", ("training", "tset")),
  ("eval.max_length_of", ()),
  ("attn.row_power", -1.0),
  ("attn.row_power", float("inf")),
  ("ckpt.best_metric", "accuracy_top5"),
]


@pytest.mark.parametrize(("path", "value"), BAD, ids=[x for x, _ in BAD])
def test_bad_value_is_refused_with_its_path_and_value(path, value):
  config = lm_sigmoid.get_config()
  config.update_from_flattened_dict({path: value})
  with pytest.raises(ValueError, match=rf"config\.{path}") as error:
    setup.validate_config(config)
  assert repr(value) in str(error.value)


@pytest.mark.parametrize("arg", [None, "gpu", "85m", "1b", "7b", "runlocal"])
def test_sigmoid_differs_from_its_softmax_twin_by_attention_alone(arg):
  softmax, sigmoid = lm_config.get_config(arg), lm_sigmoid.get_config(arg)
  assert sigmoid.attn.kind == "sigmoid"
  assert sigmoid.attn.normalize == (arg not in lm_config.SIZES)
  sigmoid.attn.update(kind="softmax", normalize=False)
  assert sigmoid == softmax


def test_n_follows_the_training_length():
  config = lm_config.get_config()
  config.data.length = 99
  assert config.model.max_length == 99
  config.model.max_length = 50
  assert config.data.length == 99
