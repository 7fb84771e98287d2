"""The tasks: what to build, what to minimise, what to measure.

A task is a module of this folder with

  SOURCE                          where its examples come from, a module like
                                  those of sigattn.data (see data/loader.py)
  UNIT                            what the progress bar counts: "images"
  METRICS                         the metrics that may choose a checkpoint
  FIELDS, RULES                   its part of the config, see sigattn.validate
  build(config, rngs)             the model, an nnx.Module of nnx.Param alone
  loss(config, model, batch, rng) scalar loss and a dict of scalar metrics
  evaluate(config, model, batch)  a dict of sums over the batch, with "weight"

and may have

  score(config, outputs)          the sums, made of what evaluate returned where
                                  they take more than arrays: NumPy and strings
  results(config, sums)           metrics of the sums over all batches, NumPy
                                  arrays; by default each over the weight
  evaluation_variants(config)     {name: config} of what eval.py evaluates too
  real_tokens(config, batch)      bool (B, T): which of the tokens that attend
                                  are no padding, where attention does not know
  tick_labels(config, batch)      what to write beside the tokens that attend:
                                  strings, of a batch of one
  patch_attention(config, weights_LNTS)
                                  how much attention each patch of an image
                                  gets, (L, N, rows, columns)

To add a task, add its module here and its name to TASKS.
"""

import importlib
import types
from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from sigattn.data import loader

TASKS = (
  "lm",
  "speech",
  "synthetic",
  "vit",
)


def get(name: str) -> types.ModuleType:
  """The module of a task; imported when asked for, with what it alone needs."""
  return importlib.import_module(f"sigattn.tasks.{name}")


def train_batches(config: ConfigDict) -> Iterator[loader.Batch]:
  """Endless training batches of a config; see the source's train_batches."""
  source = get(config.task).SOURCE
  split = source.open_source(config, config.data.train_split)
  return split.train_batches(config)


def eval_batches(config: ConfigDict, split: str) -> Iterable[loader.Batch]:
  """The batches of a split, in order and with a `weight`, as often as iterated.

  Raises ValueError for an unknown split.
  """
  source = get(config.task).SOURCE
  return source.open_source(config, split).eval_batches(config)
