"""The attention weights of one held-out example, as pictures.

  python -m sigattn attention_maps --workdir=runs/vit_sigmoid/default \\
    --example=3

An image is drawn under how much attention each patch gets, by layer and head;
of other examples the weights between their first tokens are drawn.
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
from sigattn.training import checkpoint, metrics


def maps(
  config: ConfigDict, params: Any, batch: loader.Batch
) -> dict[str, np.ndarray]:
  """The weights of every layer: {path of the stack: (L, B, N, T, S)}, NumPy."""

  @jax.jit
  def run(params, batch):
    return telemetry.collect(config, params, batch, _weights)

  return jax.device_get(run(params, batch))


def _weights(
  attn, query, key, value, *, real_BT, positions, streams, **options
):
  del value, real_BT, streams
  computed = attention.attention_weights(query, key, **options)
  return telemetry.apply_row_scale(attn, computed.weights_BNTS, positions)


def example(config: ConfigDict, index: int) -> loader.Batch:
  """Held-out example number `index`, from 0 on, as a batch of one.

  Raises ValueError where there are fewer.
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
    f"example={index}; {config.data.eval_split!r} has {index - remaining}, "
    "from 0 on"
  )


def draw(
  workdir: str | os.PathLike[str],
  index: int,
  step: int | str | None = None,
  tokens: int = 40,
) -> list[pathlib.Path]:
  """Draws the attention of a run on a held-out example; returns the paths.

  For an image that is one PNG: how much attention each patch gets, by layer and
  head. Otherwise it is a PNG for each layer, with the weights between the first
  `tokens` tokens. They lie in workdir/maps.
  step: as in checkpoint.load. Raises ValueError for what is not there.
  """
  config, params, step = checkpoint.load(workdir, step)
  task, batch = tasks.get(config.task), example(config, index)
  figures = {}
  for stack, weights_LBNTS in maps(config, params, batch).items():
    weights_LNTS = weights_LBNTS[:, 0]
    if hasattr(task, "patch_attention"):
      figures[stack] = plots.overlays(
        batch["image"][0], task.patch_attention(config, weights_LNTS)
      )
      continue
    tick_labels = task.tick_labels(config, batch)[:tokens]
    for layer, weights_NTS in enumerate(weights_LNTS):
      title = f"example {index}, step {step}, layer {layer}: query by key"
      figures[f"{stack}_layer{layer}"] = plots.matrices(
        weights_NTS, tick_labels, title
      )
  folder = pathlib.Path(workdir) / "maps"
  folder.mkdir(exist_ok=True)
  paths = []
  for name, figure in figures.items():
    name = name.replace("/", "_")
    paths.append(folder / f"example{index}_{name}.png")
    plots.save(figure, paths[-1], "png")
  return paths


def define_flags() -> None:
  """The flags of the command, besides the shared ones."""
  flags.DEFINE_integer("example", 0, "Number of a held-out example.")
  flags.DEFINE_integer("tokens", 40, "Of a text, so many are drawn.", 1)


def run(flag_values: flags.FlagValues) -> None:
  """Draws the example that the flags name, and prints the paths."""
  for path in draw(
    flag_values.workdir,
    flag_values.example,
    flag_values.step,
    flag_values.tokens,
  ):
    metrics.log(f"map: {path}")
