"""Saves and restores the training state with Orbax.

A run that was killed continues from its newest checkpoint exactly as if it had
not been interrupted. The checkpoint of a step has up to seven items: `params`,
`ema` (the averaged parameters, if config.optim.ema_decay > 0), `train` (the
optimizer state and the step), `data` (the state of the data iterator), `log`
(the metrics of the steps since the last line of metrics.jsonl), `metrics` (the
evaluation at the step) and `config` (a copy of config.json). Evaluation
restores only `ema`, or `params` where there is no average.

Checksums of all files are saved with a checkpoint. A damaged one is not used:
the newest whole one takes its place, and the log says so.
"""

import asyncio
import contextlib
import errno
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import grain.checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sigattn.data import loader
from sigattn.training import files, mesh, metrics, run_dir, saved, setup
from sigattn.training.step import State


class _Sealed(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """The folder of a step while it is written.

  Orbax gives it its final name when it is complete. Its checksums are written
  just before, so that no folder with a final name is without them.
  """

  async def finalize(self) -> None:
    # Without this, Orbax would now write the time into the metadata file.
    metadata, self._checkpoint_metadata_store = (
      self._checkpoint_metadata_store,
      None,
    )
    if metadata is not None:
      await asyncio.to_thread(metadata.wait_until_finished)
    await asyncio.to_thread(
      files.seal,
      self.get(),
      self.get_final().name,
      without=("commit_success.txt",),
    )
    await super().finalize()


class _Keep:
  """Which checkpoints Orbax keeps: the newest ones, and the best."""

  def __init__(self, newest: int) -> None:
    self._newest = newest
    self.best = None  # its step

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [x.step for x in checkpoints]
    kept = {*sorted(steps)[-self._newest :], self.best}
    return [step in kept for step in steps]


def _manager(workdir, keep=None):
  """Orbax's manager of the run's checkpoints; without `keep` it only reads."""
  run_dir.validate_path(workdir)
  options = ocp.CheckpointManagerOptions(
    preservation_policy=keep,
    best_fn=lambda metrics: 0.0,  # makes Orbax save the metrics
    # Orbax then reads no metadata and no metrics, which may be damaged.
    lightweight_initialize=True,
    temporary_path_class=_Sealed,
    # Otherwise Orbax waits for ten minutes, and does not say why, if the disk
    # has no room for a folder.
    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    # With 1, Orbax warns in read-only mode that it does not save.
    save_interval_steps=int(keep is not None),
    cleanup_tmp_directories=keep is not None,  # that a killed run left
    read_only=keep is None,
    create=keep is not None,
  )
  folder = pathlib.Path(workdir).resolve() / "checkpoints"
  if keep is not None:
    return ocp.CheckpointManager(folder, options=options)
  # Orbax warns that it only reads, which is what was asked for.
  verbosity = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    return ocp.CheckpointManager(folder, options=options)
  finally:
    absl_logging.set_verbosity(verbosity)


class Checkpoints:
  """Saves a run's training state in workdir/checkpoints and restores it.

  It is a context manager, which waits on exit until everything is on disk. If
  `workdir` is None, nothing is saved or restored.
  """

  def __init__(
    self, workdir: str | os.PathLike[str] | None, config: ConfigDict
  ) -> None:
    """Opens the folder and moves checkpoints aside that are damaged.

    Raises ValueError if the run has checkpoints and all are damaged.
    """
    self._workdir, self._config = workdir, config
    self._manager = self._newest = None
    if workdir is None:
      return
    self._newest = _newest_after_moving_damaged_ones(workdir)
    self._keep = _Keep(config.ckpt.keep)
    self._keep.best, self._best_value = _best(workdir, config)
    with self._naming_the_folder():
      self._manager = _manager(workdir, self._keep)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if self._manager is None:
      return
    try:
      self.wait()
      self._manager.close()
    except Exception as error:
      if kind is None:
        raise
      # Another error ends the run already.
      metrics.log(f"the last checkpoint was not written: {error}")

  def wait(self) -> None:
    """Waits until everything is on disk. Raises OSError if a write fails."""
    if self._manager is not None:
      with self._naming_the_folder():
        self._manager.wait_until_finished()

  def raise_if_failed(self) -> None:
    """Raises OSError if the last write has failed.

    It does not wait for a write that is still running.
    """
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def is_best(self, results: Mapping[str, float] | None) -> bool:
    """Whether `results` are better than those of every saved checkpoint.

    False for None. config.ckpt.best_metric and best_mode define "better".
    """
    if results is None or self._manager is None:
      return False
    value = results[self._config.ckpt.best_metric]
    return _is_better(value, self._best_value, self._config)

  def save(
    self,
    step: int,
    state: State,
    data: Iterator[loader.Batch],
    results: Mapping[str, float] | None,
    log: Mapping[str, Any],
  ) -> None:
    """Starts to write a checkpoint; the writing continues in the background.

    Args:
      step: the number of updates done.
      state: the training state after them.
      data: the iterator of the training batches, whose state is saved.
      results: the evaluation at this step, by which the best checkpoint is
        chosen; None if there was none.
      log: the state of the StepLog.

    Raises:
      OSError: if this checkpoint or the one before cannot be written.
    """
    if self._manager is None:
      return
    if self.is_best(results):
      self._keep.best = step
      self._best_value = results[self._config.ckpt.best_metric]
    items = {
      "params": ocp.args.StandardSave(state.params),
      "train": ocp.args.StandardSave(_train_item(state)),
      "data": grain.checkpoint.CheckpointSave(data),
      "log": ocp.args.JsonSave(dict(log)),
      "config": ocp.args.JsonSave(run_dir.contents(self._config)),
    }
    if state.ema is not None:
      items["ema"] = ocp.args.StandardSave(state.ema)
    with self._naming_the_folder():
      # Orbax would create the folder again if it was deleted during the run.
      os.stat(pathlib.Path(self._workdir) / "config.json")
      # Orbax warns at every save if the metrics are None.
      self._manager.save(
        step,
        args=ocp.args.Composite(**items),
        metrics=results or {},
        custom_metadata={"format": run_dir.FORMAT},
      )

  @contextlib.contextmanager
  def _naming_the_folder(self):
    """Turns an error of Orbax about the disk into an OSError with the path."""
    try:
      yield
    except Exception as error:
      code = _disk_error(error)
      if code is None:
        raise
      folder = pathlib.Path(self._workdir) / "checkpoints"
      raise OSError(code, os.strerror(code), str(folder)) from error

  def restore(self, state: State, data: Iterator[loader.Batch]) -> State:
    """Returns the newest saved state, and moves the iterator `data` to it.

    Without a checkpoint it returns `state` and leaves `data` alone. Raises
    ValueError for a checkpoint in the format of another version.
    """
    if self._newest is None:
      return state
    return _restore(self._manager, self._workdir, self._newest, state, data)

  def log_state(self) -> dict[str, Any] | None:
    """The state of the StepLog in the newest checkpoint; None without one."""
    if self._newest is None:
      return None
    return saved.log_state(self._workdir, self._newest)


def _restore(manager, workdir, step, state, data):
  _validate_format(step, workdir)
  target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  items = {
    "params": ocp.args.StandardRestore(target.params),
    "train": ocp.args.StandardRestore(_train_item(target)),
  }
  if state.ema is not None:
    items["ema"] = ocp.args.StandardRestore(target.ema)
  places = saved.folder(workdir, step) / "data"
  process = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
  if (places / process).exists():
    items["data"] = grain.checkpoint.CheckpointRestore(data)
  else:
    _go_to_place_of_others(data, places)
  restored = manager.restore(step, args=ocp.args.Composite(**items))
  return state._replace(
    params=restored["params"], ema=restored.get("ema"), **restored["train"]
  )


def _go_to_place_of_others(data, places):
  """Moves the iterator to the place that another number of processes saved.

  If examples have an order, there is one place, which all processes save.
  Streams of documents have one place for each process.
  """
  states = [
    json.loads(path.read_bytes())
    for path in sorted(places.glob("process_*.json"))
  ]
  if not states or any(state != states[0] for state in states):
    raise ValueError(
      f"{places}: {len(states)} processes read streams of documents, and "
      f"{jax.process_count()} cannot resume them; start {len(states)} processes"
    )
  data.set_state(states[0])
  data.start_prefetch()


def restore_before(
  workdir: str | os.PathLike[str],
  step: int,
  state: State,
  data: Iterator[loader.Batch],
) -> State:
  """Restores the newest whole checkpoint before a step; writes nothing.

  It acts like Checkpoints.restore. step: the number of an update.
  """
  for before in reversed(saved.steps(workdir)):
    if before < step and not saved.damage(workdir, before):
      with _manager(workdir) as manager:
        return _restore(manager, workdir, before, state, data)
  return state


def _train_item(state):
  return {"step": state.step, "opt_state": state.opt_state}


def _validate_format(step, workdir):
  # Orbax would also read the metrics, which may be damaged.
  metadata = saved.metadata(saved.folder(workdir, step))
  run_dir.validate_format(metadata.get("format", 1), workdir)


def _newest_after_moving_damaged_ones(workdir):
  """The newest whole step, or None; newer checkpoints are moved aside.

  They are moved because training will write those steps again. The first
  process does this and tells the others.
  """
  step, error = None, None
  if not jax.process_index():
    try:
      step, damaged = saved.newest_whole(workdir)
      for other, why in damaged.items():
        place = saved.move_aside(workdir, other)
        metrics.log(
          f"checkpoint {other} of {workdir} is damaged: {why}. It is now "
          f"{place}; the run goes on from step {step}"
        )
    except ValueError as caught:
      error = caught
  if jax.process_count() > 1:
    code = -2 if error else -1 if step is None else step
    code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
    step = None if code < 0 else code
    if code == -2 and error is None:
      error = ValueError(f"{workdir=}: all checkpoints are damaged")
  if error:
    raise error
  return step


# The best checkpoint.


def _is_better(value, best, config):
  """Whether a metric is better than the best; any is better than None."""
  if math.isnan(value):
    return False
  if best is None:
    return True
  return value < best if config.ckpt.best_mode == "min" else value > best


def _best(workdir, config):
  """(step, value) of the best evaluation of a checkpoint; (None, None)."""
  best = None, None
  for step in saved.steps(workdir):
    value = saved.results(workdir, step).get(config.ckpt.best_metric)
    if value is not None and _is_better(value, best[1], config):
      best = step, value
  return best


# Errors of the disk. Orbax reports them inside of other errors, some as text.
_DISK_ERRORS = (
  errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES,
  errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE,
)  # fmt: skip


def _disk_error(error):
  """The errno of the disk error that caused an exception; None if none did."""
  while error is not None:
    if isinstance(error, OSError) and error.errno is not None:
      return error.errno
    for code in _DISK_ERRORS:
      if os.strerror(code) in str(error):
        return code
    error = error.__cause__ or error.__context__
  return None


# Evaluation.


def load(
  workdir: str | os.PathLike[str],
  step: int | str | None = None,
  devices: jax.sharding.Mesh | None = None,
) -> tuple[ConfigDict, Any, int]:
  """Restores a run for evaluation, whatever mesh it was trained on.

  Args:
    workdir: the folder of the run.
    step: the number of a saved step, "best", or None for the newest step that
      is not damaged.
    devices: the mesh over which the parameters will be split, see
      mesh.parameters; None for this process's first device.

  Returns:
    (config, params, step). The parameters are the exponential average if
    config.optim.ema_decay > 0, otherwise those of the last update.

  Raises:
    ValueError: if there is no such run or no such step, if the step is damaged,
      or if the run is of another version's format.
  """
  config = run_dir.load_config(workdir)
  steps = saved.steps(workdir)
  if not steps:
    raise ValueError(f"{workdir=}: holds no checkpoint yet")
  if step is None:
    step, damaged = saved.newest_whole(workdir)
    for other, why in damaged.items():
      metrics.log(
        f"checkpoint {other} of {workdir} is damaged: {why}. Step {step} is "
        "used"
      )
  else:
    if step == "best":
      step, _ = _best(workdir, config)
      if step is None:
        raise ValueError(
          f"step='best': none of the {steps=} in {workdir} was evaluated"
        )
    if step not in steps:
      raise ValueError(f"{step=}: {workdir} holds the steps {steps}")
    if why := saved.damage(workdir, step):
      raise ValueError(
        f"{step=}: this checkpoint of {workdir} is damaged: {why}"
      )
  if steps[-1] < config.total_steps:
    absl_logging.warning(
      "the run in %s is not finished: it has done %d of %d steps",
      workdir, steps[-1], config.total_steps,
    )  # fmt: skip
  with _manager(workdir) as manager:
    _validate_format(step, workdir)
    params = setup.shapes(config)
    if devices is None:
      place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shardings = jax.tree.map(lambda _: place, params)
    else:
      shardings = mesh.parameters(params, devices)
    params = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding
      ),
      params,
      shardings,
    )
    item = "ema" if config.optim.ema_decay else "params"
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(params)})
    restored = manager.restore(step, args=args)
  return config, restored[item], step
