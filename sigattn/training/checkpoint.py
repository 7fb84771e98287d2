"""Saves and restores the training state with Orbax.

A run that was killed continues from its newest checkpoint exactly as if it had
not been interrupted. The checkpoint of a step has up to four items: `params`,
`ema` (the averaged parameters, if config.optim.ema_decay > 0), `train` (the
optimizer state and the step) and `data` (the state of the data iterator).
Evaluation restores only `ema`, or `params` where there is no average.
"""

import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from sigattn.data import loader
from sigattn.training import run_dir, setup
from sigattn.training.step import State


def _manager(workdir, config, read_only=False):
  ckpt = config.ckpt
  worst = math.inf if ckpt.best_mode == "min" else -math.inf

  def metric(metrics):  # steps without an evaluation count as the worst
    return metrics.get(ckpt.best_metric, worst)

  best = checkpoint_managers.BestN(
    get_metric_fn=metric,
    reverse=ckpt.best_mode == "min",
    n=1,
  )
  newest = checkpoint_managers.LatestN(ckpt.keep)
  options = ocp.CheckpointManagerOptions(
    preservation_policy=checkpoint_managers.AnyPreservationPolicy(
      [newest, best]
    ),
    best_fn=metric,  # used by best_step; the policy decides what is kept
    best_mode=ckpt.best_mode,
    read_only=read_only,
    create=not read_only,
  )
  folder = pathlib.Path(workdir).resolve() / "checkpoints"
  return ocp.CheckpointManager(folder, options=options)


def steps(workdir: str | os.PathLike[str] | None) -> list[int]:
  """The steps of which the run has a checkpoint, whole or not, in order.

  None for a `workdir` of None.
  """
  if workdir is None:
    return []
  folder = pathlib.Path(workdir) / "checkpoints"
  names = [x.name for x in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdecimal())


class Checkpoints:
  """Saves a run's training state in workdir/checkpoints and restores it.

  A context manager: on exit it waits until everything is on disk. If `workdir`
  is None, nothing is saved or restored.
  """

  def __init__(
    self, workdir: str | os.PathLike[str] | None, config: ConfigDict
  ):
    self._ckpt, self._workdir = config.ckpt, workdir
    self._manager = None if workdir is None else _manager(workdir, config)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    if self._manager is not None:
      self._manager.wait_until_finished()
      self._manager.close()

  def is_best(self, metrics: Mapping[str, float] | None) -> bool:
    """Whether `metrics` are better than those of every saved checkpoint.

    False for None. config.ckpt.best_metric and best_mode define "better".
    """
    if metrics is None or self._manager is None:
      return False
    best = self._manager.best_step()
    old = None if best is None else self._manager.metrics(best)
    if not old:
      return True
    name = self._ckpt.best_metric
    if self._ckpt.best_mode == "min":
      return metrics[name] < old[name]
    return metrics[name] > old[name]

  def save(
    self,
    step: int,
    state: State,
    data: Iterator[loader.Batch],
    metrics: Mapping[str, float] | None,
  ) -> None:
    """Starts to write a checkpoint; the writing continues in the background.

    Args:
      step: the number of updates done.
      state: the training state after them.
      data: the iterator of the training batches, whose state is saved.
      metrics: the evaluation at this step, by which the best checkpoint is
        chosen; None if there was none.
    """
    if self._manager is None:
      return
    items = {
      "params": ocp.args.StandardSave(state.params),
      "train": ocp.args.StandardSave(_train_item(state)),
      "data": grain.checkpoint.CheckpointSave(data),
    }
    if state.ema is not None:
      items["ema"] = ocp.args.StandardSave(state.ema)
    # Orbax warns at every save if the metrics are None.
    self._manager.save(
      step,
      args=ocp.args.Composite(**items),
      metrics=metrics or {},
      custom_metadata={"format": run_dir.FORMAT},
    )

  def restore(self, state: State, data: Iterator[loader.Batch]) -> State:
    """Returns the newest saved state and sets the iterator `data` to its place.

    Without a checkpoint it returns `state` and leaves `data` alone. Raises
    ValueError for a checkpoint of another version's format.
    """
    step = None if self._manager is None else self._manager.latest_step()
    if step is None:
      return state
    _validate_format(self._manager, step, self._workdir)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    items = {
      "params": ocp.args.StandardRestore(target.params),
      "train": ocp.args.StandardRestore(_train_item(target)),
      "data": grain.checkpoint.CheckpointRestore(data),
    }
    if state.ema is not None:
      items["ema"] = ocp.args.StandardRestore(target.ema)
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    return state._replace(
      params=restored["params"], ema=restored.get("ema"), **restored["train"]
    )


def _validate_format(manager, step, workdir):
  metadata = manager.metadata(step).custom_metadata or {}
  run_dir.validate_format(metadata.get("format", 1), workdir)


def _train_item(state):
  return {"step": state.step, "opt_state": state.opt_state}


def load(
  workdir: str | os.PathLike[str], step: int | str | None = None
) -> tuple[ConfigDict, Any, int]:
  """Restores a run for evaluation.

  Args:
    workdir: the folder of the run.
    step: the number of a saved step, "best", or None for the newest.

  Returns:
    (config, params, step). The parameters are the exponential average if
    config.optim.ema_decay > 0, otherwise those of the last update.

  Raises:
    ValueError: if there is no such run or no such step, or if the run is of
      another version's format.
  """
  config = run_dir.read_config(workdir)
  with _manager(workdir, config, read_only=True) as manager:
    steps = sorted(manager.all_steps())
    if not steps:
      raise ValueError(f"{workdir=}: holds no checkpoint yet")
    if step is None:
      step = steps[-1]
    elif step == "best":
      step = manager.best_step()
      if not manager.metrics(step):
        raise ValueError(
          f"step='best': none of the {steps=} in {workdir} was evaluated"
        )
    if step not in steps:
      raise ValueError(f"{step=}: {workdir} holds the steps {steps}")
    _validate_format(manager, step, workdir)
    params = jax.eval_shape(lambda: setup.init(config)[1])
    item = "ema" if config.optim.ema_decay else "params"
    restored = manager.restore(
      step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(params)})
    )
  return config, restored[item], step
