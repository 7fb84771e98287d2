"""Evaluates a run: restores its parameters, prints a table, writes JSON.

  python eval.py --workdir=runs/vit_sigmoid/default

or, in a notebook: `from eval import evaluate; evaluate(workdir)`.
"""

import pathlib
import sys

from absl import app, flags

from sigattn import checkpoint, mesh, metrics, report, tasks, workdirs
from sigattn.data import loader


def evaluate(workdir, split=None, step=None):
  """Metrics of a run's checkpoint, as a dict; also in workdir/eval.json.

  What the task studies besides, another length say, is a dict of metrics by
  name in `studies`.

  split: one of the data's, by default config.data.eval_split. step: a number,
  "best", or None for the newest. Raises ValueError where there is no such run,
  step or split.
  """
  config, params, step = checkpoint.load(workdir, step)
  split = split or config.data.eval_split
  devices = mesh.make()

  def run(config):
    batches = loader.eval_batches(config, split)
    return tasks.evaluator(config, devices)(params, batches)

  results = {"step": step, "split": split, **run(config)}
  if studies := tasks.studies(config):
    results["studies"] = {name: run(x) for name, x in studies.items()}
  workdirs.write_json(pathlib.Path(workdir) / "eval.json", results)
  return results


def _main(argv):
  if argv[1:]:
    raise app.UsageError(f"not understood: {argv[1:]}")
  metrics.set_up_logs()
  workdir, step = flags.FLAGS.workdir, flags.FLAGS.step
  try:
    if step is not None and step != "best":
      step = int(step)
    results = evaluate(workdir, flags.FLAGS.split, step)
  except ValueError as error:
    sys.exit(f"eval.py: {error}")
  studies = results.pop("studies", {})
  metrics.log(
    report.evaluation_table({results["split"]: results}, title=workdir)
  )
  if studies:
    metrics.log(report.studies_table(studies))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The folder of the run.")
  flags.DEFINE_string("split", None, "By default the run's own held-out one.")
  flags.DEFINE_string("step", None, "A number or best; by default the newest.")
  flags.mark_flag_as_required("workdir")
  app.run(_main)
