"""Training on the meshes that train.py makes, on eight simulated devices.

test_mesh.py runs this in its own process, because the other tests have one
device. It prints the errors that it finds, or the numbers that test_mesh.py
compares.

  gradients SHAPES  checks that loss and gradients of each mesh equal those of
                    one device
  runs ONE EIGHT    evaluates and resumes the run in the folder ONE, which one
                    device has begun, and trains a run in the folder EIGHT
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np

from eval import evaluate
from sigattn import tasks
from sigattn.training import mesh, setup, step
from tests.training import small_mesh
from train import train


def one_step(config, devices):
  """(loss, gradients). Fails if the sharding of the state changes."""
  state, update = step.init(config, devices)
  batch = mesh.put(small_mesh.batch(config), devices)
  grads, _, new, metrics = jax.jit(update)(state, batch)
  for x, y in zip(*map(jax.tree.leaves, (state, new)), strict=True):
    if not x.sharding.is_equivalent_to(y.sharding, x.ndim):
      raise SystemExit(f"{x.sharding} has become {y.sharding}")
  return jax.device_get((metrics["loss"], grads))


def check_gradients(shape, **values):
  """Compares a mesh with one device.

  shape: the sizes of mesh.AXES, such as "2,1,2,2".
  """
  sizes = dict(zip(mesh.AXES, map(int, shape.split(",")), strict=True))
  alone = small_mesh.config(**values)
  config = small_mesh.config(
    **values, **{f"mesh.{axis}": size for axis, size in sizes.items()}
  )
  setup.validate_config(config)
  expected = one_step(alone, mesh.make(alone, jax.devices()[:1]))
  actual = one_step(config, mesh.make(config))
  for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    error = np.abs(x - y).max() / np.abs(y).max()
    if not error < 1e-5:
      raise SystemExit(f"{shape} {values}: {error} of the largest number")


def main(what, *words):
  if what == "gradients":
    for shape in words:
      check_gradients(shape)
    check_gradients(
      "1,2,1,4", **{"attn.normalize": True, "mesh.exchange": "all_gather"}
    )
    return
  one, eight = words
  tasks.eval_batches = small_mesh.few_eval_batches
  sizes = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.sequence": 2}
  evaluated = evaluate(one)["loss"]
  train(small_mesh.run(total_steps=2, **sizes), one)
  train(small_mesh.run(**sizes, **{"telemetry.every_steps": 1}), eight)
  print(evaluated)


if __name__ == "__main__":
  main(*sys.argv[1:])
