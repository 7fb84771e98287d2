"""Evaluates a run: restores its parameters, prints a table, writes JSON.

  python eval.py --workdir=runs/vit_sigmoid/default

or, in a notebook: `from eval import evaluate; evaluate(workdir)`. The numbers
are also written to eval.json in the run's folder, or to eval_SPLIT.json with
--split=SPLIT. --length_factors=1,16 evaluates a language model, or one of the
synthetic tasks, at 1 and 16 times the training length. For runs that learn
features of images there are also

  --eval=linear_probe   a linear classifier on frozen features
  --eval=finetune       supervised training from the run: configs/finetune.py
  --eval=pictures       features in two dimensions, and what the model draws
"""

import json
import os
import pathlib
from collections.abc import Sequence
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
  setup,
)
from sigattn.training import evaluate as evaluation
from train import train


def evaluate(
  workdir: str | os.PathLike[str],
  split: str | None = None,
  step: int | str | None = None,
  source: str | None = None,
  length_factors: Sequence[int] | None = None,
) -> dict[str, Any]:
  """Evaluates a run's checkpoint. Returns a dict of metrics.

  The dict is also written to workdir/eval.json, or to eval_SPLIT.json for
  another split than that of the config. If the task has further evaluations,
  for example at other lengths, `variants` has the metrics of each by its name.
  If the folder is read-only, a message says so.

  split: a split of the data, by default config.data.eval_split. step: a number,
  "best", or None for the newest. source: where the evaluated data are now, if
  they are no longer where the run read them; a message says so if the files are
  other ones. length_factors: in place of config.eval.length_factors. Raises
  ValueError if there is no such run, step, split or source, and for
  length_factors if the task has no other lengths.
  """
  config, params, step, devices = _load(workdir, step, source)
  split = split or config.data.eval_split
  if length_factors is not None:
    _set_lengths(config, tuple(length_factors))

  def run(config):
    batches = tasks.eval_batches(config, split)
    return evaluation.evaluator(config, devices)(params, batches)

  results = {"step": step, "split": split, **run(config)}
  if variants := evaluation.variants(config):
    results["variants"] = {name: run(x) for name, x in variants.items()}
  return _written(workdir, "eval", config, results)


def linear_probe(
  workdir: str | os.PathLike[str],
  split: str | None = None,
  step: int | str | None = None,
  source: str | None = None,
) -> dict[str, Any]:
  """The accuracy of a linear classifier on a run's frozen features.

  It is also written to workdir/linear_probe.json, or linear_probe_SPLIT.json.
  `random_encoder` is the same for the parameters with which the run started.
  Arguments and errors are those of `evaluate`; see sigattn.training.probe.
  """
  config, params, step, devices = _load(workdir, step, source)
  split = split or config.data.eval_split
  results = {
    "step": step,
    "split": split,
    **probe.linear_probe(config, params, split, devices),
    "random_encoder": probe.random_encoder(config, split, devices),
  }
  return _written(workdir, "linear_probe", config, results)


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


def _set_lengths(config, factors):
  if "length_factors" not in config.eval:
    raise ValueError(
      f"length_factors={factors}; the task {config.task!r} is not evaluated at "
      "other lengths: leave it out"
    )
  config.eval.length_factors = factors
  setup.validate_fields(config)


def _written(workdir, name, config, results):
  """Writes the results of the run's own split to name.json, and returns them.

  Those of another split have a file of their own.
  """
  if results["split"] != config.data.eval_split:
    name = run_dir.folder_name(f"{name}_{results['split']}")
  path = pathlib.Path(workdir) / f"{name}.json"
  with metrics.saying_what_is_not_written():
    files.write_json(path, results)
    metrics.log(f"results: {path}")
  return results


def _define_flags():
  flags.DEFINE_string("split", None, "By default the run's own held-out one.")
  flags.DEFINE_enum(
    "eval",
    "metrics",
    ["metrics", "linear_probe", "finetune", "pictures"],
    "What to evaluate; see above.",
  )
  flags.DEFINE_list(
    "length_factors",
    None,
    "Evaluate at these multiples of the training length, for example 1,16.",
  )


def _refuse(given, *names):
  for name in names:
    if given[name].value is not None:
      raise ValueError(
        f"{given[name].serialize()}; has no effect with --eval={given.eval}: "
        "leave it out"
      )


def _factors(words):
  if words is None:
    return None
  if not all(word.isdecimal() for word in words):
    raise ValueError(
      f"--length_factors={','.join(words)}; must be whole numbers, for example "
      "1,16"
    )
  return [int(word) for word in words]


def _main(given):
  metrics.set_up_logs()
  where = (given.workdir, given.split, given.step, given.source)
  with cli.refusing("eval.py"):
    if given.eval != "metrics":
      _refuse(given, "length_factors")
    if given.eval == "pictures":
      paths = pictures(*where)
      metrics.log("pictures: " + ", ".join(map(str, paths)))
      return
    if given.eval == "finetune":
      _refuse(given, "split", "step", "source")
      results = finetune(given.workdir)
    elif given.eval == "linear_probe":
      results = linear_probe(*where)
    else:
      results = evaluate(*where, _factors(given.length_factors))
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
