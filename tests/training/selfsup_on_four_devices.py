"""Compares the first update of the named methods on four devices and on one.

tests/tasks/test_selfsup.py runs this in its own process, because the other
tests have one device. It prints the errors that it finds.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import numpy as np

from configs import byol_sigmoid, mae_sigmoid, simclr_sigmoid
from sigattn.training import mesh, step


def small(module):
  config = module.get_config("runlocal")
  config.model.depth = 1
  # SGD, because AdamW would divide by gradients that are nearly 0.
  config.optim.update(name="sgd", schedule="constant", lr=0.1, warmup_steps=0)
  return config


def one_update(config, devices):
  """({loss, feature_std}, gradients, the next average of the parameters)."""
  state, update = step.init(config, devices)
  if state.ema is not None:  # make the target differ from the model
    state = state._replace(ema=jax.tree.map(lambda x: 0.9 * x, state.ema))
  rng = np.random.default_rng(0)
  images = rng.integers(256, size=(config.batch_size, 28, 28, 1))
  batch = {"image": images.astype(np.uint8)}
  batch = mesh.put(batch, devices)
  grads, _, new, metrics = jax.jit(update)(state, batch)
  if state.ema is not None:
    check_target(config, *jax.device_get((state.ema, new)))
  values = {name: metrics[name] for name in ("loss", "feature_std")}
  return jax.device_get((values, grads, new.ema))


def check_target(config, old, new):
  """Checks that the next target is m * old + (1 - m) * parameters."""
  m = config.model.target_momentum  # of step 0
  expected = jax.tree.map(lambda t, p: m * t + (1 - m) * p, old, new.params)
  compare("target", new.ema, expected)


MODULES = {"simclr": simclr_sigmoid, "byol": byol_sigmoid, "mae": mae_sigmoid}


def main(*names):
  for name in names:
    config = small(MODULES[name])
    expected = one_update(config, mesh.make(config, jax.devices()[:1]))
    config.mesh.fsdp = 2  # `data` has the other two
    actual = one_update(config, mesh.make(config))
    for parts in zip(actual, expected, strict=True):
      compare(config.task, *parts)


def compare(task, actual, expected):
  """Checks that two trees of arrays are nearly equal.

  Batch statistics cancel shifts, so some gradients are 0 except for rounding.
  The error of such an array is relative to a tenth of the largest number in the
  tree.
  """
  leaves = [*map(jax.tree.leaves_with_path, (actual, expected))]
  largest = [np.abs(y).max() for _, y in leaves[1]]
  for (path, x), (_, y), own in zip(*leaves, largest, strict=True):
    error = np.abs(x - y).max() / max(own, 0.1 * max(largest))
    if not error < 1e-5:
      where = jax.tree_util.keystr(path)
      raise SystemExit(f"{task}{where}: {error} of the largest number")


if __name__ == "__main__":
  main(*sys.argv[1:])
