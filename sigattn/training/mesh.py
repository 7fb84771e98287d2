"""Places arrays: batches are split over the devices, parameters replicated."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make() -> Mesh:
  """A mesh of all devices with a single axis, "data"."""
  return jax.make_mesh(
    (jax.device_count(),),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def _devices_share_a_batch(config):
  devices = jax.device_count()
  batch_size = config.batch_size // config.optim.accumulate
  if batch_size % devices:
    raise ValueError(
      f"config.batch_size={config.batch_size} in config.optim.accumulate="
      f"{config.optim.accumulate} parts; each part must be a multiple of the "
      f"{devices} devices"
    )


FIELDS = {}
RULES = (_devices_share_a_batch,)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that puts the whole array on each device."""
  return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
  """The sharding that splits the leading axis over the devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def put(tree: Any, mesh: Mesh) -> Any:
  """Makes global arrays on the devices from this process's share of a batch.

  tree: a pytree of NumPy arrays, whose leading axis is the process's share of
  the batch.
  """
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(batch(mesh), x), tree
  )
