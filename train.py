"""Trains the task of a config.

  python train.py --config=configs/vit_sigmoid.py --config.attn.kind=softmax

or, in a notebook: `from train import train; state = train(config)`.
"""

import contextlib
import os
import pathlib
import signal
import sys
import time

if __name__ == "__main__":  # Ctrl-C during the imports ends it without a trace.
  signal.signal(signal.SIGINT, signal.SIG_DFL)

import jax
from absl import flags
from ml_collections import ConfigDict

from sigattn import cli, interrupt, tasks
from sigattn.analysis import report, telemetry
from sigattn.training import (
  checkpoint,
  evaluate,
  init_from,
  mesh,
  metrics,
  process,
  replay,
  run_dir,
  saved,
  step,
)
from sigattn.training.metrics import due
from sigattn.training.step import State


def train(
  config: ConfigDict, workdir: str | os.PathLike[str] | None = None
) -> State:
  """Trains until config.total_steps and returns the State.

  `setup.model(config, state.params)` is then the trained model. The same call
  on the same `workdir` resumes from its newest checkpoint; with None nothing
  is written. Ctrl-C or SIGTERM ends the run after the current step; its state
  is saved and returned. Raises ValueError for a bad config before any work
  starts; FloatingPointError if the loss or the gradient is not finite, unless
  config.optim.non_finite skips such steps; MemoryError if the run does not fit
  into the memory; and OSError if the folder can no longer be written.
  """
  if workdir is not None:
    run_dir.validate_writable(workdir)
  config = run_dir.validated(config, workdir)
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    folder = enter(run_dir.RunDir(workdir, config))
    enter(process.saying_what_to_lower(process.what_to_lower(config)))
    split, total = config.data.eval_split, config.total_steps
    data = enter(contextlib.closing(tasks.train_batches(config)))
    eval_batches = tasks.eval_batches(config, split)
    devices = mesh.make(config)
    state, update = step.init(config, devices)
    step_fn = step.jitted(update)
    evaluator = evaluate.evaluator(config, devices)
    measure = telemetry.make(
      config, lambda *args: update(*args)[:3], eval_batches, devices
    )
    # A run that cannot start fails before this line and leaves nothing behind.
    first = None
    if not saved.steps(workdir):
      first, state = next(data), init_from.start(config, state)
    folder.begin()

    checkpoints = enter(checkpoint.Checkpoints(workdir, config))
    state = checkpoints.restore(state, data)
    start = int(state.step)
    writer = enter(metrics.Writer(workdir, start, config.log.tensorboard))
    _describe(config, state, devices, workdir, start)
    unit = tasks.get(config.task).UNIT
    progress = enter(metrics.Progress(start, total, unit))
    log = metrics.StepLog(config, writer, progress, checkpoints.log_state())
    stop = enter(process.stop_signals())
    enter(process.ending_together())
    enter(jax.transfer_guard("disallow"))  # no copy to a device is implicit
    finished = run_dir.done(workdir, total)
    if not start and config.init_from is not None:
      # What the loaded parameters can do before they are trained.
      results = evaluator(step.evaluated(config, state), eval_batches)
      log.evaluation(0, split, results)

    for i in range(start, total + 1):
      last, stopping = i == total, stop.at(i)
      if i > start or (last and not finished):
        results = None
        if last or due(i, config.eval.every_steps):
          log.finish()
          params = step.evaluated(config, state)
          results = evaluator(params, eval_batches)
          log.evaluation(i, split, results)
        if (
          last
          or stopping
          or due(i, config.ckpt.every_steps)
          or checkpoints.is_best(results)
        ):
          log.finish()  # raises before a state that is not finite is saved
          checkpoints.save(i, state, data, results, log.state())
        if last:
          checkpoints.wait()  # a run without its checkpoint is not done
          run_dir.write_done(workdir, {"step": i, **results})
      if last or stopping:
        break
      if due(i, config.log.every_steps):
        checkpoints.raise_if_failed()
      clock = time.perf_counter()
      own_rows = next(data) if i or first is None else first
      late = time.perf_counter() - clock
      batch = mesh.put(own_rows, devices)
      if telemetry.is_due(config, i + 1):
        log.finish()
        writer.write(i + 1, telemetry.SPLIT, measure(state, batch))
      log.begin(batch)
      state, step_metrics = step_fn(state, batch)
      if i == start:
        jax.block_until_ready(step_metrics)
        metrics.log(
          f"the first step ended {process.age():.1f} s after the start"
        )
      step_metrics |= {"data_seconds": mesh.largest(late, devices)}
      log.step(i + 1, step_metrics, len(jax.tree.leaves(batch)[0]))

  if workdir is not None and not jax.process_index():
    report.finish(
      workdir, split, config.ckpt.best_metric, config.ckpt.best_mode
    )
  return state


def _describe(config, state, devices, workdir, start):
  metrics.log(mesh.table(state.params))
  metrics.log(mesh.describe(state, devices))
  kind = f"{'normalised ' * config.attn.normalize}{config.attn.kind}"
  metrics.log(
    f"{config.task} with {kind} attention: {config.total_steps} "
    f"steps of {config.batch_size} on {devices.size} x "
    f"{jax.devices()[0].device_kind}, {config.dtype}"
  )
  if start:
    metrics.log(f"resumed from step {start} in {workdir}")
  if start >= config.total_steps:
    metrics.log(
      f"config.total_steps={config.total_steps} and the run has done {start} "
      "updates, so nothing is trained; a greater number goes on from there"
    )


def _define_flags():
  flags.DEFINE_string(
    "workdir", None, "The folder of the run; by default one in runs/."
  )
  flags.DEFINE_integer(
    "replay", None, "Run this step of the run again, to find what is NaN.", 1
  )
  process.define_flags()
  flags.DEFINE_bool("debug", False, "Show where in the code an error arose.")


def _main(given):
  metrics.set_up_logs()
  config, flag = given.config, given["config"]
  workdir = given.workdir
  if workdir is None:
    workdir = run_dir.default(flag.config_filename, flag.override_values)
  process.use_most_of_the_gpu()
  with cli.refusing("train.py", given.debug):
    process.join(given.coordinator, given.processes, given.process)
    process.keep_freed_memory()
    if given.replay is not None:
      values = replay.replay(workdir, given.replay, config)
      for table in report.variants_tables({f"step {given.replay}": values}):
        metrics.log(table)
      return
    try:
      with interrupt.unwrapped():
        state = train(config, workdir)
    except KeyboardInterrupt:
      metrics.log(
        "stopped; the same command resumes the run"
        if (pathlib.Path(workdir) / "config.json").exists()
        else "stopped before the first step; nothing was written"
      )
      sys.exit(130)
  if int(state.step) < config.total_steps:
    metrics.log(
      f"the run has stopped after step {int(state.step)} and is saved; the "
      "same command resumes it"
    )
    sys.exit(130)


if __name__ == "__main__":
  cli.start(_main, _define_flags, ("config",))
