"""The driver of the 85M models: the order of its runs, and one run of each."""

import json
import time

import numpy as np
import pytest

from benchmarks import lm_85m
from benchmarks.lm_85m import Run
from configs import lm_85m as configs
from sigattn.data import train_tokenizer
from tests.data.test_token_files import write

RATES = (1e-3, 4e-3)


def row(run, loss):
  return {
    "form": run.form, "lr": run.lr, "seed": run.seed, "short": run.short,
    "validation_loss": loss,
  }  # fmt: skip


def test_runs_follow_from_the_losses():
  losses = {"a": {1e-3: 3.0, 4e-3: 2.0}, "b": {1e-3: 1.0, 4e-3: None}}
  losses["c"] = {1e-3: 5.0, 4e-3: 4.0}
  rows, order = [], []
  while run := lm_85m.next_run(rows, "abc", RATES):
    order.append((run.form, run.lr, run.seed, run.short))
    rows.append(row(run, losses[run.form][run.lr]))
  assert order == [
    *((form, lr, 0, True) for form in "abc" for lr in RATES),
    ("a", 4e-3, 0, False), ("b", 1e-3, 0, False), ("c", 4e-3, 0, False),
    ("b", 1e-3, 1, False), ("a", 4e-3, 1, False),
  ]  # fmt: skip


def test_a_form_that_diverges_at_every_rate_is_an_error():
  rows = [row(Run("a", lr, 0, True), None) for lr in RATES]
  with pytest.raises(ValueError, match="a: every short run diverged"):
    lm_85m.next_run(rows, "a", RATES)


@pytest.mark.parametrize("form", configs.FORMS)
def test_all_forms_differ_by_their_attention_alone(form):
  config, base = (configs.get_config(x) for x in (form, "softmax"))
  config.attn, base.attn = {}, {}
  assert config == base
  tokens = config.total_steps * config.batch_size * config.data.length
  assert 99e6 < tokens < 101e6


@pytest.fixture
def corpus(tmp_path):
  """A folder of tokens of repetitive prose; returns overrides that use it."""
  folder = tmp_path / "tokens"
  folder.mkdir()
  text = "The quick brown fox jumps over the other lazy fox and another. " * 40
  tokenizer = train_tokenizer.train([text], 400)
  tokenizer.save(str(folder / "tokenizer.json"))
  end = tokenizer.token_to_id("<|endoftext|>")
  ids = [end, *tokenizer.encode(text).ids] * 20
  for split in ("train", "validation", "test"):
    write(folder / f"{split}.npy.xz", np.array(ids, np.uint16))
  return [
    f"config.data.source={folder}",
    "config.data.vocab_size=400",
    f"config.data.tokenizer={folder}/tokenizer.json",
  ]


def test_a_run_is_trained_measured_and_recorded(corpus, tmp_path):
  options = lm_85m.parse([
    "--local", f"--runs={tmp_path}/runs", f"--results={tmp_path}/rows.json",
    "--commit=abc", "--copies=4", *corpus,
  ])  # fmt: skip
  run = Run("normalized", 4e-3, 0, short=False)
  folder = options.runs / run.name
  assert not lm_85m.train(run, folder, options, time.monotonic())  # too late
  assert lm_85m.train(run, folder, options, time.monotonic() + 600)
  [found] = json.loads(options.results.read_text())["rows"]
  assert run.is_of(found)
  assert found["tokens"] == 2 * 8 * 128
  assert abs(found["validation_loss"] - found["test_loss"]) < 1e-4  # same text
  assert [*found["lengths"]] == ["1 x 128", "2 x 128", "4 x 128"]
  assert [*found["copying"]] == ["32", "64", "95", "192"]
  assert 0 <= found["cloze"]["acc"] <= 1
  lm_85m.pack(options.runs, tmp_path / "runs.tar.xz")
  assert (tmp_path / "runs.tar.xz").stat().st_size < 2**20
