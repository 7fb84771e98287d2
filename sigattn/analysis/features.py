"""Pictures of what a run has learned: its features, and what it draws."""

import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from sigattn import tasks
from sigattn.training import evaluate, mesh, run_dir, setup

_MOST_POINTS = 2000
_MOST_IMAGES = 12


def draw(
  config: ConfigDict,
  params: Any,
  split: str,
  devices: jax.sharding.Mesh,
  folder: str | os.PathLike[str],
  suffix: str = "",
) -> list[pathlib.Path]:
  """Writes features.png and, for a task that draws images, drawings.png.

  suffix: what is added to both names, before .png. features.png shows the first
  2,000 images of the split by the first two principal components of their
  features, in the colour of their class. drawings.png has a column for each of
  12 images. Returns the paths.

  Raises ValueError for a task without `represent`.
  """
  # Every start of eval.py would wait 0.5 s for matplotlib.
  from sigattn.analysis import plots

  task = tasks.get(config.task)
  batches = _first(tasks.eval_batches(config, split), _MOST_POINTS)
  data = jax.device_get(evaluate.represent(config, devices)(params, batches))
  real_M = data["weight"] > 0
  xy_M2, share_2 = principal_components(data["feature"][real_M])
  first, second = (
    f"principal component {i} ({share:.0%} of the variance)"
    for i, share in enumerate(share_2, 1)
  )
  paths = [
    pathlib.Path(folder) / f"{run_dir.folder_name(name + suffix)}.png"
    for name in ("features", "drawings")[: 1 + hasattr(task, "drawings")]
  ]
  plots.classes(xy_M2, data["target"][real_M], (first, second), paths[0])
  if hasattr(task, "drawings"):
    static = setup.graphdef(config, devices)
    drawn = jax.jit(
      lambda params, batch: task.drawings(
        config, nnx.merge(static, params), batch
      )
    )(params, mesh.put(batches[0], devices))
    rows = [x[:_MOST_IMAGES] for x in jax.device_get(drawn)]
    plots.image_rows(dict(zip(task.DRAWINGS, rows, strict=True)), paths[1])
  return paths


def _first(batches, examples):
  """The first batches that have at least this many examples together."""
  chosen = []
  for batch in batches:
    chosen.append(batch)
    examples -= len(batch["target"])
    if examples <= 0:
      break
  return chosen


def principal_components(
  feature_MD: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """The first two principal components (M, 2), and their shares (2,).

  A share is a component's part of the total variance. It is 0 if all features
  are the same.
  """
  centred_MD = feature_MD - feature_MD.mean(0)
  _, size_K, direction_KD = np.linalg.svd(centred_MD, full_matrices=False)
  share_K = size_K**2 / max((size_K**2).sum(), np.finfo(np.float32).tiny)
  return centred_MD @ direction_KD[:2].T, share_K[:2]
