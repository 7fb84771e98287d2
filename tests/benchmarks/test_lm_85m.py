"""The driver of the 85M models: the order of its runs, and one run of each."""

import subprocess
import threading
import time

import numpy as np
import pytest
from lm_eval.api import model as harness

from benchmarks import lm_85m, lm_85m_measure
from benchmarks.lm_85m import Run
from configs import lm_85m as configs
from sigattn.data import train_tokenizer
from sigattn.inference import generate, lm_eval
from tests.data.test_token_files import write

RATES = (1e-3, 4e-3)


def row(run, loss):
  return {
    "form": run.form, "lr": run.lr, "seed": run.seed, "short": run.short,
    "validation_loss": loss,
  }  # fmt: skip


def test_runs_follow_from_the_losses():
  losses = {"a": {1e-3: 3.0, 4e-3: 2.0}, "b": {1e-3: 1.0, 4e-3: None}}
  rows, order = [], []
  while runs := lm_85m.available(rows, "ab", RATES):
    run = runs[0]
    order.append((run.form, run.lr, run.seed, run.short))
    rows.append(row(run, losses[run.form][run.lr]))
  assert order == [
    *((form, lr, 0, True) for form in "ab" for lr in RATES),
    ("a", 4e-3, 0, False), ("b", 1e-3, 0, False),
    ("a", 4e-3, 1, False), ("b", 1e-3, 1, False),
  ]  # fmt: skip


def test_a_form_that_diverges_at_every_rate_has_no_whole_run():
  rows = [row(Run("a", lr, 0, True), None) for lr in RATES]
  assert lm_85m.available(rows, "ab", RATES) == [
    Run("b", lr, 0, True) for lr in RATES
  ]
  rows += [row(Run("b", lr, 0, True), lr) for lr in RATES]
  assert lm_85m.available(rows, "ab", RATES) == [
    Run("b", 1e-3, seed, False) for seed in (0, 1)
  ]


def test_a_run_that_cannot_end_waits_while_another_one_can():
  rows = [
    row(Run("softmax", 1e-3, 0, True), 1.0) | {"tokens_per_second": 4e5},
    row(Run("sigmoid", 1e-3, 0, True), 1.0) | {"tokens_per_second": 2e5},
  ]
  whole = [Run(form, 1e-3, 0, False) for form in ("sigmoid", "softmax")]
  seconds = [lm_85m.expected_seconds(run, rows, 0) for run in whole]
  assert np.allclose(np.array(seconds) - 130, [500, 250], rtol=1e-3)
  shared = [lm_85m.expected_seconds(run, rows, 0, 2) for run in whole]
  assert np.allclose(np.array(shared) - 130, [1000, 500], rtol=1e-3)
  rows.append(rows[0] | {"tokens_per_second": None})  # it shared a card
  assert lm_85m.expected_seconds(whole[1], rows, 0) == seconds[1]
  assert lm_85m.choose(whole, rows, 700, {}) == whole[0]
  assert lm_85m.choose(whole, rows, 400, {}) == whole[1]
  assert lm_85m.choose(whole, rows, 400, {whole[0]: 1500}) == whole[0]
  assert lm_85m.choose(whole, rows, 300, {}) == whole[0]  # to be resumed


def test_cards_share_the_runs(tmp_path, monkeypatch, capsys):
  """Of two at a time, the first run of a form lasts as long as all others."""
  runs, others = [], threading.Event()

  def train(run, card, options, end):
    runs.append(run)
    if run == Run("softmax", rates[0], 0, True):
      assert others.wait(60)  # set by a whole run of another form
    if (run.form, run.short) == ("sigmoid", False):
      raise subprocess.CalledProcessError(1, "train.py", "it broke")
    if (run.form, run.short) == ("normalized", False):
      others.set()
    loss = list(configs.FORMS).index(run.form) + run.lr
    return row(run, loss) | {"tokens_per_second": 1.0}

  rates = [x["optim.lr"] for x in configs.sweep_lr()]
  monkeypatch.setattr(lm_85m, "train", train)
  words = [
    "--local", "--share=2", f"--runs={tmp_path}/runs", "--commit=abc",
    f"--results={tmp_path}/rows.json",
  ]  # fmt: skip
  failed = "failed: whole_sigmoid_0.0006_[01], whole_sigmoid_0.0006_[01]"
  with pytest.raises(SystemExit, match=failed):
    lm_85m.main(words)
  assert len(runs) == len(set(runs)) == 24  # no run twice
  rows = lm_85m.read_rows(tmp_path / "rows.json")
  assert len(rows) == 22
  assert "it broke" in capsys.readouterr().out
  monkeypatch.setattr(  # the next command tries the failed run again
    lm_85m, "train", lambda run, *_: row(run, 2.0) | {"tokens_per_second": 1.0}
  )
  lm_85m.main(words)
  rows = lm_85m.read_rows(tmp_path / "rows.json")
  assert sorted((x["form"], x["seed"]) for x in rows[22:]) == [
    ("sigmoid", 0), ("sigmoid", 1),
  ]  # fmt: skip
  lm_85m.main([*words, "--seconds=80"])  # nothing is left
  assert "all runs are finished" in capsys.readouterr().out


def test_more_cards_than_there_are_are_refused(monkeypatch):
  monkeypatch.setattr(
    lm_85m.subprocess, "check_output", lambda *_, **__: "NVIDIA H200\n"
  )
  with pytest.raises(ValueError, match="--cards=2; must be from 1 to 1"):
    lm_85m.main(["--cards=2"])
  with pytest.raises(ValueError, match="--share=0; must be at least 1"):
    lm_85m.main(["--share=0"])


def test_curves_keep_what_a_mean_would_hide():
  lines = [
    {"step": i + 1, "loss": 4.0, "grad_norm": 100.0 if i == 777 else 1.0}
    for i in range(1526)
  ]
  found = lm_85m.curves(lines)
  assert len(found["step"]) <= lm_85m.POINTS
  assert found["step"][-1] == 1526
  assert max(found["grad_norm_max"]) == 100
  assert max(found["grad_norm"]) == 1


def test_telemetry_is_a_mean_over_heads_for_each_layer():
  names = [f"stack/layer{i}/head{j}" for i in range(11) for j in range(2)]
  line = {"step": 100, "split": "telemetry", "grads_norm/stack/layer0": 9.0}
  line |= {f"logit_max/{name}": float(k) for k, name in enumerate(names)}
  line |= {f"attention_v_norm/{name}": float(k) for k, name in enumerate(names)}
  line |= {"residual_norm/stack/layer0": 7.0}
  found = lm_85m.telemetry_means([line, {"step": 100, "split": "train"}])
  assert found == {
    "step": [100],
    "logit_max": [[2.0 * i + 1] for i in range(11)],
    "attention_v_norm": [[2 * i + 0.5] for i in range(11)],
    "residual_norm": [[7.0]],
  }


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
  options.devices = lm_85m.cards(options)
  run = Run("normalized", 4e-3, 0, short=False)
  assert lm_85m.train(run, 0, options, time.monotonic()) is None  # no time
  found = lm_85m.train(run, 0, options, time.monotonic() + 600)
  assert run.is_of(found)
  assert found["tokens"] == 2 * 8 * 128
  assert abs(found["validation_loss"] - found["test_loss"]) < 1e-4  # one text
  assert [*found["lengths"]] == ["1 x 128", "2 x 128", "4 x 128"]
  assert [*found["copying"]] == ["32", "64", "95", "192"]
  assert 0 <= found["cloze"]["acc"] <= 1
  assert found["curves"]["step"] == [1, 2]
  assert found["device"] == "cpu"
  lm_85m.pack(options.runs, tmp_path / "runs.tar.xz")
  assert (tmp_path / "runs.tar.xz").stat().st_size < 2**20


def test_the_harness_asks_for_the_word_after_a_space(
  corpus, tmp_path, monkeypatch
):
  """The continuation that is scored is the text that was cut off."""
  config = configs.get_config("softmax,runlocal").unlock()
  for name, value in (x.split("=") for x in corpus):
    config.update_from_flattened_dict(
      {name.removeprefix("config."): int(value) if value.isdigit() else value}
    )

  class Model(harness.LM):
    def loglikelihood(self, requests):
      texts = ["".join(request.args) for request in requests]
      return [(-2.0, text.endswith(" fox and another")) for text in texts]

    loglikelihood_rolling = generate_until = None

  monkeypatch.setattr(lm_eval, "HarnessLM", lambda generator: Model())
  monkeypatch.setattr(generate, "Generator", lambda config, params: None)
  found = lm_85m_measure.cloze(config, None, tmp_path)
  assert found["acc"] == 1.0
  assert found["perplexity"] == pytest.approx(np.exp(2.0))
