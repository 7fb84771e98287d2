"""Trains the task of a config.

  python train.py --config=configs/vit_sigmoid.py --config.attn.kind=softmax

or, in a notebook: `from train import train; state = train(config)`.
"""

import contextlib
import ctypes
import functools
import math
import signal
import sys
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from flax import nnx
from ml_collections import config_flags

from sigattn import (
  checkpoint,
  mesh,
  metrics,
  optim,
  report,
  tasks,
  telemetry,
  workdirs,
)
from sigattn.data import loader


class State(NamedTuple):
  """All that an update changes."""

  step: jax.Array  # int32 scalar: updates done
  params: Any  # nested dict of float32 arrays
  opt_state: Any
  ema: Any  # like params; None where config.optim.ema_decay is 0


def train(config, workdir=None):
  """Trains until config.total_steps and returns the State.

  `tasks.model(config, state.params)` is then the trained model. The same call
  on the same `workdir` resumes from its newest checkpoint; with None nothing
  is written. Ctrl-C or SIGTERM ends the run after the step at work, saved and
  returned. Raises ValueError for a bad config before any work starts, and
  FloatingPointError when the loss is no longer finite.
  """
  tasks.check(config)
  if workdir is not None:
    workdirs.prepare(workdir, config)
  task, split = tasks.TASKS[config.task], config.data.eval_split
  data = loader.train_iterator(config)
  eval_batches = loader.eval_batches(config, split)
  devices = mesh.make()
  static, tx, state = _init(config, devices)
  update = _make_update(config, task, static, tx)
  step_fn = _make_step(update)
  evaluate = tasks.evaluator(config, devices)
  measure = telemetry.make(
    config, lambda *args: update(*args)[:3], eval_batches, devices
  )

  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    checkpoints = enter(checkpoint.Checkpoints(workdir, config))
    state = checkpoints.restore(state, data)
    start, total = int(state.step), config.total_steps
    writer = enter(metrics.Writer(workdir, start, config.log.tensorboard))
    _describe(config, state.params, workdir, start)
    progress = enter(metrics.Progress(start, total, task.UNIT))
    log = _Log(config, writer, progress)
    stop = enter(_stop_signals())
    enter(jax.transfer_guard("disallow"))  # every copy to a device is meant
    finished = workdirs.done(workdir, total)
    compiled = set()  # shapes of a batch

    for step in range(start, total + 1):
      last, stopping = step == total, stop.is_set()
      if step > start or (last and not finished):
        results = None
        if last or _due(step, config.eval.every_steps):
          log.finish()
          results = evaluate(
            state.params if state.ema is None else state.ema, eval_batches
          )
          log.evaluation(step, split, results)
        if (
          last
          or stopping
          or _due(step, config.ckpt.every_steps)
          or checkpoints.is_best(results)
        ):
          log.finish()  # raises before a state that is not finite is saved
          checkpoints.save(step, state, data, results)
        if last:
          workdirs.write_done(workdir, {"step": step, **results})
      if last or stopping:
        break
      batch = mesh.put(next(data), devices)
      if telemetry.is_due(config, step + 1):
        log.finish()
        writer.write(step + 1, telemetry.SPLIT, measure(state, batch))
      shapes = tuple(x.shape for x in jax.tree.leaves(batch))
      if shapes not in compiled:
        compiled.add(shapes)
        log.finish()  # compiling is not time at work
      state, step_metrics = step_fn(state, batch)
      log.step(step + 1, step_metrics, len(jax.tree.leaves(batch)[0]))

  if workdir is not None:
    report.finish(
      workdir, split, config.ckpt.best_metric, config.ckpt.best_mode
    )
  return state


def _due(step, every):
  """Whether `step` is one of every `every`; 0 means never."""
  return every > 0 and step % every == 0


def _init(config, devices):
  """The model's static part, the optimizer and the first State."""
  static, params = tasks.init(config)
  tx = optim.make(config, params)

  @functools.partial(jax.jit, out_shardings=mesh.replicated(devices))
  def state(params):
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema_decay else None
    return State(jnp.zeros((), jnp.int32), params, tx.init(params), ema)

  return static, tx, state(params)


def _make_update(config, task, static, tx):
  """(state, batch) -> (gradients, what is added, new state, metrics)."""
  schedule = optim.schedule(config)
  decay = config.optim.ema_decay

  @functools.partial(jax.value_and_grad, has_aux=True)
  def gradients(params, batch, rng):
    return task.loss(config, nnx.merge(static, params), batch, rng)

  def update(state, batch):
    # 0 is the initialisation's.
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step + 1)
    (_, step_metrics), grads = _accumulate(
      gradients, state.params, batch, rng, config.optim.accumulate
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      ema = optim.average(ema, params, state.step, decay)
    step_metrics = step_metrics | {
      "lr": schedule(state.step),
      "grad_norm": optax.tree.norm(grads),
    }
    new = State(state.step + 1, params, opt_state, ema)
    return grads, updates, new, step_metrics

  return update


def _make_step(update):
  """(state, batch) -> (state, metrics), jitted, with the old state donated."""

  @functools.partial(jax.jit, donate_argnums=0)
  def step_fn(state, batch):
    return update(state, batch)[2:]

  return step_fn


def _accumulate(gradients, params, batch, rng, parts):
  """gradients(params, batch, rng), as a mean over `parts` micro-batches."""
  if parts == 1:
    return gradients(params, batch, rng)
  # Every parts-th example, so that each micro-batch lies on all the devices.
  batches = jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
  )

  def add(total, part):
    new = gradients(params, *part)
    return jax.tree.map(lambda t, x: t + x / parts, total, new), None

  xs = (batches, jax.random.split(rng, parts))
  shapes = jax.eval_shape(gradients, params, *jax.tree.map(lambda x: x[0], xs))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, xs)[0]


class _Log:
  """Writes the metrics of the step before, while the devices do the next."""

  def __init__(self, config, writer, progress):
    self._config, self._writer, self._progress = config, writer, progress
    self._mean = metrics.Mean()
    self._pending = None

  def step(self, step, step_metrics, examples):
    """A step of so many examples has been given to the devices."""
    self._fetch()
    self._pending = step, step_metrics, examples

  def _fetch(self):
    if self._pending is None:
      return
    step, values, examples = self._pending
    self._pending = None
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    if not math.isfinite(values["loss"]):
      raise FloatingPointError(
        f"loss={values['loss']} at step {step} "
        f"(grad_norm={values['grad_norm']:.3g}, lr={values['lr']:.3g}); "
        "the newest checkpoint is from before. A lower config.optim.lr, a "
        "smaller config.optim.clip_norm or config.attn.qk_norm=layernorm help"
      )
    self._mean.add(values)
    self._progress.step(step, values, examples)
    if _due(step, self._config.log.every_steps):
      means = self._mean.take()
      means["per_second"] = self._progress.rate()
      self._writer.write(step, "train", means)
      self._progress.line("train", means)

  def finish(self):
    """Waits for the step at work, and stops the clock."""
    self._fetch()
    self._progress.pause()

  def evaluation(self, step, split, results):
    self._writer.write(step, split, results)
    self._progress.line(split, results, stay=True)


@contextlib.contextmanager
def _stop_signals():
  """An event that the first Ctrl-C or SIGTERM sets; the second one kills."""
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  old = {}

  def handle(number, _):
    metrics.log("stopping after this step; once more to stop at once")
    stop.set()
    signal.signal(number, old[number])

  for number in (signal.SIGINT, signal.SIGTERM):
    old[number] = signal.signal(number, handle)
  try:
    yield stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def _keep_freed_memory():
  """Lets a CPU's step reuse the memory that the last one freed.

  By default glibc gives large buffers back to the kernel, which then clears
  page after page for the next step: 55 instead of 40 ms, with three layers and
  64 images a step on two cores (2026-11-23). So it does, whatever it was told,
  with those of any thread but the first that exceed 64 MiB: 100 instead of 64
  ms of a core, for the gradient of four layers of the acoustic model
  (2026-11-25). Called before JAX starts its threads.
  """
  # Steps then run, and allocate, in the thread that asks for them.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
  if jax.default_backend() == "cpu" and mallopt is not None:
    mallopt(-4, 0)  # M_MMAP_MAX: large buffers from the heap too
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def _describe(config, params, workdir, start):
  metrics.log(report.parameter_table(params))
  devices = jax.devices()
  metrics.log(
    f"{config.task} with {config.attn.kind} attention: {config.total_steps} "
    f"steps of {config.batch_size} on {len(devices)} x "
    f"{devices[0].device_kind}, {config.dtype}"
  )
  if start:
    metrics.log(f"resumed from step {start} in {workdir}")


def _main(argv):
  if argv[1:]:
    raise app.UsageError(f"not understood: {argv[1:]}")
  metrics.set_up_logs()
  config, flag = flags.FLAGS.config, flags.FLAGS["config"]
  workdir = flags.FLAGS.workdir or workdirs.default(
    flag.config_filename, flag.override_values
  )
  _keep_freed_memory()
  try:
    tasks.check(config)
    workdirs.prepare(workdir, config)
  except ValueError as error:
    sys.exit(f"train.py: {error}")
  state = train(config, workdir)
  if int(state.step) < config.total_steps:
    metrics.log("the same command goes on from here")
    sys.exit(130)


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "configs/vit_sigmoid.py, say.", lock_config=True
  )
  flags.DEFINE_string(
    "workdir", None, "Where the run is kept; by default below runs/."
  )
  flags.mark_flag_as_required("config")
  app.run(_main)
