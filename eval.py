"""Evaluates a run: restores its parameters, prints a table, writes JSON.

  python eval.py --workdir=runs/vit_sigmoid/default

or, in a notebook: `from eval import evaluate; evaluate(workdir)`.
"""

import os
import pathlib
from typing import Any

from absl import flags

from sigattn import cli, tasks
from sigattn.analysis import report
from sigattn.training import checkpoint, files, mesh, metrics, run_dir, setup
from sigattn.training import evaluate as evaluation


def evaluate(
  workdir: str | os.PathLike[str],
  split: str | None = None,
  step: int | str | None = None,
) -> dict[str, Any]:
  """Metrics of a run's checkpoint, as a dict; also in workdir/eval.json.

  What the task evaluates besides, another length say, is a dict of metrics by
  name in `variants`. Where the folder is read-only, a message says so.

  split: one of the data's, by default config.data.eval_split. step: a number,
  "best", or None for the newest. Raises ValueError where there is no such run,
  step or split.
  """
  saved = setup.complete(run_dir.read_config(workdir), workdir)
  devices = mesh.for_evaluation(saved)
  config, params, step = checkpoint.load(workdir, step, devices)
  split = split or config.data.eval_split

  def run(config):
    batches = tasks.eval_batches(config, split)
    return evaluation.evaluator(config, devices)(params, batches)

  results = {"step": step, "split": split, **run(config)}
  if variants := evaluation.variants(config):
    results["variants"] = {name: run(x) for name, x in variants.items()}
  with metrics.saying_what_is_not_written():
    files.write_json(pathlib.Path(workdir) / "eval.json", results)
  return results


def _define_flags():
  flags.DEFINE_string("split", None, "By default the run's own held-out one.")


def _main(given):
  metrics.set_up_logs()
  with cli.refusing("eval.py"):
    results = evaluate(given.workdir, given.split, given.step)
  variants = results.pop("variants", {})
  metrics.log(
    report.evaluation_table({results["split"]: results}, title=given.workdir)
  )
  if variants:
    metrics.log(report.variants_table(variants))


if __name__ == "__main__":
  cli.start(_main, _define_flags, ("workdir", "step"))
