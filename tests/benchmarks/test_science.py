"""The driver of the studies: batched runs equal runs of train.py."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import forms, science
from sigattn import attention
from train import train

TINY = science.Study(
  "A trial",
  "studies.recall",
  ("sixteen",),
  ("normalised, b = -log n",),
  (5e-4, 1e-3),
  1,
)


def tiny(monkeypatch, deadline=None, **changes):
  """A job of two batched learning rates, with small batches."""
  monkeypatch.setitem(science.STUDIES, "tiny", TINY._replace(**changes))
  [job] = science.jobs("tiny", deadline or time.time() + 1e4)
  job.changes.update({
    "batch_size": 8, "data.eval_examples": 16, "total_steps": 60,
    "model.depth": 1, "telemetry.every_steps": 0, "ckpt.every_steps": 0,
  })  # fmt: skip
  return job


def test_a_batched_run_is_the_run_of_train(monkeypatch):
  job = tiny(monkeypatch)
  params, curve = science.train(job, seeds=(0, 1))
  assert curve["accuracy"].shape == (2, 2, 2)
  config = job.config()
  config.update_from_flattened_dict({"optim.lr": 1e-3, "seed": 1})
  alone = train(config).params
  for (path, own), one in zip(
    jax.tree_util.tree_leaves_with_path(params),
    jax.tree.leaves(alone),
    strict=True,
  ):
    if "key" not in str(path) or "bias" not in str(path):
      np.testing.assert_allclose(own[1, 1], one, atol=2e-5, err_msg=str(path))
      assert abs(own[1, 0] - own[1, 1]).max() > 1e-5  # the rates differ


def test_the_rate_is_chosen_on_validation_and_the_test_is_reported(monkeypatch):
  job = tiny(monkeypatch, until=0.0)
  job.changes["total_steps"] = 300
  entry = science.measure(job)
  chosen = np.mean(entry["all"]["validation"]["loss"], axis=1).argmin()
  assert entry["lr"] == TINY.lrs[chosen]
  assert entry["test"]["loss"] == entry["all"]["test"]["loss"][chosen]
  assert entry["test"]["loss"] != entry["all"]["validation"]["loss"][chosen]
  # If all seeds have learnt, a run ends after the updates of one call.
  assert entry["updates"] == 100


def test_nothing_begins_after_the_deadline(monkeypatch):
  job = tiny(monkeypatch, deadline=time.time() - 1)
  assert science._run(job)[1] == {"cut_off": "not begun"}


def test_every_setting_of_every_study_is_valid():
  for name, study in science.STUDIES.items():
    jobs = science.jobs(name, 0.0)
    assert len(jobs) >= len(study.forms)
    for job in jobs[:: len(study.forms)]:
      job.config()
  for job in science.jobs("controls", 0.0):
    assert job.config().attn.kind == forms.FORMS[job.form].changes["attn.kind"]


@pytest.mark.parametrize(
  ("name", "weights"),
  [
    ("softmax1", lambda z: jnp.exp(z) / (1 + jnp.exp(z).sum(-1))[..., None]),
    (
      "capped rows, b = 0",
      lambda z: (
        jax.nn.sigmoid(z) / jnp.maximum(1, jax.nn.sigmoid(z).sum(-1))[..., None]
      ),
    ),
    (
      "softmax, logits capped at log n",
      lambda z: jax.nn.softmax(jnp.log(9.0) * jnp.tanh(z / jnp.log(9.0))),
    ),
    (
      "softplus, normalised",
      lambda z: jax.nn.softplus(z) / jax.nn.softplus(z).sum(-1)[..., None],
    ),
  ],
)
def test_controls_are_their_formulas(name, weights):
  query, key, value = (
    3 * jax.random.normal(jax.random.key(i), (1, 9, 2, 4)) for i in range(3)
  )
  changes, attend, _ = forms.FORMS[name]
  options = {k.removeprefix("attn."): v for k, v in changes.items()}
  out = attend(query, key, value, n=9, implementation="xla", **options)
  logits = attention.attention_weights(query, key, kind="softmax")[0]
  wanted = jnp.einsum("BNTS,BSNH->BTNH", weights(logits), value)
  np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-6)
