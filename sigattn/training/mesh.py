"""Where arrays live: batches split over all devices, parameters on each."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make() -> Mesh:
  """One axis, data, over every device."""
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
  """All of an array on each device."""
  return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
  """The leading axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def put(tree: Any, mesh: Mesh) -> Any:
  """A process's NumPy share of a batch as one global array on the devices."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(batch(mesh), x), tree
  )
