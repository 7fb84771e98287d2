"""Runs one step of a run again, to find where a number is not finite."""

import contextlib
import os
import traceback

import jax
from ml_collections import ConfigDict

from sigattn import tasks
from sigattn.data import kept_data
from sigattn.training import checkpoint, mesh, metrics, run_dir
from sigattn.training import step as training_step


def replay(
  workdir: str | os.PathLike[str],
  step: int,
  config: ConfigDict | None = None,
) -> dict[str, float]:
  """Runs a step of a run again, from the newest checkpoint before it.

  The steps in between run as they did, if the config is that of the command
  with which they ran: total_steps decides the learning rate, and may have
  changed since. The step itself runs under
  jax_debug_nans: if a result is NaN, JAX runs it again operation by operation.
  Nothing is written.

  Args:
    workdir: the folder of the run.
    step: the number of the update, from 1.
    config: one by which the run could go on; None for the last one that it had.

  Returns:
    The metrics of the step, and the norms of its gradient and of the parameters
    before it, by top-level module: "gradient/head", "parameters/head" and so
    on.

  Raises:
    ValueError: if there is no such run, if the config is none of it, or if the
      run has no such step.
    FloatingPointError: for the first operation whose result is NaN; it names
      the line of the code.
  """
  last = run_dir.load_config(workdir)
  if config is None:
    config = last
  else:
    config = run_dir.validated(config, workdir)
    run_dir.validate_resumable(workdir, config)
  total = max(last.total_steps, config.total_steps)
  if not 1 <= step <= total:
    raise ValueError(
      f"{step=}: the run in {workdir} has the steps 1 to {total}"
    )
  source = tasks.get(config.task).SOURCE
  if why := kept_data.difference(source, config, config, workdir):
    metrics.log(f"{why}. So the step may get another batch")
  devices = mesh.make(config)
  state, update = training_step.init(config, devices)
  with contextlib.closing(tasks.train_batches(config)) as data:
    state = checkpoint.restore_before(workdir, step, state, data)
    step_fn = training_step.jitted(update)
    for _ in range(int(state.step), step - 1):
      state, _ = step_fn(state, mesh.put(next(data), devices))
    batch = mesh.put(next(data), devices)
  # The state is not donated, because a step with a NaN runs twice.
  again = jax.jit(lambda *args: update(*args)[2:])
  try:
    with jax.debug_nans(True):
      values = jax.device_get(again(state, batch)[1])
  except FloatingPointError as error:
    # The first line is enough: JAX adds advice about turning debug_nans off.
    [first, *_] = str(error).splitlines()
    raise FloatingPointError(
      f"step {step}: {first.rstrip('.')}{_place(error)}"
    ) from error
  norms = values.pop("norms")
  for name, by_module in norms.items():
    values |= {f"{name}/{key}": norm for key, norm in by_module.items()}
  return {name: float(value) for name, value in values.items()}


def _place(error):
  """The place in this library's code where an error arose, as text."""
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if "site-packages" not in frame.filename and frame.filename != __file__
  ]
  if not frames:
    return ""
  frame = frames[-1]
  return f" in {frame.filename}:{frame.lineno}, {frame.name}: {frame.line}"
