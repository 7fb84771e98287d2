"""The synthetic tasks: targets equal those by brute force, and models train."""

import jax
import numpy as np
import pytest
from flax import nnx

from configs import synthetic as synthetic_config
from configs import synthetic_sigmoid
from eval import evaluate
from sigattn import tasks
from sigattn.data import synthetic as data
from sigattn.tasks import synthetic
from sigattn.training import setup
from train import train

NAMES = list(synthetic_config.TASKS)


def small(name, **values):
  config = synthetic_sigmoid.get_config(f"{name},runlocal")
  config.update_from_flattened_dict(values)
  return config


def answer(name, tokens, config):
  """{position: target} of one example, from the definition of the task."""
  n, size = config.length, config.size
  if name == "summation":
    return {
      2 * n - 1: sum(
        x for x, m in zip(tokens[:n], tokens[n:], strict=True) if m == 1
      )
    }
  if name == "pair_repeat":
    pairs = list(zip(tokens[1:], tokens[2:], strict=False))
    return {0: int(pairs[0] in pairs[1:])}
  if name == "recall":
    value = dict(zip(tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2], strict=True))
    assert len(value) == n
    places = range(2 * n, 2 * n + size)
    assert len({tokens[p] for p in places}) == size
    return {p: value[tokens[p]] for p in places}
  if name == "noisy_recall":
    noise = config.vocab_size * 2 // 3
    shown = [x for x in tokens[: 3 * n] if x < noise]
    value = dict(zip(shown[0::2], shown[1::2], strict=True))
    assert len(value) == n
    places = range(3 * n, 3 * n + size)
    assert len({tokens[p] for p in places}) == size
    return {p: value[tokens[p]] for p in places}
  if name == "selective_copy":
    symbols = [x for x in tokens[:n] if x != 1]
    assert len(symbols) == size
    assert tokens[n:] == [0, *symbols[:-1]]
    return {n + i: symbols[i] for i in range(size)}
  assert tokens[n] == 0
  assert tokens[n + 1 :] == tokens[: n - 1]
  return {n + i: tokens[i] for i in range(n)}


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_those_of_the_definition(name):
  config = small(name)
  batch = data.open_source(config, "train").train(
    np.arange(300), np.random.default_rng(0)
  )
  length = data.num_tokens(config.data)
  assert {x.shape for x in batch.values()} == {(300, length)}
  for tokens, target, scored in zip(
    *(x.tolist() for x in batch.values()), strict=True
  ):
    wanted = answer(name, tokens, config.data)
    assert [i for i in range(length) if scored[i]] == sorted(wanted)
    for place, value in wanted.items():
      assert target[place] == pytest.approx(value, abs=1e-5)


def test_half_of_the_pairs_repeat_and_no_symbol_tells():
  config = small("pair_repeat")
  batch = data.open_source(config, "train").train(
    np.arange(4000), np.random.default_rng(0)
  )
  repeats = batch["target"][:, 0] == 1
  assert repeats.mean() == pytest.approx(0.5, abs=0.03)
  assert batch["input"].max() == config.data.vocab_size - 1
  # Both symbols of the pair occur again in nearly all examples.
  first, second, rest = np.split(batch["input"][:, 1:], [1, 2], axis=1)
  for symbol in (first, second):
    again = (rest == symbol).any(1)
    assert again[repeats].all()
    assert again[~repeats].mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_training_is_new_and_the_held_out_examples_are_fixed(name):
  def take(seed=0):
    config = small(name, seed=seed)
    batches = tasks.train_batches(config)
    return [next(batches)["input"] for _ in range(2)]

  def held_out(split="test"):
    return list(tasks.eval_batches(small(name), split))

  first, again, other = take(), take(), take(1)
  np.testing.assert_array_equal(first, again)
  assert (first[0] != first[1]).any()
  assert (first[0] != other[0]).any()
  batches = held_out()
  assert sum(x["weight"].sum() for x in batches) == 20
  for a, b in zip(batches, held_out(), strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  assert (batches[0]["input"] != first[0]).any()
  assert (batches[0]["input"] != held_out("validation")[0]["input"]).any()


def test_distractors_stand_between_pairs_at_places_that_differ():
  config = small("noisy_recall")
  batch = data.open_source(config, "train").train(
    np.arange(400), np.random.default_rng(0)
  )
  pairs, noise = config.data.length, config.data.vocab_size * 2 // 3
  shown_BT = batch["input"][:, : 3 * pairs]
  is_noise_BT = shown_BT >= noise
  assert (is_noise_BT.sum(1) == pairs).all()
  # A key is followed by its value, never by a distractor.
  is_key_BT = shown_BT < noise // 2
  assert not (is_key_BT[:, :-1] & is_noise_BT[:, 1:]).any()
  share_T = is_noise_BT.mean(0)
  assert share_T.min() > 0.2
  assert share_T.max() < 0.6


# Batches of recall and copy have the same form as those of the last two.
@pytest.mark.parametrize(
  "name", ["summation", "pair_repeat", "noisy_recall", "selective_copy"]
)
def test_it_trains_and_is_evaluated_at_other_lengths(name, tmp_path):
  config = small(name)
  # A longer text would have more keys than there are symbols.
  config.eval.length_factors = (1,) if "recall" in name else (1, 2)
  state = train(config, tmp_path)
  assert int(state.step) == 2
  results = evaluate(tmp_path)
  length = config.data.length
  factors = config.eval.length_factors
  assert list(results["variants"]) == [f"{f} x {length}" for f in factors]
  same = results["variants"][f"1 x {length}"]
  assert same["loss"] == pytest.approx(results["loss"], rel=1e-5)
  for metrics in results["variants"].values():
    assert np.isfinite(metrics["loss"])


def test_n_of_the_test_is_the_evaluated_length():
  config = small("pair_repeat")
  config.eval.max_length_of = ("training", "test")
  max_lengths = {
    k: x.model.max_length
    for k, x in synthetic.evaluation_variants(config).items()
  }
  assert max_lengths["2 x 32"] == 33
  assert max_lengths["2 x 32, n of the test"] == 65


def test_another_length_keeps_the_training_n():
  config = small("pair_repeat")
  for variant in synthetic.evaluation_variants(config).values():
    model = nnx.eval_shape(lambda c=variant: synthetic.build(c, nnx.Rngs(0)))
    assert model.stack.blocks.attn.max_length == config.data.length + 1


@pytest.mark.parametrize("name", ["summation", "recall"])
def test_later_tokens_are_seen_unless_the_task_is_causal(name):
  config = small(name)
  model = setup.model(config, setup.init(config)[1])
  batch = next(iter(tasks.eval_batches(config, "test")))["input"]
  changed = batch.copy()
  changed[:, -1] = (changed[:, -1] + 1) % 2
  before, after = model(batch)[:, :-1], model(changed)[:, :-1]
  assert np.array_equal(before, after) == (name in synthetic.CAUSAL)


def test_score_of_numbers_is_relative_to_the_variance():
  config = small("summation")
  batch = next(tasks.train_batches(config))
  model = lambda *_: np.zeros((*batch["input"].shape, 1), np.float32)  # noqa: E731
  loss, metrics = synthetic.loss(config, model, batch, None)
  total = (batch["target"] ** 2).sum(1)
  assert loss == pytest.approx((total / config.data.size).mean(), rel=1e-5)
  accuracy = (total / config.data.size < 0.01).mean()
  assert metrics["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
  ("name", "path", "value"),
  [
    ("recall", "data.name", "recal"),
    ("recall", "data.length", 33),
    ("recall", "data.size", 17),
    ("noisy_recall", "data.length", 33),
    ("noisy_recall", "data.size", 17),
    ("selective_copy", "data.size", 49),
    ("recall", "data.eval_split", "tset"),
    ("summation", "data.size", 21),
    ("pair_repeat", "data.length", 5),
    ("copy", "data.vocab_size", 2),
    ("copy", "model.positions", "learned"),
    ("copy", "model.max_length", 0),
    ("copy", "attn.kind", "sigmiod"),
    ("copy", "eval.length_factors", (0.5,)),
    ("pair_repeat", "attn.row_power", 1.0),
  ],
)
def test_bad_value_is_refused_with_its_path(name, path, value):
  config = small(name, **{path: value})
  with pytest.raises(ValueError, match=rf"config\.{path}="):
    setup.validate_config(config)


def test_argument_names_one_task():
  for arg in ("recal", "recall,copy", "runlocal"):
    with pytest.raises(ValueError, match=f"configs/synthetic.py:{arg}"):
      synthetic_config.get_config(arg)
