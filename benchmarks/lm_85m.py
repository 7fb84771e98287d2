r"""Trains and measures models of 85M parameters: python -m benchmarks.lm_85m

  python -m benchmarks.corpus --out=corpus            once; no GPU
  python -m benchmarks.lm_85m --seconds=540           again and again
  python -m benchmarks.lm_85m --seconds=540 --cards=2 --archive=runs.tar.xz
  python -m benchmarks.lm_85m_report                  tables and pictures

It trains the models of configs/lm_85m.py, one on each card at the same time:

  1. for each form and each of four learning rates, 160 updates (10.5 million
     tokens, with a complete schedule);
  2. for each form, 1,526 updates (100 million tokens) with seed 0 and the rate
     that had the smallest validation loss;
  3. the same with seed 1.

Runs of 2. and 3. may begin as soon as 1. is done for their form. A form that
diverged at every rate has none.

It skips the runs that benchmarks/results/lm_85m.json contains. After --seconds
it sends SIGTERM to the current runs, which save their state in --runs. If that
folder still exists, the same command resumes them. A run that would not end
before --seconds waits if another one would. A run of 2. and 3. is measured as
soon as it ends, because its checkpoint has 1.3 GB and may not outlive the
machine. --archive packs the small files of all runs: config, metrics,
measurements and the output, which is in RUNS/NAME.log. If a run fails, the
others go on, and the next command tries it again.

Runs that share a card (--share) are slower each, but compile and measure while
others train. A run needs 26 GiB. Set XLA_PYTHON_CLIENT_PREALLOCATE=false then.
Their rows have no tokens_per_second and seconds_per_step.

A row holds form, lr, seed, short (whether it is a run of 1.), tokens,
validation_loss, test_loss, tokens_per_second, seconds_per_step, commit,
device, diverged_at (the update at which a loss was not finite, or null),
curves and telemetry (see `curves` and `telemetry_means`), and these
measurements on the test documents:

  lengths     the loss at 1, 2 and 4 times the training length, also by position
              (the variants of eval.py)
  copying     {distance: accuracy}
  cloze       accuracy and perplexity of lm-eval on texts of the test split;
              null if lm-eval is not installed, in which case the log says so

benchmarks/lm_85m_measure.py says how both are measured.

Measured seconds on an H200, at 480,000 tokens/s: 60 for a short run, and 285
for a whole run with its measurement. Step 1 thus takes 960, and steps 2 and 3
take 1,140 seconds each: 54 minutes in total on one card.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "lm_85m.json"
SHORT_STEPS = 160
SEEDS = (0, 1)  # of the whole runs
# Seconds in which a run that got SIGTERM has saved its state.
GRACE = 45
# Estimates by which `choose` decides: the seconds that a run needs to start and
# compile, and the seconds that its measurement takes.
START, MEASURE = 40, 90
STOPPED = 130  # the exit code of train.py after SIGTERM
POINTS = 120  # of a curve
# The quantities of telemetry that a row holds.
TELEMETRY = (
  "attention_v_norm", "attn_added_norm", "residual_norm", "row_sum_mean",
  "entropy", "logit_max",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run. short: whether it only helps to choose the rate."""

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


def available(rows, forms, rates):
  """The runs without a row that wait for no other run, in order.

  rows: those of the file of results. forms: names. rates: learning rates.
  """

  def missing(runs):
    return [run for run in runs if not any(map(run.is_of, rows))]

  short, whole = [], []
  for form in forms:
    left = missing(Run(form, lr, 0, short=True) for lr in rates)
    short += left
    if not left and (best := best_rate(rows, form)) is not None:
      whole += missing(Run(form, best, seed, short=False) for seed in SEEDS)
  return [*short, *sorted(whole, key=lambda run: run.seed)]


def best_rate(rows, form):
  """The learning rate of a form's best short run; None if all diverged.

  A run that diverged has the validation loss None.
  """
  short = [
    x
    for x in rows
    if x["short"] and x["form"] == form and x["validation_loss"] is not None
  ]
  return min(short, key=lambda x: x["validation_loss"], default={}).get("lr")


def choose(runs, rows, seconds, updates, share=1):
  """The first Run that ends within `seconds`, or the first one if none does.

  rows: those of the file of results. A run whose form has no row is assumed to
  end in time. updates: {Run: how many updates it has done already}.
  """
  in_time = (
    run
    for run in runs
    if expected_seconds(run, rows, updates.get(run, 0), share) <= seconds
  )
  return next(in_time, runs[0])


def expected_seconds(run, rows, updates, share=1):
  """How long a run still takes; 0 if its form's speed is not known yet.

  share: how many runs share a card.
  """
  from configs import lm_85m

  speeds = [
    x["tokens_per_second"]
    for x in rows
    if x["form"] == run.form and x["tokens_per_second"]
  ]
  if not speeds:
    return 0.0
  config = lm_85m.get_config(run.form)
  left = (SHORT_STEPS if run.short else config.total_steps) - updates
  tokens = max(left, 0) * config.batch_size * config.data.length
  return START + share * tokens / speeds[-1] + (0 if run.short else MEASURE)


# The loop.


class Queue:
  """Hands the runs out to the cards, and keeps their rows. Threads share it."""

  def __init__(self, options, forms, rates, end):
    self.failed = []
    self._options, self._forms, self._rates = options, forms, rates
    self._end = end
    self._busy = set()
    self._changed = threading.Condition()

  def take(self):
    """The next Run of a free card; None if there is none, or no time.

    It waits while the runs of other cards may still make one available. In the
    last START + GRACE seconds a run would end before its first update.
    """
    with self._changed:
      while True:
        left = self._end - time.monotonic() - GRACE
        rows = read_rows(self._options.results)
        runs = available(rows, self._forms, self._rates)
        runs = [x for x in runs if x not in (*self._busy, *self.failed)]
        if left <= START or not (runs or self._busy):
          return None
        if runs:
          done = {run: updates(self._options.runs / run.name) for run in runs}
          run = choose(runs, rows, left, done, self._options.share)
          self._busy.add(run)
          return run
        self._changed.wait(left - START)

  def put(self, run, row=None, failed=False):
    """Ends a Run that was taken. row: of the file of results, if it has one."""
    with self._changed:
      self._busy.remove(run)
      if failed:
        self.failed.append(run)
      if row:
        path = self._options.results
        write_rows(path, [*read_rows(path), row])
      self._changed.notify_all()


def main(words=None):
  options = parse(words)
  from configs import lm_85m

  rates = [x["optim.lr"] for x in lm_85m.sweep_lr()]
  options.devices = cards(options)
  options.commit = options.commit or commit()
  options.runs.mkdir(parents=True, exist_ok=True)
  end = time.monotonic() + options.seconds
  queue = Queue(options, lm_85m.FORMS, rates, end)
  workers = [*range(options.cards)] * options.share
  with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
    done = [pool.submit(work, queue, card, options, end) for card in workers]
  if options.archive:
    pack(options.runs, options.archive)
  for future in done:
    future.result()  # raises what the thread raised
  left = available(read_rows(options.results), lm_85m.FORMS, rates)
  print(
    f"{len(left)} runs could begin now" if left else "all runs are finished"
  )
  if queue.failed:
    sys.exit(f"failed: {', '.join(run.name for run in queue.failed)}")


def parse(words):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--seconds", type=float, default=540, help="when to stop")
  add("--cards", type=int, default=1, help="GPUs")
  add("--share", type=int, default=1, help="runs on a GPU at the same time")
  add("--runs", type=pathlib.Path, default=pathlib.Path("runs/lm_85m"))
  add("--results", type=pathlib.Path, default=RESULTS)
  add("--archive", type=pathlib.Path, help="a .tar.xz to write")
  add("--commit", help="by default git's")
  add("--copies", type=int, default=64, help="rows for each distance")
  add("--local", action="store_true", help="tiny runs, for a test on a CPU")
  add("overrides", nargs="*", help="of every run: config.data.source=a/b")
  return parser.parse_args(words)


def cards(options):
  """The name of each of the first --cards GPUs of this machine."""
  if options.share < 1:
    raise ValueError(f"--share={options.share}; must be at least 1")
  if options.local:
    return ["cpu"] * options.cards
  words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
  try:
    found = subprocess.check_output(words, text=True).splitlines()
  except (OSError, subprocess.CalledProcessError):
    found = []
  if not 1 <= options.cards <= len(found):
    raise ValueError(
      f"--cards={options.cards}; must be from 1 to {len(found)}, the number of "
      "GPUs that nvidia-smi finds; --local needs none"
    )
  return found[: options.cards]


def read_rows(path):
  return json.loads(path.read_text())["rows"] if path.exists() else []


def write_rows(path, rows):
  """Writes the file of results atomically, a row on each line."""
  from sigattn.training import files

  lines = ",\n".join(json.dumps(row) for row in rows)
  files.write_text(path, f'{{"rows": [\n{lines}\n]}}\n')


def work(queue, card, options, end):
  """Trains one run after the other on a card, until there is no more."""
  while run := queue.take():
    start = time.monotonic()
    print(f"card {card}: {run.name} begins", flush=True)
    row, failed = None, True
    try:
      row, failed = train(run, card, options, end), False
      said = "the time is over"
      if row:
        said = f"loss {row['validation_loss']}"
    except subprocess.CalledProcessError as error:
      said = f"failed with exit code {error.returncode}: {error.output}"
    finally:
      queue.put(run, row, failed)
    seconds = time.monotonic() - start
    print(f"card {card}: {run.name}, {seconds:.0f} s: {said}", flush=True)


def train(run, card, options, end):
  """Trains and measures a run on a card: its row, or None if time ran out.

  Raises CalledProcessError, with the end of the output, where a program fails.
  """
  from sigattn.training import run_dir

  folder = options.runs / run.name
  words = [sys.executable, "train.py", f"--workdir={folder}"]
  words += [
    f"--config=configs/lm_85m.py:{run.form}" + ",runlocal" * options.local
  ]
  words += [f"--config.optim.lr={run.lr!r}", f"--config.seed={run.seed}"]
  if run.short:
    words += ["--config.telemetry.every_steps=0"]
    words += ["--config.eval.every_steps=0"]  # only at the end
    words += ["--config.ckpt.every_steps=0"]  # SIGTERM and the end save it
    if not options.local:
      words += [f"--config.total_steps={SHORT_STEPS}"]
  words += [f"--{word}" for word in options.overrides]
  code = 0
  if not run_dir.done(folder, 1):  # it may have ended before its measurement
    code = call(words, card, folder, end)
  if code == STOPPED:
    return None
  diverged = code and (folder / "non_finite.json").exists()
  if code and not diverged:
    raise subprocess.CalledProcessError(code, words, last_line(folder))
  if not run.short and not diverged:
    words = [sys.executable, "-m", "benchmarks.lm_85m_measure", str(folder)]
    words += [f"--copies={options.copies}"]
    if code := call(words, card, folder, end):
      if code == STOPPED:
        return None
      raise subprocess.CalledProcessError(code, words, last_line(folder))
  row = record(run, folder, options, options.devices[card])
  if run.short:  # it is never measured, and all of them would fill a disk
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
  return row


def call(words, card, folder, end):
  """The exit code of a command, or STOPPED if time ran out.

  The command sees one card alone. Its output is added to FOLDER.log.
  """
  left = end - time.monotonic() - GRACE
  if left <= 0:
    return STOPPED
  environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(card)}
  folder.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{folder}.log", "a") as log:
    print(" ".join(words), file=log, flush=True)
    process = subprocess.Popen(
      words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
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


def last_line(folder):
  """The last line of a run's output."""
  lines = pathlib.Path(f"{folder}.log").read_text(errors="replace").split("\n")
  return next((x for x in reversed(lines) if x.strip()), "")[:300]


def updates(folder):
  """How many updates a run has done, according to its folder."""
  from sigattn.training import metrics

  return max((line["step"] for line in metrics.read(folder)), default=0)


def record(run, folder, options, device):
  """The row of a run that has ended."""
  from benchmarks import lm_85m_measure
  from sigattn.training import metrics, run_dir

  config = run_dir.read_config(folder)
  lines = metrics.read(folder)
  last = metrics.last_evaluation(lines, config.data.eval_split)
  trained = [x for x in lines if x["split"] == "train"]
  rate = trained[-1].get("per_second", 0.0) if trained else 0.0
  steps = trained[-1]["step"] if trained else 0
  path, bad = folder / lm_85m_measure.FILE, folder / "non_finite.json"
  measured = json.loads(path.read_text()) if path.exists() else {}
  diverged_at = (
    json.loads(bad.read_text())[-1]["step"] if bad.exists() else None
  )
  done = last and diverged_at is None
  alone = options.share == 1
  return dataclasses.asdict(run) | {
    "tokens": steps * config.batch_size * config.data.length,
    "validation_loss": last["loss"] if done else None,
    "test_loss": measured.get("test_loss"),
    "tokens_per_second": rate * config.data.length if alone else None,
    "seconds_per_step": config.batch_size / rate if alone and rate else None,
    "commit": options.commit,
    "device": device,
    "diverged_at": diverged_at,
    **{k: measured.get(k) for k in ("lengths", "copying", "cloze")},
    "curves": curves(trained),
    "telemetry": telemetry_means(lines),
  }


def curves(lines):
  """Summarises training in at most POINTS parts of equal length.

  lines: of the split "train". Returns lists with one number for each part: its
  last `step`, its mean `loss`, and two numbers of the gradient's norm before
  clipping. `grad_norm` is the median. `grad_norm_max` is the largest value,
  which shows spikes.
  """
  found = {"step": [], "loss": [], "grad_norm": [], "grad_norm_max": []}
  for part in itertools.batched(lines, max(1, -(-len(lines) // POINTS))):
    norms = [line["grad_norm"] for line in part]
    found["step"].append(part[-1]["step"])
    found["loss"].append(_short(statistics.fmean(x["loss"] for x in part)))
    found["grad_norm"].append(_short(statistics.median(norms)))
    found["grad_norm_max"].append(_short(max(norms)))
  return found


def telemetry_means(lines):
  """Telemetry's quantities: {"step": [...], quantity: a list for each layer}.

  A number is the mean over the heads of the layer. For "logit_max" it is the
  largest value.
  """
  from sigattn.analysis import telemetry

  lines = [line for line in lines if line["split"] == telemetry.SPLIT]
  found = {"step": [line["step"] for line in lines]}
  for line in lines:
    layers = {}
    for name, value in line.items():
      quantity, *places = name.split("/")
      layer = [x for x in places if x.startswith("layer")]
      if quantity in TELEMETRY and layer:
        number = int(layer[0].removeprefix("layer"))
        layers.setdefault(quantity, {}).setdefault(number, []).append(value)
    for quantity, values in layers.items():
      join = max if quantity == "logit_max" else statistics.fmean
      found.setdefault(quantity, [[] for _ in values])
      for number, of_heads in values.items():
        found[quantity][number].append(_short(join(of_heads)))
  return found


def _short(number):
  """A number with five digits, which is all that a picture shows."""
  return float(f"{number:.5g}")


def commit():
  words = ["git", "describe", "--always", "--dirty"]
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    raise ValueError("--commit must be given where there is no git history")
  return done.stdout.strip()


def pack(runs, archive):
  """Packs the small files of all runs into a .tar.xz."""
  with tarfile.open(archive, "w:xz") as file:
    for path in sorted(runs.rglob("*")):
      is_small = path.is_file() and path.suffix in (".json", ".jsonl", ".log")
      if is_small and "checkpoints" not in path.parts:
        file.add(path, path.relative_to(runs))


if __name__ == "__main__":
  main()
