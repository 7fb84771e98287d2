"""Evaluates a run: restores its parameters, prints a table, writes JSON.

  python eval.py --workdir=runs/vit_sigmoid/default

or, in a notebook: `from eval import evaluate; evaluate(workdir)`. The numbers
are also written to eval.json in the run's folder, or to eval_SPLIT.json with
--split=SPLIT. --source=PLACE evaluates the run's data at another place, or
other data, whose numbers are written to eval_PLACE.json. If other texts have no
splits of their own, all of them are evaluated. --length_factors=1,16 evaluates
a language model, or one of the synthetic tasks, at 1 and 16 times the training
length. For runs that learn features of images there are also

  --eval=linear_probe   a linear classifier on frozen features
  --eval=finetune       supervised training from the run: configs/finetune.py
  --eval=pictures       features in two dimensions, and what the model draws
"""

import json
import os
import pathlib
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

if __name__ == "__main__":  # Ctrl-C during the imports ends it without a trace.
  signal.signal(signal.SIGINT, signal.SIG_DFL)

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import finetune as finetune_config
from sigattn import cli, tasks
from sigattn.analysis import features, report
from sigattn.data import kept_data
from sigattn.training import (
  checkpoint,
  files,
  mesh,
  metrics,
  probe,
  process,
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

  The dict is also written to workdir/eval.json, to eval_SPLIT.json for another
  split than that of the config, or to eval_SOURCE.json for other data. If the
  task has further evaluations, for example at other lengths, `variants` has the
  metrics of each by its name. If the folder is read-only, a message says so.

  split: a split of the data, by default config.data.eval_split. step: a number,
  "best", or None for the newest. source: where the evaluated data are, if they
  are not where the run read them; a message says so if they are other data,
  see run_dir.with_data. length_factors: in place of config.eval.length_factors.
  Raises ValueError if there is no such run, step, split or source, and for
  length_factors if the task has no other lengths.
  """
  run = _load(workdir, split, step, source)
  config = run.config
  if length_factors is not None:
    _set_lengths(config, tuple(length_factors))

  def measure(config):
    batches = tasks.eval_batches(config, run.split)
    return evaluation.evaluator(config, run.devices)(run.params, batches)

  results = run.what | measure(config)
  if variants := evaluation.variants(config):
    results["variants"] = {name: measure(x) for name, x in variants.items()}
  return _written(workdir, "eval" + run.suffix, results)


def linear_probe(
  workdir: str | os.PathLike[str],
  split: str | None = None,
  step: int | str | None = None,
  source: str | None = None,
) -> dict[str, Any]:
  """The accuracy of a linear classifier on a run's frozen features.

  It is also written to workdir/linear_probe.json, or to linear_probe_SPLIT.json
  or linear_probe_SOURCE.json as in `evaluate`. `random_encoder` is the same for
  the parameters with which the run started. Arguments and errors are those of
  `evaluate`; see sigattn.training.probe.
  """
  run = _load(workdir, split, step, source)
  config, split, devices = run.config, run.split, run.devices
  results = {
    **run.what,
    **probe.linear_probe(config, run.params, split, devices),
    "random_encoder": probe.random_encoder(config, split, devices),
  }
  return _written(workdir, "linear_probe" + run.suffix, results)


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

  Returns the paths, whose names end in the split or the source where the
  numbers of `evaluate` have a file of their own. Arguments and errors are those
  of `evaluate`.
  """
  run = _load(workdir, split, step, source)
  return features.draw(
    run.config, run.params, run.split, run.devices, workdir, run.suffix
  )


class _Run(NamedTuple):
  """A run that is evaluated.

  what: the step, the split and the source, with which the results begin.
  suffix: what the names of its files end in, "" for the run's own data.
  """

  config: ConfigDict
  params: Any
  split: str
  devices: jax.sharding.Mesh
  what: dict[str, int | str]
  suffix: str


def _load(workdir, split, step, source):
  saved = run_dir.load_config(workdir)
  config, is_other = run_dir.with_data(saved, workdir, source, split)
  devices = mesh.for_evaluation(config)
  _, params, step = checkpoint.load(workdir, step, devices)
  own = config.data.eval_split
  split = split or own
  what = {"step": step, "split": split}
  key = kept_data.evaluated_key(config, split)
  if name := kept_data.names(config).get(key):
    what["source"] = name
  others = [run_dir.place_name(source)] if is_other else []
  others += [split] * (split != own)
  suffix = "".join(f"_{x}" for x in others)
  return _Run(config, params, split, devices, what, suffix)


def _set_lengths(config, factors):
  if "length_factors" not in config.eval:
    raise ValueError(
      f"length_factors={factors}; the task {config.task!r} is not evaluated at "
      "other lengths: leave it out"
    )
  config.eval.length_factors = factors
  setup.validate_fields(config)


def _written(workdir, name, results):
  """Writes the results to a file of this name, and returns them."""
  path = pathlib.Path(workdir) / f"{run_dir.folder_name(name)}.json"
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
  advice = "evaluate on a device with more memory"
  if given.length_factors is not None:
    advice = "give smaller --length_factors"
  with cli.refusing("eval.py"), process.saying_what_to_lower(advice):
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
