"""Checkpoints by Orbax: all that a killed run needs to go on as if it had not.

A step's checkpoint holds four items: `params`, `ema` (the averaged parameters,
where the config asks for them), `train` (optimizer and step) and `data` (the
place of the data iterator). Evaluation restores one of the first two alone.
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

  def metric(metrics):  # a step that was not evaluated has none
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
    best_fn=metric,  # for best_step; the policy decides what is kept
    best_mode=ckpt.best_mode,
    read_only=read_only,
    create=not read_only,
  )
  folder = pathlib.Path(workdir).resolve() / "checkpoints"
  return ocp.CheckpointManager(folder, options=options)


class Checkpoints:
  """A run's training state in `workdir`/checkpoints; with None it keeps none.

  A context manager: leaving it waits until everything is on disk.
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
    """Whether `metrics` beat those of every checkpoint; None never does."""
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
    """Starts to write; `metrics` (or None) decide which one is the best."""
    if self._manager is None:
      return
    items = {
      "params": ocp.args.StandardSave(state.params),
      "train": ocp.args.StandardSave(_train_item(state)),
      "data": grain.checkpoint.CheckpointSave(data),
    }
    if state.ema is not None:
      items["ema"] = ocp.args.StandardSave(state.ema)
    # Not None, of which Orbax warns each time.
    self._manager.save(
      step,
      args=ocp.args.Composite(**items),
      metrics=metrics or {},
      custom_metadata={"format": run_dir.FORMAT},
    )

  def restore(self, state: State, data: Iterator[loader.Batch]) -> State:
    """The newest state, or `state` itself where there is none; sets `data`."""
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
  """The config and the evaluation parameters of a run: (config, params, step).

  step: a number, "best", or None for the newest. The parameters are the
  average where the run kept one. Raises ValueError where there is no such run
  or no such step.
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
        raise ValueError(f"step='best': {workdir} was evaluated at no {steps=}")
    if step not in steps:
      raise ValueError(f"{step=}: {workdir} holds the steps {steps}")
    _validate_format(manager, step, workdir)
    params = jax.eval_shape(lambda: setup.init(config)[1])
    item = "ema" if config.optim.ema_decay else "params"
    restored = manager.restore(
      step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(params)})
    )
  return config, restored[item], step
