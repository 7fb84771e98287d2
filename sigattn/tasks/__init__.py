"""The tasks. A task defines a model, its loss and its metrics.

A task is a module of this folder with

  SOURCE                          the module that reads its examples, one of
                                  sigattn.data (see sigattn/data/loader.py)
  UNIT                            the unit of the progress bar, such as "images"
  METRICS                         names of the metrics by which the best
                                  checkpoint may be chosen
  FIELDS, RULES                   its part of the config, see sigattn.validate
  build(config, rngs)             returns the model, an nnx.Module whose state
                                  consists only of nnx.Param
  loss(config, model, batch, rng) returns the scalar loss and a dict of scalar
                                  metrics, one of which is "loss"
  evaluate(config, model, batch)  returns a dict of sums over the batch; one is
                                  "weight", the sum of batch["weight"], which is
                                  0 for padding

A task may also have

  KEEPS                           a module that keeps what a run needs besides
                                  its parameters in the run's folder, with the
                                  functions of sigattn.data.kept_tokenizer and
                                  kept_classes
  score(config, outputs)          returns the sums, if it takes strings or
                                  Python to compute them: evaluate then returns
                                  any arrays, and score gets them as NumPy
                                  arrays
  results(config, sums)           returns the metrics, given the sums over all
                                  batches as NumPy arrays; by default each sum
                                  is divided by "weight"
  evaluation_variants(config)     returns {name: config}, the further
                                  evaluations that eval.py runs
  real_tokens(config, batch)      returns bool (B, T), False for padding tokens
                                  that the attention layers do not know of
  tick_labels(config, batch)      returns a string for each token of a batch of
                                  one example; plots of attention show them
  patch_attention(config, weights_LNTS)
                                  returns how much attention each patch of an
                                  image receives, (L, N, rows, columns)
  represent(config, model, batch) returns features (B, D) of a batch, which a
                                  linear probe classifies; batches then have
                                  "target"
  reference(config)               returns batches of training examples, whose
                                  features `evaluate` gets as a fourth argument
  target_momentum(config)         returns an optax schedule m(step): the step
                                  then keeps m average + (1 - m) parameters, and
                                  `loss` gets the model of that average as a
                                  fifth argument
  drawings(config, model, batch)  returns rows of images (B, H, W, C) in [0, 1]
                                  for eval.py --eval=pictures; DRAWINGS has the
                                  name of each row
  ENCODER                         names of the encoder's parameters; a run may
                                  start from the encoder of another task that
                                  has the same names

To add a task, add its module here and its name to TASKS, and write a config
that begins with configs.common.base(). tests/tasks/test_adding_a_task.py has a
whole task and its config, in 90 lines.
"""

import importlib
import types
from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from sigattn.data import loader

TASKS = (
  "byol",
  "lm",
  "mae",
  "simclr",
  "speech",
  "synthetic",
  "vit",
)


_PARTS = (
  "SOURCE", "UNIT", "METRICS", "FIELDS", "RULES", "build", "loss", "evaluate",
)  # fmt: skip


def get(name: str) -> types.ModuleType:
  """Returns the module of a task.

  It is imported only now, so that other tasks do not need its dependencies.
  Raises ValueError for a module that lacks a part of a task.
  """
  module = importlib.import_module(f"sigattn.tasks.{name}")
  if missing := [x for x in _PARTS if not hasattr(module, x)]:
    raise ValueError(
      f"sigattn.tasks.{name} has no {', '.join(missing)}; the docstring of "
      "sigattn.tasks says what a task has"
    )
  return module


def train_batches(config: ConfigDict) -> Iterator[loader.Batch]:
  """Yields training batches without end; see loader.ExampleSource."""
  source = get(config.task).SOURCE
  split = source.open_source(config, config.data.train_split)
  return split.train_batches(config)


def eval_batches(config: ConfigDict, split: str) -> Iterable[loader.Batch]:
  """Returns the batches of a split, in order and with weights.

  The result can be iterated several times; see loader.ExampleSource. Raises
  ValueError for an unknown split.
  """
  source = get(config.task).SOURCE
  return source.open_source(config, split).eval_batches(config)
