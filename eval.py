"""Evaluates a run: restores its parameters, prints a table, writes JSON.

  python eval.py --workdir=runs/vit_sigmoid/default

or, in a notebook: `from eval import evaluate; evaluate(workdir)`. For runs that
learn features of images there are also

  --eval=linear_probe   a linear classifier on frozen features
  --eval=finetune       supervised training from the run: configs/finetune.py
  --eval=pictures       features in two dimensions, and what the model draws
"""

import json
import os
import pathlib
from typing import Any

from absl import flags

from configs import finetune as finetune_config
from sigattn import cli, tasks
from sigattn.analysis import features, report
from sigattn.training import (
  checkpoint,
  files,
  mesh,
  metrics,
  probe,
  run_dir,
)
from sigattn.training import evaluate as evaluation
from train import train


def evaluate(
  workdir: str | os.PathLike[str],
  split: str | None = None,
  step: int | str | None = None,
  source: str | None = None,
) -> dict[str, Any]:
  """Evaluates a run's checkpoint. Returns a dict of metrics.

  The dict is also written to workdir/eval.json. If the task has further
  evaluations, for example at other lengths, `variants` has the metrics of each
  by its name. If the folder is read-only, a message says so.

  split: a split of the data, by default config.data.eval_split. step: a number,
  "best", or None for the newest. source: where the evaluated data are now, if
  they are no longer where the run read them; a message says so if the files are
  other ones. Raises ValueError if there is no such run, step, split or source.
  """
  config, params, step, devices = _load(workdir, step, source)
  split = split or config.data.eval_split

  def run(config):
    batches = tasks.eval_batches(config, split)
    return evaluation.evaluator(config, devices)(params, batches)

  results = {"step": step, "split": split, **run(config)}
  if variants := evaluation.variants(config):
    results["variants"] = {name: run(x) for name, x in variants.items()}
  return _written(workdir, "eval.json", results)


def linear_probe(
  workdir: str | os.PathLike[str],
  split: str | None = None,
  step: int | str | None = None,
  source: str | None = None,
) -> dict[str, Any]:
  """The accuracy of a linear classifier on a run's frozen features.

  It is also written to workdir/linear_probe.json. `random_encoder` is the same
  for the parameters with which the run started. Arguments and errors are those
  of `evaluate`; see sigattn.training.probe.
  """
  config, params, step, devices = _load(workdir, step, source)
  split = split or config.data.eval_split
  results = {
    "step": step,
    "split": split,
    **probe.linear_probe(config, params, split, devices),
    "random_encoder": probe.random_encoder(config, split, devices),
  }
  return _written(workdir, "linear_probe.json", results)


def finetune(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Fine-tunes a run by configs/finetune.py, in workdir/finetune.

  A second call resumes it. Returns the last evaluation.
  """
  config = finetune_config.get_config(workdir)
  folder = os.path.join(workdir, "finetune")
  state = train(config, folder)
  if int(state.step) < config.total_steps:
    raise ValueError(f"{folder}: was stopped; the same command resumes it")
  done = json.loads((pathlib.Path(folder) / "DONE.json").read_bytes())
  return {"split": config.data.eval_split, **done}


def pictures(
  workdir: str | os.PathLike[str],
  split: str | None = None,
  step: int | str | None = None,
  source: str | None = None,
) -> list[pathlib.Path]:
  """Draws the pictures of sigattn.analysis.features into the run's folder.

  Returns the paths. Arguments and errors are those of `evaluate`.
  """
  config, params, _, devices = _load(workdir, step, source)
  split = split or config.data.eval_split
  return features.draw(config, params, split, devices, workdir)


def _load(workdir, step, source):
  saved = run_dir.load_config(workdir)
  config = run_dir.with_data(saved, workdir, source)
  devices = mesh.for_evaluation(config)
  _, params, step = checkpoint.load(workdir, step, devices)
  return config, params, step, devices


def _written(workdir, name, results):
  with metrics.saying_what_is_not_written():
    files.write_json(pathlib.Path(workdir) / name, results)
  return results


def _define_flags():
  flags.DEFINE_string("split", None, "By default the run's own held-out one.")
  flags.DEFINE_enum(
    "eval",
    "metrics",
    ["metrics", "linear_probe", "finetune", "pictures"],
    "What to evaluate; see above.",
  )


def _main(given):
  metrics.set_up_logs()
  where = (given.workdir, given.split, given.step, given.source)
  with cli.refusing("eval.py"):
    if given.eval == "pictures":
      paths = pictures(*where)
      metrics.log("pictures: " + ", ".join(map(str, paths)))
      return
    if given.eval == "finetune":
      for name in ("split", "step", "source"):
        if given[name].value is not None:
          raise ValueError(
            f"--{name}={given[name].value}; has no effect with "
            "--eval=finetune: leave it out"
          )
      results = finetune(given.workdir)
    elif given.eval == "linear_probe":
      results = linear_probe(*where)
    else:
      results = evaluate(*where)
  variants = results.pop("variants", {})
  rows = {results["split"]: results}
  if random := results.pop("random_encoder", None):
    rows["random encoder"] = random
  tables = report.evaluation_tables(rows, title=given.workdir)
  if variants:
    tables += report.variants_tables(variants)
  for table in tables:
    metrics.log(table)


if __name__ == "__main__":
  cli.start(_main, _define_flags, ("workdir", "step", "source"))
