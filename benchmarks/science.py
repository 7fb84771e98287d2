"""Trains the runs of the studies on one device, all runs of a setting at once.

  python -m benchmarks.science --studies=recall,controls --out=runs/science

A study is a config of configs/studies, some settings of it, and the forms of
attention to compare (benchmarks/forms.py). The runs of a setting and a form
differ only in seed and learning rate, so one program trains them all, with
jax.vmap over the parameters. They use the project's models, data, losses and
optimizer, and train as train.py does. One run with rows of 512 tokens or more
fills a GPU: the program computes such runs one after the other.

The learning rate of a form is the one with the lowest loss on the split
"validation", as a mean over the seeds. No run is trained on this split. The
reported numbers are those of the split "test", which influences no choice.

--workers processes share the device and take the settings from one queue, in
the order of the studies. After --seconds no setting is started, and those that
are running stop; the results list them as cut off. Each study writes
OUT/STUDY.json with the device, date, commit and command.
"""

import collections
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shlex
import sys
import time
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from benchmarks import forms
from benchmarks.attention import commit
from sigattn import attention, tasks
from sigattn.analysis import telemetry
from sigattn.training import files, optim, setup

EVERY = 50  # updates between two entries of a curve
_CHUNK = 2 * EVERY  # updates of one call
_LONG = 512  # runs whose rows have this many tokens or more are not batched


class Study(NamedTuple):
  """The runs that a study trains.

  title: the heading of its section in docs/science.md.
  config: the module of configs that has get_config and the sweeps.
  sweeps: their product are the settings, see sigattn.sweep.
  forms: names of forms.FORMS. lrs: the learning rates of each form.
  seconds: the expected time of the whole study on one H100.
  until: a training accuracy. A run ends early if all seeds of a learning rate
    have it over 100 updates. None: no run ends early.
  measures_far: whether far_share is measured.
  """

  title: str
  config: str
  sweeps: tuple[str, ...]
  forms: tuple[str, ...]
  lrs: tuple[float, ...]
  seconds: int
  until: float | None = None
  measures_far: bool = False


_MAIN = (
  "softmax", "sigmoid", "normalised, b = -log n", "normalised, b = 0",
)  # fmt: skip
_CONTROLS = (
  "capped rows, b = -log n", "capped rows, b = 0", "softmax1",
  "softmax, logits capped at log n", "softplus, normalised", "ReLU, normalised",
)  # fmt: skip
_SMALL_LRS = (5e-4, 1e-3, 2e-3)
_TEXT_LRS = (2.5e-3, 5e-3)

STUDIES = {
  "recall": Study(
    "Recall and selective copying",
    "studies.recall",
    ("task",),
    _MAIN,
    _SMALL_LRS,
    100,
    until=0.99,
  ),
  "controls": Study(
    "Recall of 16 pairs: the controls",
    "studies.recall",
    ("sixteen",),
    _CONTROLS,
    _SMALL_LRS,
    40,
    until=0.99,
  ),
  "recall_sizes": Study(
    "Recall of 4, 32 and 64 pairs",
    "studies.recall",
    ("size",),
    _MAIN,
    _SMALL_LRS,
    140,
    until=0.99,
  ),
  # In 6,000 updates no form learns 16 pairs among as many distractors.
  "noisy_recall": Study(
    "Recall among fewer distractors",
    "studies.recall",
    ("noisy",),
    _MAIN,
    _SMALL_LRS,
    60,
    until=0.99,
  ),
  "length": Study(
    "Texts longer than those of training",
    "studies.length",
    ("rope", "window"),
    (*_MAIN, "normalised, b = -10", "normalised, b = -14"),
    _TEXT_LRS,
    80,
    measures_far=True,
  ),
  "gap": Study(
    "The gap at long n, with ALiBi",
    "studies.hybrid_norm",
    ("gap",),
    (*_MAIN, "capped rows, b = 0"),
    _TEXT_LRS,
    130,
  ),
  "gap_positions": Study(
    "The gap with RoPE, without and with ALiBi",
    "studies.hybrid_norm",
    ("gap_positions",),
    _MAIN[:3],
    _TEXT_LRS,
    35,
  ),
  "text_controls": Study(
    "Text: the controls",
    "studies.hybrid_norm",
    ("gap_of_512",),
    _CONTROLS,
    _TEXT_LRS,
    25,
  ),
  # Tests whether a higher rate than those of the studies above is better.
  "rates": Study(
    "Text: higher learning rates",
    "studies.hybrid_norm",
    ("gap_of_512",),
    _MAIN,
    (*_TEXT_LRS, 1e-2, 2e-2),
    60,
  ),
  "default_language": Study(
    "The default language model", "lm", (), _MAIN, _TEXT_LRS, 25
  ),
  "default_vision": Study(
    "The default vision model", "vit", (), _MAIN, (1.5e-3, 3e-3, 6e-3), 40
  ),
  # Compared with the rows of `length` without a window.
  "layers": Study(
    "Forget gates, output gates and windows in every other layer",
    "studies.length",
    ("rope",),
    (*forms.LAYER_FORMS,),
    (5e-3,),
    45,
  ),
  "slopes": Study(
    "ALiBi with half of its slopes zero",
    "studies.length",
    ("alibi",),
    (*forms.SLOPE_FORMS,),
    (5e-3,),
    30,
  ),
}


class Job(NamedTuple):
  """A setting and a form. One program trains all of its runs.

  changes: {path in the study's config: its new value}. deadline: a value of
  time.time().
  """

  study: str
  changes: dict[str, Any]
  form: str
  deadline: float

  def config(self):
    """The validated config, with the first learning rate and seed."""
    study, config = STUDIES[self.study], _config(self.study)
    config.update_from_flattened_dict(
      self.changes | forms.FORMS[self.form].changes | {"optim.lr": study.lrs[0]}
    )
    if config.task in ("lm", "vit"):  # The synthetic tasks never end.
      config.data.train_split = "train_without_validation"
    if config.dtype == "float32":
      # As in all earlier studies; their rows are short.
      config.attn.implementation = "xla"
    setup.validate_config(config)
    return config


def _config(study):
  """The config of a study, unchanged."""
  module = importlib.import_module(f"configs.{STUDIES[study].config}")
  return module.get_config()


def jobs(study: str, deadline: float) -> list[Job]:
  """The jobs of a study: for each setting in order, one for each form."""
  _, config, sweeps, names, *_ = STUDIES[study]
  module = importlib.import_module(f"configs.{config}")
  settings = itertools.product(
    *(list(getattr(module, f"sweep_{name}")()) for name in sweeps)
  )
  return [
    Job(study, dict(collections.ChainMap(*parts[::-1])), name, deadline)
    for parts in settings
    for name in names
  ]


# Training.


def _built(config, form, rngs):
  """Builds the model of the config with the layers of the form."""
  return forms.extend(tasks.get(config.task).build(config, rngs), form, rngs)


def _model(config, form, params):
  """The callable model. Its layers use the form's attention function."""
  built = nnx.eval_shape(lambda: _built(config, form, nnx.Rngs(0)))
  model = nnx.merge(nnx.graphdef(built), params)
  if form.attend is not None:
    for _, module in nnx.iter_modules(model):
      if hasattr(module, "attention_fn"):
        module.attention_fn = form.attend
  return model


def _each(config, function):
  """Maps a function of one run over arrays whose first axis is the runs."""
  if config.data.get("length", 0) < _LONG:
    return jax.vmap(function)
  return lambda *args: jax.lax.map(lambda x: function(*x), args)


def _params(config, form, seed):
  model = _built(config, form, nnx.Rngs(jax.random.key(seed)))
  return nnx.to_pure_dict(nnx.state(model))


def _initial(config, form, tx, seed_R):
  """The parameters and the optimizer's state of each run."""

  @jax.jit
  @jax.vmap
  def make(seed):
    params = _params(config, form, seed)
    return params, tx.init(params)

  return make(seed_R)


def _updates(config, form, tx):
  """A jitted (state, batches, steps, seeds, factors) -> (state, metrics).

  The first two axes of batches and of metrics are updates and runs. factors:
  each run's learning rate, divided by config.optim.lr.
  """
  task = tasks.get(config.task)

  def loss(params, batch, rng):
    return task.loss(config, _model(config, form, params), batch, rng)

  def update(state, batch, seed, step, factor):
    params, opt_state = state
    rng = jax.random.fold_in(jax.random.key(seed), step)
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
      params, batch, rng
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    # An update, including the weight decay, is proportional to the learning
    # rate.
    updates = jax.tree.map(lambda x: factor * x, updates)
    names = ("loss", "accuracy")
    metrics = {name: metrics[name] for name in names if name in metrics}
    return (optax.apply_updates(params, updates), opt_state), metrics

  @functools.partial(jax.jit, donate_argnums=0)
  def updates(state, batches, steps, seed_R, factor_R):
    def one(state, x):
      batch, step = x
      step_R = jnp.full(len(seed_R), step)
      return _each(config, update)(state, batch, seed_R, step_R, factor_R)

    return jax.lax.scan(one, state, (batches, steps))

  return updates


def _batches(config, seeds, lrs, count):
  """Yields batches (updates, runs, ...) of `count` updates or fewer."""
  sources = []
  for seed in seeds:
    own = config.copy_and_resolve_references().unlock()
    own.seed = seed
    sources.append(tasks.train_batches(own))
  for start in range(0, config.total_steps, count):
    size = min(count, config.total_steps - start)
    columns = [[next(source) for _ in range(size)] for source in sources]
    runs = [rows for rows in columns for _ in range(lrs)]
    yield jax.tree.map(
      lambda *x: np.stack(x, axis=1),
      *[jax.tree.map(lambda *x: np.stack(x), *rows) for rows in runs],
    )


def train(
  job: Job, seeds: tuple[int, ...] = (0, 1, 2)
) -> tuple[Any, dict[str, np.ndarray]]:
  """Trains all runs of a job.

  Returns (params, {"loss", "accuracy"}). The first two axes of params are seeds
  and learning rates. Loss and accuracy are curves (updates / EVERY, seeds,
  learning rates). A curve is shorter than config.total_steps if the study's
  `until` ended it. Raises TimeoutError at the job's deadline.
  """
  study, config = STUDIES[job.study], job.config()
  lrs, form = study.lrs, forms.FORMS[job.form]
  tx = optim.make(
    config, jax.eval_shape(functools.partial(_params, config, form), 0)
  )
  seed_R = np.repeat(np.array(seeds, np.int32), len(lrs))
  factor_R = np.tile(np.array(lrs, np.float32) / config.optim.lr, len(seeds))
  state, update = _initial(config, form, tx, seed_R), _updates(config, form, tx)
  curves, done = [], 0
  for batches in _batches(config, seeds, len(lrs), _CHUNK):
    size = len(jax.tree.leaves(batches)[0])
    steps = np.arange(done, done + size, dtype=np.int32) + 1
    state, metrics = update(state, batches, steps, seed_R, factor_R)
    done += size
    curves.append(_curves(metrics, (-1, len(seeds), len(lrs))))
    if time.time() > job.deadline:
      raise TimeoutError(f"stopped at update {done} of {config.total_steps}")
    if _have_learnt(curves[-1], study.until):
      break
  curve = {
    name: np.concatenate([x[name] for x in curves]) for name in curves[0]
  }
  shape = len(seeds), len(lrs)
  params = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), state[0])
  return params, curve


def _curves(metrics, shape):
  """The means over EVERY updates of metrics (updates, runs)."""
  rows = {name: np.asarray(x) for name, x in metrics.items()}
  return {
    name: np.stack(
      [x[i : i + EVERY].mean(0) for i in range(0, len(x), EVERY)]
    ).reshape(shape)
    for name, x in rows.items()
  }


def _have_learnt(curves, until):
  """Whether all seeds of a learning rate had this accuracy over the chunk."""
  if until is None:
    return False
  return bool((curves["accuracy"].min((0, 1)) >= until).any())


# Evaluation.


def evaluate(config, form, params, split: str) -> dict[str, np.ndarray]:
  """{"loss", "accuracy"} on a split, one number for each run of params."""
  task = tasks.get(config.task)

  @jax.jit
  def sums(params, batch):
    def one(params):
      return task.evaluate(config, _model(config, form, params), batch)

    return _each(config, one)(params)

  total = None
  for batch in tasks.eval_batches(config, split):
    part = jax.device_get(sums(params, batch))
    total = part if total is None else jax.tree.map(np.add, total, part)
  return {
    name: total[name] / total["weight"]
    for name in ("loss", "accuracy")
    if name in total
  }


def far_share(config, params, near: int) -> np.ndarray:
  """The share of attention weight on keys more than `near` tokens away.

  It is the mean over the heads and over the queries that see such keys, in the
  first held-out row of `config`. The first axis of params is the runs.

  Returns an array (runs, layers).
  """
  batch = next(iter(tasks.eval_batches(config, config.data.eval_split)))

  def share(attn, query, key, value, *, real_BT, positions, streams, **options):
    del attn, value, real_BT, positions, streams
    weights_BNTS = attention.attention_weights(query, key, **options)[1]
    place = jnp.arange(query.shape[1])
    is_far_TS = place[:, None] - place >= near
    far_BNT = jnp.where(is_far_TS, weights_BNTS, 0).sum(-1)
    return (far_BNT / weights_BNTS.sum(-1))[..., near:].mean()

  def one(params):
    return telemetry.collect(config, params, batch, share)["stack"]

  return np.asarray(jax.jit(lambda params: jax.lax.map(one, params))(params))


def measure(job: Job) -> dict[str, Any]:
  """Trains and evaluates a job, and returns its entry for the JSON file."""
  study, config, form = STUDIES[job.study], job.config(), forms.FORMS[job.form]
  params, curve = train(job)
  shape = curve["loss"].shape[1:]
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), params)
  held_out = {
    split: {
      name: x.reshape(shape)
      for name, x in evaluate(config, form, flat, split).items()
    }
    for split in ("validation", "test")
  }
  mean_L = np.nan_to_num(held_out["validation"]["loss"], nan=np.inf).mean(0)
  chosen = int(mean_L.argmin())
  entry = {
    "lr": study.lrs[chosen],
    "updates": min(EVERY * len(curve["loss"]), config.total_steps),
    "test": {k: _round(x[:, chosen]) for k, x in held_out["test"].items()},
    "curve": {k: _round(x[:, :, chosen].T) for k, x in curve.items()},
    "all": {
      split: {k: _round(x.T) for k, x in metrics.items()}
      for split, metrics in held_out.items()
    },
  }
  if len(config.eval.get("length_factors", ())) > 1:
    own = jax.tree.map(lambda x: x[:, chosen], params)
    entry |= _at_other_lengths(config, form, own, study.measures_far)
  return entry


def _at_other_lengths(config, form, params, measures_far):
  """Losses on longer rows and the far keys' share, for each seed."""
  losses, shares = {}, {}
  variants = tasks.get(config.task).evaluation_variants(config)
  for variant in variants.values():
    length = variant.data.length
    result = evaluate(variant, form, params, "test")
    losses[length] = _round(result["loss"])
    if measures_far and length > config.data.length:
      shares[length] = _round(far_share(variant, params, config.data.length))
  return {"loss_at": losses} | ({"far_share": shares} if measures_far else {})


def _round(x):
  """Nested lists of numbers, rounded to five digits."""
  if np.ndim(x):
    return [_round(y) for y in x]
  return float(f"{float(x):.5g}")


# The queue.


def _run(job):
  """(job, its entry). It never raises, so that the other jobs continue."""
  if time.time() > job.deadline:
    return job, {"cut_off": "not begun"}
  begin = time.time()
  try:
    entry = measure(job)
  except TimeoutError as error:
    return job, {"cut_off": str(error)}
  except Exception:  # e.g. memory ran out
    return job, {"error": traceback.format_exc()[-2000:]}
  entry["seconds"] = round(time.time() - begin, 1)
  entry["device"] = jax.devices()[0].device_kind
  return job, entry


def _write(folder, study, done, command):
  """Writes OUT/STUDY.json."""
  order = [(job.changes, job.form) for job in jobs(study, 0.0)]
  rows = [
    {"setting": job.changes, "form": job.form} | entry
    for job, entry in sorted(
      done, key=lambda x: order.index((x[0].changes, x[0].form))
    )
  ]
  header = {
    "command": command,
    "commit": flags.FLAGS.commit or commit(),
    "date": time.strftime("%Y-%m-%d"),
    "jax": jax.__version__,
    "seeds": [0, 1, 2],
    "lrs": STUDIES[study].lrs,
    "curve_every_updates": EVERY,
    "metric": "loss" if _config(study).task == "lm" else "accuracy",
  }
  files.write_json(folder / f"{study}.json", header | {"rows": rows})


def main(argv) -> None:
  """Runs the studies that --studies names."""
  del argv
  given = flags.FLAGS
  folder = pathlib.Path(given.out)
  folder.mkdir(parents=True, exist_ok=True)
  for name in given.studies:
    if name not in STUDIES:
      raise app.UsageError(
        f"--studies: {name!r} is not a study; choose from {[*STUDIES]}"
      )
  share = f"{0.92 / given.workers:.3f}"
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
  begin = time.time()
  queue = [
    job for name in given.studies for job in jobs(name, begin + given.seconds)
  ]
  done = {name: [] for name in given.studies}
  command = shlex.join(["python", "-m", "benchmarks.science", *sys.argv[1:]])
  with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
    for job, entry in pool.imap_unordered(_run, queue):
      done[job.study].append((job, entry))
      _write(folder, job.study, done[job.study], command)
      short = {k: entry[k] for k in ("test", "cut_off", "error") if k in entry}
      place = f"{job.study} {json.dumps(job.changes)} {job.form}"
      print(
        f"{time.time() - begin:.0f} s: {place}: {json.dumps(short)} "
        f"({entry.get('seconds')} s)",
        flush=True,
      )


if __name__ == "__main__":
  flags.DEFINE_list("studies", None, "The studies to run, in this order.")
  flags.DEFINE_string("out", None, "The folder for the JSON files.")
  flags.DEFINE_string("commit", None, "Of the code, where there is no git.")
  flags.DEFINE_integer("workers", 8, "Processes that share the device.", 1)
  flags.DEFINE_float("seconds", 3600, "When to stop.")
  flags.mark_flags_as_required(["studies", "out"])
  app.run(main)
