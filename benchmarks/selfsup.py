"""Trains SimCLR, BYOL and MAE with three kinds of attention, and compares them.

  python -m benchmarks.selfsup --processes=9
  python -m benchmarks.selfsup --table

Each of the methods is trained with softmax, sigmoid and normalised sigmoid
attention and three seeds, with the recipe `:gpu` of its config. A linear probe
then measures each run, and the random encoder that it started from, on the test
images. The runs share one GPU: `--processes` of them train at the same time. A
finished run is not repeated, and a stopped run is resumed.

It writes --out after every run, and prints a table at the end. With --table it
does not train: it draws the picture beside --out and writes the table into
docs/selfsup.md. This runs on a CPU, with the embedded images:

  python -m benchmarks.selfsup --recipe= --processes=1 --out=selfsup_cpu.json
"""

import argparse
import concurrent.futures
import datetime
import importlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

from matplotlib import figure as figures

from benchmarks import attention

METHODS = ("byol", "simclr", "mae")  # the longest first
KINDS = {
  "softmax": {"attn.kind": "softmax"},
  "sigmoid": {"attn.kind": "sigmoid"},
  "normalised sigmoid": {"attn.kind": "sigmoid", "attn.normalize": True},
}
SEEDS = 3
DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "selfsup.md"
_TABLE = re.compile(r"(<!-- table -->\n).*(<!-- end of the table -->)", re.S)


def name_of(method, kind, seed):
  return f"{method}-{kind.replace(' ', '_')}-{seed}"


def train_one(method, kind, seed, args):
  """Trains and probes one run, and writes result.json into its folder."""
  import jax

  from sigattn.training import mesh, metrics, probe
  from train import train

  metrics.set_up_logs()
  start = time.perf_counter()
  module = importlib.import_module(f"configs.{method}")
  config = module.get_config(args.recipe)
  config.update_from_flattened_dict(KINDS[kind] | {"seed": seed})
  if args.source:
    config.data.source = args.source
  if args.steps:
    config.total_steps = args.steps
  folder = pathlib.Path(args.root) / name_of(method, kind, seed)
  state = train(config, folder)
  if int(state.step) < config.total_steps:
    sys.exit(f"{folder}: the run has stopped; the same command resumes it")
  trained = time.perf_counter()
  devices, split = mesh.make(config), config.data.eval_split
  last = metrics.last_evaluation(metrics.read(folder), split)
  result = {
    "method": method,
    "kind": kind,
    "seed": seed,
    "linear_probe": probe.linear_probe(config, state.params, split, devices),
    "random_encoder": probe.random_encoder(config, split, devices),
    "knn_accuracy": last["knn_accuracy"],
    "feature_std": last["feature_std"],
    "steps": config.total_steps,
    "recipe": args.recipe,
    "source": config.data.source,
    "seconds": {
      "training": trained - start,
      "probe": time.perf_counter() - trained,
    },
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }
  (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def _is_done(folder, args):
  try:
    result = json.loads((folder / "result.json").read_text())
  except (OSError, ValueError):
    return False
  same_steps = not args.steps or result["steps"] == args.steps
  return same_steps and result["recipe"] == args.recipe


def _start(name, args):
  """Trains one run in its own process, and returns whether it succeeded."""
  folder = pathlib.Path(args.root) / name
  if _is_done(folder, args):
    return True
  words = [
    sys.executable, "-m", "benchmarks.selfsup", f"--one={name}",
    f"--root={args.root}", f"--recipe={args.recipe}",
    f"--source={args.source}", f"--steps={args.steps}",
  ]  # fmt: skip
  share = 0.9 / args.processes  # of the GPU's memory
  environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}"}
  with (folder.parent / f"{name}.log").open("a") as log:
    code = subprocess.run(
      words, env=environment, stdout=log, stderr=log, check=False
    ).returncode
  return code == 0


def train_all(args):
  """Trains the unfinished runs, and returns the names of those that failed."""
  pathlib.Path(args.root).mkdir(parents=True, exist_ok=True)
  names = [
    name_of(method, kind, seed)
    for method in args.methods
    for kind in KINDS
    for seed in range(args.seeds)
  ]
  failed, start = [], time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
    waiting = {pool.submit(_start, name, args): name for name in names}
    for done in concurrent.futures.as_completed(waiting):
      name, seconds = waiting[done], time.perf_counter() - start
      print(f"{seconds:6.0f} s  {name}  {'' if done.result() else 'FAILED'}")
      if not done.result():
        failed.append(name)
      write_results(args)
  return failed


def write_results(args):
  """Collects the result.json of all runs in --out, and returns the runs."""
  paths = sorted(pathlib.Path(args.root).glob("*/result.json"))
  runs = [json.loads(path.read_text()) for path in paths]
  contents = {
    "date": datetime.date.today().isoformat(),
    "commit": attention.commit(),
    "runs": runs,
  }
  pathlib.Path(args.out).write_text(json.dumps(contents, indent=2) + "\n")
  return runs


def _accuracies(runs, method, kind, key="linear_probe"):
  return [
    100 * run[key]["accuracy"]
    for run in runs
    if (run["method"], run["kind"]) == (method, kind)
  ]


def _cell(values):
  if not values:
    return ""
  text = f"{statistics.fmean(values):.2f}"
  return (
    text + f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else text
  )


def table(runs):
  """The Markdown table of linear-probe accuracy, mean and deviation, in %."""
  lines = [
    "| method | attention | linear probe | random encoder | gain | seeds |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for method in METHODS:
    for kind in KINDS:
      ours = _accuracies(runs, method, kind)
      random = _accuracies(runs, method, kind, "random_encoder")
      if not ours:
        continue
      gain = statistics.fmean(ours) - statistics.fmean(random)
      lines.append(
        f"| {method} | {kind} | {_cell(ours)} | {_cell(random)} | "
        f"{gain:+.2f} | {len(ours)} |"
      )
  return "\n".join(lines)


def draw(runs, path):
  """Draws a dot for each run, and a grey dot for its initial encoder."""
  figure = figures.Figure((7, 3.4), layout="constrained")
  axes = figure.subplots()
  ticks = []
  methods = [x for x in METHODS if any(run["method"] == x for run in runs)]
  for i, method in enumerate(methods):
    for j, kind in enumerate(KINDS):
      x = i * (len(KINDS) + 1) + j
      ours = _accuracies(runs, method, kind)
      random = _accuracies(runs, method, kind, "random_encoder")
      axes.plot([x] * len(random), random, "o", color="grey", alpha=0.5)
      axes.plot([x] * len(ours), ours, "o", color=f"C{j}", alpha=0.7)
      ticks.append((x, f"{method}\n{kind.replace(' ', chr(10))}"))
  axes.set_xticks(*zip(*ticks, strict=True), fontsize="x-small")
  axes.set_ylabel("linear probe, % (grey: random encoder)")
  axes.grid(axis="y", alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=120)


def publish(args):
  """Draws the picture, and writes the table into docs/selfsup.md."""
  out = pathlib.Path(args.out)
  runs = json.loads(out.read_text())["runs"]
  draw(runs, out.with_suffix(".png"))
  text = table(runs)
  print(text)
  old = DOCUMENT.read_text()
  DOCUMENT.write_text(_TABLE.sub(lambda x: f"{x[1]}\n{text}\n\n{x[2]}", old))


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--root", default="runs/selfsup", help="folder of runs")
  parser.add_argument(
    "--out", default="benchmarks/results/selfsup.json", help="a JSON file"
  )
  parser.add_argument("--recipe", default="gpu", help="argument of the configs")
  parser.add_argument("--source", default="", help="another data.source")
  parser.add_argument("--steps", type=int, default=0, help="total_steps")
  parser.add_argument("--seeds", type=int, default=SEEDS)
  parser.add_argument("--processes", type=int, default=9)
  parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
  parser.add_argument(
    "--table", action="store_true", help="only write the table of --out"
  )
  parser.add_argument("--one", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    method, kind, seed = args.one.split("-")
    train_one(method, kind.replace("_", " "), int(seed), args)
    return
  if args.table:
    publish(args)
    return
  failed = train_all(args)
  print(table(write_results(args)))
  if failed:
    sys.exit(f"failed, see the logs in {args.root}: {failed}")


if __name__ == "__main__":
  main()
