"""The harness's scores of a small local task equal those of the plain model."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest

from configs import lm_sigmoid
from sigattn.inference import generate
from sigattn.training import setup
from tests import commands

lm_eval = pytest.importorskip(
  "lm_eval", reason="lm-eval is not installed (requirements.txt)"
)

from lm_eval.api.instance import Instance  # noqa: E402

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


class Trained(NamedTuple):
  generator: generate.Generator
  table: Callable[[np.ndarray], np.ndarray]  # tokens (T,) -> log p (T, V)


@pytest.fixture(scope="module")
def trained():
  config = lm_sigmoid.get_config("runlocal")
  _, params = setup.init(config)
  params = jax.tree.map(
    lambda x: 2 * x, params
  )  # larger differences between logits
  forward = jax.jit(lambda p, x: jax.nn.log_softmax(setup.model(config, p)(x)))

  def table(ids):
    padded = np.pad(ids, (0, 48 - len(ids)), constant_values=-1)
    return np.asarray(forward(params, padded[None])[0, : len(ids)])

  return Trained(generate.Generator(config, params), table)


def log_p(trained, context, continuation):
  """Log-probability of the continuation by the plain forward pass."""
  tokenizer = trained.generator.tokenizer
  [before], [after] = (tokenizer.encode([x]) for x in (context, continuation))
  ids = np.array([tokenizer.start, *before, *after], np.int32)
  first, log_p_TV = len(ids) - len(after), trained.table(ids)
  return sum(log_p_TV[i - 1, ids[i]] for i in range(first, len(ids)))


def test_scores_equal_the_plain_forward_pass(trained, tmp_path):
  from sigattn.inference import lm_eval as harness

  path = tmp_path / "questions.jsonl"
  path.write_text(
    "".join(
      json.dumps({"question": q, "choices": c, "label": i}) + "\n"
      for q, c, i in QUESTIONS
    )
  )
  (tmp_path / "local_choice.yaml").write_text(TASK.format(path=path))
  model = harness.HarnessLM(trained.generator, batch_size=4, max_length=64)
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


COMMAND = ("-m", "sigattn", "lm_eval", "--workdir=/no")


@pytest.mark.parametrize(
  ("word", "said"),
  [
    ("--tasks=", "--tasks=; is no task"),
    ("--include_path=/no", "--include_path=/no; there is no such folder"),
    ("--limit=-1", "--limit=-1: -1 is not a positive integer"),
    ("--num_fewshot=-1", "--num_fewshot=-1: -1 is not a non-negative integer"),
  ],
)
def test_wrong_flags_are_refused_in_one_line(word, said):
  done = commands.forked(*COMMAND, "--tasks=piqa", word)
  assert_refused_in_one_line(done, said)


def test_a_misspelt_task_is_refused_by_the_nearest_one():
  words = [sys.executable, *COMMAND, "--tasks=hellasvag"]
  done = subprocess.run(
    words, cwd=commands.ROOT, capture_output=True, text=True, check=False
  )
  said = "--tasks=hellasvag; is no task .*mean hellaswag"
  assert_refused_in_one_line(done, said)


def assert_refused_in_one_line(done, said):
  assert done.returncode == 1
  assert "Traceback" not in done.stderr
  assert re.search(said, done.stderr.splitlines()[-1])


def instance(kind, *args):
  return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def test_rolling(trained):
  from sigattn.inference import lm_eval as harness

  generator, table = trained.generator, trained.table
  model = harness.HarnessLM(generator, batch_size=2, max_length=8)
  string = "And God said, Let"
  [log_prob] = model.loglikelihood_rolling(
    [instance("loglikelihood_rolling", string)]
  )
  expected = log_p(trained, "", string[:8])
  # Windows have 8 tokens. The second begins with the last token of the first.
  # The last has a single new token, after as many old ones as fit.
  for window, count in ((string[7:16], 8), (string[8:17], 1)):
    [ids] = generator.tokenizer.encode([window])
    expected += sum(table(ids)[i, ids[i + 1]] for i in range(8 - count, 8))
  assert log_prob == pytest.approx(expected, rel=1e-4)


def test_contexts_are_cut_to_what_the_model_sees(trained, caplog):
  from sigattn.inference import lm_eval as harness

  model = harness.HarnessLM(trained.generator, batch_size=2, max_length=16)
  tokenizer, table = trained.generator.tokenizer, trained.table
  context, continuation = "In the beginning God", " created"
  pairs = [(context, continuation), ("In", " the")]
  scores = model.loglikelihood([instance("loglikelihood", *x) for x in pairs])
  # The model sees 16 tokens. The last token that is scored is not read.
  [ids] = tokenizer.encode([(context + continuation)[-17:]])
  expected = sum(table(ids)[i - 1, ids[i]] for i in range(9, 17))
  assert scores[0][0] == pytest.approx(expected, rel=1e-4)
  assert scores[1][0] == pytest.approx(log_p(trained, *pairs[1]), rel=1e-4)
  [message] = caplog.messages
  assert "1 of 2 contexts" in message
  assert "max_length=16" in message
  with pytest.raises(ValueError, match="17 tokens; .* max_length=16"):
    model.loglikelihood([instance("loglikelihood", "In", "x" * 17)])


def test_generation_is_cut_as_the_harness_does(trained, caplog):
  from sigattn.inference import lm_eval as harness

  generator, table = trained.generator, trained.table
  contexts, count = ["In", "And God", "Let there be light"], 6

  def greedy(ids):
    for _ in range(count):
      ids = [*ids, table(np.array(ids, np.int32))[len(ids) - 1].argmax()]
    return generator.tokenizer.decode(ids[-count:])

  # Contexts keep 16 - 6 tokens; the first one is where the text starts.
  expected = [greedy(x[-10:].tolist()) for x in generator.encode(contexts)]
  stop = expected[2][3]
  options = {"until": [stop], "max_gen_toks": count, "do_sample": False}
  model = harness.HarnessLM(generator, batch_size=2, max_length=16)
  requests = [instance("generate_until", x, options) for x in contexts]
  texts = model.generate_until(requests)
  assert texts == [x.split(stop)[0] for x in expected]
  [message] = caplog.messages
  assert "1 of 3 contexts" in message
  with pytest.raises(ValueError, match="max_gen_toks=16; .* max_length=16"):
    model.generate_until(
      [instance("generate_until", "In", {"max_gen_toks": 16})]
    )
