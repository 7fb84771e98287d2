"""The harness's scores of a small local task equal those of the plain model."""

import json

import jax
import numpy as np
import pytest

from configs import lm_sigmoid
from sigattn.data import text
from sigattn.inference import generate
from sigattn.training import setup

lm_eval = pytest.importorskip(
  "lm_eval", reason="lm-eval is not installed (requirements.txt)"
)

QUESTIONS = [
  ("And God said, Let there be", [" light", " darkness", " q"], 0),
  ("the heaven and the", [" sea", " earth"], 1),
  ("In the", [" beginning", " end"], 0),
  ("", ["And it was so", "zzz"], 1),
]

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def trained():
  """Config, parameters, and a function from tokens (T,) to log p (T, V)."""
  config = lm_sigmoid.get_config("runlocal")
  _, params = setup.init(config)
  params = jax.tree.map(
    lambda x: 2 * x, params
  )  # larger differences between logits
  forward = jax.jit(lambda p, x: jax.nn.log_softmax(setup.model(config, p)(x)))

  def table(ids):
    padded = np.pad(ids, (0, 48 - len(ids)), constant_values=-1)
    return np.asarray(forward(params, padded[None])[0, : len(ids)])

  return config, params, table


def log_p(trained, context, continuation):
  """Log-probability of the continuation by the plain forward pass."""
  config, _, table = trained
  tokenizer = text.tokenizer(config)
  [before], [after] = (tokenizer.encode([x]) for x in (context, continuation))
  ids = np.array([tokenizer.start, *before, *after], np.int32)
  first, log_p_TV = len(ids) - len(after), table(ids)
  return sum(log_p_TV[i - 1, ids[i]] for i in range(first, len(ids)))


def test_scores_equal_the_plain_forward_pass(trained, tmp_path):
  from sigattn.inference import lm_eval as harness

  config, params, _ = trained
  path = tmp_path / "questions.jsonl"
  path.write_text(
    "".join(
      json.dumps({"question": q, "choices": c, "label": i}) + "\n"
      for q, c, i in QUESTIONS
    )
  )
  (tmp_path / "local_choice.yaml").write_text(TASK.format(path=path))
  model = harness.HarnessLM(config, params, batch_size=4, max_length=64)
  results = lm_eval.simple_evaluate(
    model,
    tasks=["local_choice"],
    task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
    bootstrap_iters=0,
  )
  correct, correct_by_length = 0, 0
  scores = []
  for question, choices, label in QUESTIONS:
    row = [log_p(trained, question, x) for x in choices]
    scores.append(row)
    correct += np.argmax(row) == label
    size = [len(x) for x in choices]
    correct_by_length += np.argmax(np.divide(row, size)) == label
  metrics = results["results"]["local_choice"]
  assert metrics["acc,none"] == correct / 4
  assert metrics["acc_norm,none"] == correct_by_length / 4
  for sample in results["samples"]["local_choice"]:
    log_probs = [x[0][0] for x in sample["resps"]]
    np.testing.assert_allclose(log_probs, scores[sample["doc_id"]], rtol=1e-4)


def test_rolling_and_generation(trained):
  from lm_eval.api.instance import Instance

  from sigattn.inference import lm_eval as harness

  config, params, table = trained
  model = harness.HarnessLM(config, params, batch_size=2, max_length=8)

  def instance(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)

  string = "And God said, Let"
  [log_prob] = model.loglikelihood_rolling(
    [instance("loglikelihood_rolling", string)]
  )
  expected = log_p(trained, "", string[:8])
  # Windows have 8 tokens. The second begins with the last token of the first.
  # The last has a single new token, after as many old ones as fit.
  for window, count in ((string[7:16], 8), (string[8:17], 1)):
    [ids] = model._tokenizer.encode([window])
    expected += sum(table(ids)[i, ids[i + 1]] for i in range(8 - count, 8))
  assert log_prob == pytest.approx(expected, rel=1e-4)

  options = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
  requests = [instance("generate_until", x, options) for x in ("In", "And God")]
  greedy = generate.Generator(config, params)(
    ["In", "And God"], max_tokens=12, temperature=0
  )
  assert model.generate_until(requests) == [x.split("e")[0] for x in greedy]
