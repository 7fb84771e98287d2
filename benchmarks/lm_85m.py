r"""Trains and measures models of 85M parameters: python -m benchmarks.lm_85m

  python -m benchmarks.corpus --out=corpus            once; no GPU
  python -m benchmarks.lm_85m --seconds=540           until all are finished
  python -m benchmarks.lm_85m --seconds=540 --archive=runs.tar.xz

It trains the models of configs/lm_85m.py, one after the other:

  1. for each form and each of three learning rates, 160 updates (10.5 million
     tokens, with a complete schedule);
  2. for each form, 1,526 updates (100 million tokens) with seed 0 and the rate
     that had the smallest validation loss;
  3. the same with seed 1 for the two forms with the smallest loss.

It skips the runs that benchmarks/results/lm_85m.json contains. After --seconds
it sends SIGTERM to the current run, which saves its state in --runs. If that
folder still exists, the same command resumes the run. A run of 2. and 3. is
measured as soon as it ends, because its checkpoint has 1.3 GB and may not
outlive the machine. --archive packs the small files of all runs: config,
metrics and measurements.

A row holds form, seed, tokens, lr, validation_loss, test_loss,
tokens_per_second, seconds_per_step, commit and device, and these measurements
on the test documents:

  lengths     the loss at 1, 2 and 4 times the training length, also by position
              (eval.py)
  copying     {distance: accuracy}, see `copying`
  cloze       accuracy and log-probability of lm-eval on texts of the test
              split, see `write_cloze`; null if lm-eval is not installed, in
              which case the log says so

Expected seconds on one H200, for 350,000 tokens/s and 40 s for starting and
compiling: 70 for a short run, 325 for a whole run, and 90 for its measurement.
Step 1 thus takes 840, step 2 takes 1,660 and step 3 takes 830 seconds, 56
minutes in total.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "lm_85m.json"
SHORT_STEPS = 160
COPIED = 32  # tokens that `copying` repeats
PREFIX = 8  # the first of them, not scored: they only show what is repeated
# Seconds that a run has after SIGTERM to save its state.
GRACE = 45
STOPPED = 130  # the exit code of train.py after SIGTERM
MEASUREMENTS = "measured.json"


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run. short: whether it only serves to choose the rate."""

  form: str
  lr: float
  seed: int
  short: bool

  @property
  def name(self):
    kind = "short" if self.short else "whole"
    return f"{kind}_{self.form}_{self.lr:g}_{self.seed}"

  def is_of(self, row):
    return all(
      row[name] == value for name, value in dataclasses.asdict(self).items()
    )


def next_run(rows, forms, rates):
  """The first Run that has no row yet, or None if all have one.

  rows: the rows of the results file. forms: names. rates: learning rates.
  """
  for form in forms:
    for lr in rates:
      run = Run(form, lr, 0, short=True)
      if not any(map(run.is_of, rows)):
        return run
  best = {form: best_rate(rows, form) for form in forms}
  for form in forms:
    run = Run(form, best[form], 0, short=False)
    if not any(map(run.is_of, rows)):
      return run
  whole = [
    x
    for x in rows
    if not x["short"] and x["seed"] == 0 and x["validation_loss"] is not None
  ]
  for row in sorted(whole, key=lambda x: x["validation_loss"])[:2]:
    run = Run(row["form"], row["lr"], 1, short=False)
    if not any(map(run.is_of, rows)):
      return run
  return None


def best_rate(rows, form):
  """The learning rate of a form's best short run.

  A run that diverged has the validation loss None.
  """
  short = [
    x
    for x in rows
    if x["short"] and x["form"] == form and x["validation_loss"] is not None
  ]
  if not short:
    raise ValueError(f"{form}: every short run diverged; add a smaller rate")
  return min(short, key=lambda x: x["validation_loss"])["lr"]


# The loop.


def main(words=None):
  options = parse(words)
  if options.measure:
    measure(options.measure, options.copies)
    return
  from configs import lm_85m

  rates = [x["optim.lr"] for x in lm_85m.sweep_lr()]
  end = time.monotonic() + options.seconds
  while run := next_run(read_rows(options.results), lm_85m.FORMS, rates):
    folder = options.runs / run.name
    if not train(run, folder, options, end):
      break
    print(f"{run.name} is finished", flush=True)
  else:
    print("all runs are finished")
  if options.archive:
    pack(options.runs, options.archive)


def parse(words):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--seconds", type=float, default=540, help="when to stop")
  add("--runs", type=pathlib.Path, default=pathlib.Path("runs/lm_85m"))
  add("--results", type=pathlib.Path, default=RESULTS)
  add("--archive", type=pathlib.Path, help="a .tar.xz to write")
  add("--commit", help="the commit that rows name; default: git's")
  add("--copies", type=int, default=64, help="rows for each distance")
  add("--measure", type=pathlib.Path, help="only measure this run")
  add("--local", action="store_true", help="tiny runs, for a test on a CPU")
  add("overrides", nargs="*", help="for every run: config.data.source=a/b")
  return parser.parse_args(words)


def read_rows(path):
  return json.loads(path.read_text())["rows"] if path.exists() else []


def train(run, folder, options, end):
  """Trains, measures and records a run. Returns False if time ran out."""
  words = [sys.executable, "train.py", f"--workdir={folder}"]
  words += [
    f"--config=configs/lm_85m.py:{run.form}" + ",runlocal" * options.local
  ]
  words += [f"--config.optim.lr={run.lr!r}", f"--config.seed={run.seed}"]
  if run.short:
    words += ["--config.telemetry.every_steps=0"]
    words += ["--config.ckpt.every_steps=0"]  # SIGTERM and the end save it
    if not options.local:
      words += [f"--config.total_steps={SHORT_STEPS}"]
  words += [f"--{word}" for word in options.overrides]
  code = call(words, end)
  if code == STOPPED:
    return False
  diverged = code and (folder / "non_finite.json").exists()
  if code and not diverged:
    raise subprocess.CalledProcessError(code, words)
  if not run.short and not diverged:
    words = [sys.executable, "-m", "benchmarks.lm_85m", f"--measure={folder}"]
    words += [f"--copies={options.copies}"]
    if code := call(words, end):
      if code == STOPPED:
        return False
      raise subprocess.CalledProcessError(code, words)
  record(run, folder, options)
  if run.short:  # it is never measured, and all of them would fill a disk
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
  return True


def call(words, end):
  """The exit code of a command, or STOPPED if time ran out."""
  print(" ".join(words), flush=True)
  left = end - time.monotonic() - GRACE
  if left <= 0:
    return STOPPED
  process = subprocess.Popen(words, cwd=ROOT)
  try:
    return process.wait(left)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGTERM)
  try:
    process.wait(GRACE)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
  return STOPPED


def record(run, folder, options):
  """Adds a run's row to the results file."""
  from sigattn.training import files, metrics, run_dir

  config = run_dir.read_config(folder)
  lines = metrics.read(folder)
  last = metrics.last_evaluation(lines, config.data.eval_split)
  trained = [x for x in lines if x["split"] == "train"]
  rate = trained[-1].get("per_second", 0.0) if trained else 0.0
  steps = trained[-1]["step"] if trained else 0
  path = folder / MEASUREMENTS
  measured = json.loads(path.read_text()) if path.exists() else {}
  row = dataclasses.asdict(run) | {
    "tokens": steps * config.batch_size * config.data.length,
    "validation_loss": last and last["loss"],
    "test_loss": measured.get("test_loss"),
    "tokens_per_second": rate * config.data.length,
    "seconds_per_step": config.batch_size / rate if rate else None,
    "commit": options.commit or commit(),
    "device": device(),
    **{k: measured.get(k) for k in ("lengths", "copying", "cloze")},
  }
  files.write_json(
    options.results, {"rows": [*read_rows(options.results), row]}
  )


def commit():
  words = ["git", "describe", "--always", "--dirty"]
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    raise ValueError("--commit must be given where there is no git history")
  return done.stdout.strip()


def device():
  """The kind of the first device. Another process finds it and frees it."""
  words = "import jax; print(jax.devices()[0].device_kind)"
  return subprocess.check_output(
    [sys.executable, "-c", words], text=True
  ).strip()


def pack(runs, archive):
  """Packs the small files of all runs into a .tar.xz."""
  with tarfile.open(archive, "w:xz") as file:
    for path in sorted(runs.rglob("*")):
      is_small = path.is_file() and path.suffix in (".json", ".jsonl")
      if is_small and "checkpoints" not in path.parts:
        file.add(path, path.relative_to(runs))


# Measurements.


def measure(folder, copies):
  """Measures a finished run on the test split, and writes measured.json."""
  from eval import evaluate
  from sigattn.training import checkpoint, files

  results = evaluate(folder, "test")
  config, params, _ = checkpoint.load(folder)
  measured = {
    "test_loss": results["loss"],
    "lengths": results["variants"],
    "copying": copying(config, params, copies),
    "cloze": cloze(config, params, folder),
  }
  files.write_json(folder / MEASUREMENTS, measured)


def test_tokens(config):
  from sigattn.data import text, token_files

  size = text.tokenizer(config).size
  return token_files.read(config.data.source, "test", size)


def copying(config, params, copies):
  """The accuracy of copying, by the distance of the copy.

  A row is a part of the held-out text. Its last COPIED tokens are replaced by a
  copy of those that stand `distance` tokens before them. Rows have the training
  length, or twice that for a longer distance; see `distances`.

  Returns {distance: {"copied", "first"}}: the accuracy at the copy and at the
  original, both without the first PREFIX tokens.
  """
  import jax
  import numpy as np
  from flax import nnx

  from sigattn.training import setup

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
  """Powers of 2 times COPIED, the largest that fits, and a longer one."""
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
    print("cloze is not measured: lm-eval is not installed", flush=True)
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


CLOZE = """
task: cloze
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{word}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: perplexity
"""


def write_cloze(config, folder, most=1000):
  """Writes a task of predicting the last word of a text; returns its folder.

  As in LAMBADA (1606.06031), a model predicts the last word of a sentence from
  the text before it, and the word also occurs in that text. The sentences are
  from the test split, with at most 800 characters of text; the word has at
  least five letters. LAMBADA's texts were selected so that people can guess the
  word; these were not.
  """
  import re

  from sigattn.data import text

  tokenizer, token_S = text.tokenizer(config), test_tokens(config)
  ends = (token_S == tokenizer.end).nonzero()[0]
  rows = []
  for first, last in zip(ends, [*ends[1:], len(token_S)], strict=True):
    document = tokenizer.decode(token_S[first:last])
    for found in re.finditer(r" ([A-Za-z]{5,})\.\s", document):
      context = document[: found.start()]
      start = max(0, len(context) - 800)
      context = context[context.find(" ", start) + 1 :] if start else context
      words = re.findall("[A-Za-z]+", context)
      if len(words) < 60 or found[1] not in words:
        continue
      rows.append({"context": context, "word": found[1]})
      break  # one for each document
  if not rows:
    raise ValueError(
      f"config.data.source={config.data.source!r}: the test split has no "
      "sentence whose last word also occurs in the text before it"
    )
  folder.mkdir(exist_ok=True, parents=True)
  lines = "".join(json.dumps(row) + "\n" for row in rows[:most])
  path = (folder / "cloze.jsonl").resolve()
  path.write_text(lines)
  (folder / "cloze.yaml").write_text(CLOZE.format(path=path))
  return folder


if __name__ == "__main__":
  main()
