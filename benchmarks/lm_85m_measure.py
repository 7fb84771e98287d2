"""Measures a run of the 85M models on the test split of its corpus.

  python -m benchmarks.lm_85m_measure runs/lm_85m/whole_softmax_0.0015_0

It writes measured.json into the folder of the run: the test loss at 1, 2 and 4
times the training length, also by position; the accuracy of copying a repeated
part, by its distance; and the scores of a cloze task. benchmarks/lm_85m.py
calls it for each run that has ended.
"""

import argparse
import json
import pathlib
import re

import jax
import numpy as np
from flax import nnx

from sigattn import tasks
from sigattn.data import text, token_files
from sigattn.training import checkpoint, evaluate, files, mesh, setup

FILE = "measured.json"
COPIED = 32  # tokens that `copying` repeats
PREFIX = 8  # the first of them, which only show what is repeated


def main(words=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", type=pathlib.Path, help="of a run")
  parser.add_argument(
    "--copies", type=int, default=64, help="rows for each distance"
  )
  options = parser.parse_args(words)
  measure(options.folder, options.copies)


def measure(folder, copies):
  """Measures a finished run on the test split; writes measured.json."""
  config, params, _ = checkpoint.load(folder)
  devices = mesh.for_evaluation(config)
  lengths = {
    name: evaluate.evaluator(x, devices)(params, tasks.eval_batches(x, "test"))
    for name, x in evaluate.variants(config).items()
  }
  measured = {
    "test_loss": lengths[f"1 x {config.data.length}"]["loss"],
    "lengths": lengths,
    "copying": copying(config, params, copies),
    "cloze": cloze(config, params, folder),
  }
  files.write_json(folder / FILE, measured)


def test_tokens(config):
  size = text.tokenizer(config).size
  return token_files.read(config.data.source, "test", size)


def copying(config, params, copies):
  """The accuracy of copying by the distance of the copy: {distance: {...}}.

  A row is a part of the held-out text. Its last COPIED tokens are replaced by
  the tokens that are `distance` tokens before them. "copied" is the accuracy on
  the copy, and "first" is the accuracy on the original. Neither counts the
  first PREFIX tokens. A row is as long as in training. If the copy and the
  original do not fit into it, the row is twice as long.
  """
  token_S, length = test_tokens(config), config.data.length
  static = setup.graphdef(config)
  rng = np.random.default_rng(0)

  @jax.jit
  def right(params, token_BT):
    logits_BTV = nnx.merge(static, params)(token_BT[:, :-1])
    return logits_BTV.argmax(-1) == token_BT[:, 1:]

  results = {}
  for distance in distances(length):
    row = length if distance <= length - COPIED else 2 * length
    found = []
    for _ in range(-(-copies // 4)):
      start_B = rng.integers(len(token_S) - row - 1, size=4)
      token_BT = token_S[start_B[:, None] + np.arange(row + 1)].astype("int32")
      token_BT[:, -COPIED:] = token_BT[:, -COPIED - distance : -distance]
      right_BT = np.asarray(right(params, token_BT))
      copy = right_BT[:, PREFIX - COPIED :]
      first = right_BT[:, PREFIX - COPIED - distance : -distance]
      found.append((copy.mean(), first.mean()))
    copied, first = np.mean(found, axis=0)
    results[distance] = {"copied": float(copied), "first": float(first)}
  return results


def distances(length):
  """COPIED times powers of 2, then one just below `length` and one beyond."""
  powers = []
  distance = COPIED
  while distance <= length - COPIED:
    powers.append(distance)
    distance *= 2
  beyond = [int(1.5 * length)] if 1.5 * length >= COPIED else []
  return [*powers, *{length - COPIED - 1} - set(powers), *beyond]


def cloze(config, params, folder):
  """lm-eval's scores of the texts of `write_cloze`."""
  try:
    import lm_eval

    from sigattn.inference import lm_eval as ours
    from sigattn.inference.generate import Generator
  except ImportError:
    print("cloze is left out: lm-eval is not installed", flush=True)
    return None
  task = write_cloze(config, folder / "cloze")
  results = lm_eval.simple_evaluate(
    ours.HarnessLM(Generator(config, params)),
    tasks=["cloze"],
    task_manager=lm_eval.tasks.TaskManager(include_path=str(task)),
    bootstrap_iters=0,
  )
  return {
    name.removesuffix(",none"): value
    for name, value in results["results"]["cloze"].items()
    if isinstance(value, float)
  }


# In a task of this type the harness puts no space between text and word.
CLOZE = """
task: cloze
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{' ' + word}}}}"
metric_list:
  - metric: acc
  - metric: perplexity
"""


def write_cloze(config, folder, most=1000):
  """Writes a task of predicting the last word of a text; returns its folder.

  As in LAMBADA (1606.06031), a model gets a text without its last word, and the
  word already occurs in the text. Each text ends with a sentence of the test
  split, and has at most 800 characters before the word. Texts do not overlap,
  and a document gives at most five. The word has at least five letters. Unlike
  in LAMBADA, nobody has selected the texts whose last word people can guess.
  """
  tokenizer, token_S = text.tokenizer(config), test_tokens(config)
  ends = (token_S == tokenizer.end).nonzero()[0]
  rows = []
  for first, last in zip(ends, [*ends[1:], len(token_S)], strict=True):
    document = tokenizer.decode(token_S[first:last])
    count, free = 0, 0
    for found in re.finditer(r" ([A-Za-z]{5,})\.\s", document):
      context = document[: found.start()]
      start = max(0, len(context) - 800)
      context = context[context.find(" ", start) + 1 :] if start else context
      words = re.findall("[A-Za-z]+", context)
      is_free = found.start() - len(context) >= free
      if len(words) < 60 or found[1] not in words or not is_free:
        continue
      rows.append({"context": context, "word": found[1]})
      count, free = count + 1, found.end()
      if count == 5:
        break
  if not rows:
    raise ValueError(
      f"config.data.source={config.data.source!r}: the test split has no text "
      "whose last word already occurs in it"
    )
  folder.mkdir(exist_ok=True, parents=True)
  lines = "".join(json.dumps(row) + "\n" for row in rows[:most])
  path = (folder / "cloze.jsonl").resolve()
  path.write_text(lines)
  (folder / "cloze.yaml").write_text(CLOZE.format(path=path))
  return folder


if __name__ == "__main__":
  main()
