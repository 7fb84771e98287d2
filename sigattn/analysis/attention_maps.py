"""Draws the attention weights of one held-out example.

  python -m sigattn attention_maps --workdir=runs/vit_sigmoid/default \\
    --example=3

For an image, the attention that each patch receives is drawn over it, for every
layer and head. For other examples, the matrix of weights between the first
tokens is drawn.
"""

import os
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from sigattn import attention, tasks
from sigattn.analysis import plots, telemetry
from sigattn.data import loader
from sigattn.training import checkpoint, metrics, run_dir


def maps(
  config: ConfigDict, params: Any, batch: loader.Batch
) -> dict[str, np.ndarray]:
  """The attention weights of every layer and head.

  Returns {path of the stack: float32 (L, B, N, T, S)}: the numbers by which the
  layers multiply their values, including row scaling.
  """

  @jax.jit
  def run(params, batch):
    return telemetry.collect(config, params, batch, _weights)

  return jax.device_get(run(params, batch))


def _weights(
  attn, query, key, value, *, real_BT, positions, streams, **options
):
  """The weights that one layer applies; see `measure` in telemetry.collect."""
  del value, real_BT, streams
  computed = attention.attention_weights(query, key, **options)
  return telemetry.apply_row_scale(attn, computed.weights_BNTS, positions)


def example(config: ConfigDict, index: int) -> loader.Batch:
  """The held-out example number `index`, counted from 0, as a batch of one.

  Raises ValueError if config.data.eval_split has fewer examples.
  """
  config = config.copy_and_resolve_references().unlock()
  config.batch_size = 1
  remaining = index
  for batch in tasks.eval_batches(config, config.data.eval_split):
    rows = np.flatnonzero(batch["weight"])
    if 0 <= remaining < len(rows):
      row = rows[remaining]
      return {name: x[row : row + 1] for name, x in batch.items()}
    remaining -= len(rows)
  raise ValueError(
    f"example={index}; {config.data.eval_split!r} has {index - remaining} "
    "examples, counted from 0"
  )


def draw(
  workdir: str | os.PathLike[str],
  index: int,
  step: int | str | None = None,
  tokens: int = 40,
  source: str | None = None,
) -> list[pathlib.Path]:
  """Draws the attention of a run on a held-out example into workdir/maps.

  For an image it draws one PNG per stack: the attention that each patch
  receives, by layer and head. Otherwise it draws one PNG per layer, with the
  weights between the first `tokens` tokens.

  Args:
    workdir: the folder of the run.
    index: the number of the example, from 0.
    step: a number, "best", or None for the newest.
    tokens: the number of tokens to draw, except for images.
    source: where the held-out data are, see run_dir.with_data. The names of
      the files of other data end in it.

  Returns:
    The paths of the PNG files.

  Raises:
    ValueError: if there is no such run, step, example or source.
  """
  saved = run_dir.load_config(workdir)
  config, is_other = run_dir.with_data(saved, workdir, source)
  # The run's own data keep their pictures.
  place = f"_{run_dir.place_name(source)}" if is_other else ""
  _, params, step = checkpoint.load(workdir, step)
  task, batch = tasks.get(config.task), example(config, index)
  figures = {}
  for stack, weights_LBNTS in maps(config, params, batch).items():
    weights_LNTS = weights_LBNTS[:, 0]
    if hasattr(task, "patch_attention"):
      figures[stack] = plots.overlays(
        batch["image"][0], task.patch_attention(config, weights_LNTS)
      )
      continue
    tick_labels = task.tick_labels(config, batch)
    part = (
      f", the first {tokens} of {len(tick_labels)} tokens"
      if tokens < len(tick_labels)
      else ""
    )
    for layer, weights_NTS in enumerate(weights_LNTS):
      title = f"example {index}, step {step}, layer {layer}: query by key{part}"
      figures[f"{stack}_layer{layer}"] = plots.matrices(
        weights_NTS, tick_labels[:tokens], title
      )
  folder = pathlib.Path(workdir) / "maps"
  folder.mkdir(exist_ok=True)
  paths = []
  for name, figure in figures.items():
    name = f"example{index}_{name.replace('/', '_')}{place}"
    paths.append(folder / f"{run_dir.folder_name(name)}.png")
    plots.save(figure, paths[-1], "png")
  return paths


def define_flags() -> None:
  """Defines the flags of the command, except shared ones."""
  flags.DEFINE_integer("example", 0, "Number of the held-out example, from 0.")
  flags.DEFINE_integer(
    "tokens", 40, "Number of tokens to draw, except for images.", 1
  )


def run(flag_values: flags.FlagValues) -> None:
  """Draws the example and prints the paths of the files."""
  for path in draw(
    flag_values.workdir,
    flag_values.example,
    flag_values.step,
    flag_values.tokens,
    flag_values.source,
  ):
    metrics.log(f"map: {path}")
