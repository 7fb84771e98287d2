"""The benchmark of training steps: its settings and its counts are right."""

import pytest

from benchmarks import train_step
from sigattn.training import setup

SETTINGS = {
  (model, name): changes
  for model, kind in train_step.MODELS.items()
  for name, changes in train_step.SIDES[kind].items()
  if changes is not None
} | {
  (model, lever): train_step._DEFAULTS[model] | changes
  for model, levers in train_step.LEVERS.items()
  for lever, changes in levers.items()
}


@pytest.mark.parametrize(("model", "name"), SETTINGS)
def test_what_is_measured_is_a_config_that_trains(model, name):
  changes = {
    path: value
    for path, value in SETTINGS[model, name].items()
    # cuDNN is refused on a CPU.
    if not path.startswith("xla_")
    and path not in ("batch", "attn.implementation")
  }
  config = train_step._config(model, changes)
  # The data of the published models are on the Hub.
  own = "lm" if config.task == "lm" else "vit"
  fields, rules = setup.tables(own)
  for path in changes:
    assert fields[path].is_right(setup.validate.value_at(config, path))
  for rule in setup.optim.RULES:
    rule(config)


def test_rates_of_the_published_model_and_of_vit():
  config = train_step._config("1b", {"batch_size": 8})
  rates = train_step._rates(config, 1_300_000_000, 0.5)
  tokens = 8 * 4096 / 0.5
  assert rates["tokens_per_second"] == tokens
  flops = 6 * 1.3e9 + 6 * 24 * 4096 * 2048
  assert rates["share_of_peak"] == pytest.approx(tokens * flops / 989e12)
  config = train_step._config("vit_b16", {"batch_size": 128})
  rates = train_step._rates(config, 86_000_000, 0.1)
  assert rates["images_per_second"] == 1280
  flops = 6 * 86e6 + 12 * 12 * 197 * 768
  assert rates["share_of_peak"] == pytest.approx(1280 * 197 * flops / 989e12)


def row(side, rate, model="1b", batch=8):
  found = {"tokens_per_second": rate} if rate else {"error": "no memory"}
  changes = train_step.SIDES["lm"][side] or {}
  return train_step._row(model, side, batch, changes, found)


def test_rows_are_compared_with_the_peer_and_softmax_of_their_size():
  rows = train_step._compare(
    [
      row("huggingface", 40_000.0),
      row("softmax", 50_000.0),
      row("normalized", 60_000.0),
      row("sigmoid", None),
      row("sigmoid", 30_000.0, batch=4),
    ]
  )
  ratios = [
    (x["peer"], x["ratio_to_peer"], x["ratio_to_softmax"]) for x in rows
  ]
  assert ratios == [
    (None, None, None),
    (40_000.0, 1.25, 1.0),
    (40_000.0, 1.5, 1.2),
    (None, None, None),
    (None, None, None),
  ]
  assert [x["kind"] for x in rows[:4]] == [
    "softmax", "softmax", "normalized sigmoid", "sigmoid",
  ]  # fmt: skip
