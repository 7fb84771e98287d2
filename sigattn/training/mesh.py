"""The mesh of devices, and the part of each array that a device holds.

config.mesh names the sizes of four axes:

  data      splits the batch; every device has all parameters
  fsdp      also splits the batch, and the parameters, their gradients and the
            optimizer's state; a layer's parameters are fetched when it runs
            (1910.02054)
  tensor    splits heads and MLP channels (1909.08053)
  sequence  splits the tokens of a row, see sigattn.ring

The step is the same program on every mesh: jit derives the communication from
the shardings that this module gives to parameters, batches and attention.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.table
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sigattn import attention, ring
from sigattn.training import optim
from sigattn.validate import choice, whole

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = ("data", "fsdp")  # the axes that split a batch

# How parameters are split: the first pattern that matches the whole path of a
# parameter names the axes of the mesh for its last axes. A parameter that no
# pattern matches is replicated. The patterns cover most of a model's bytes.
# Small parameters, such as norms and biases, are cheaper to replicate.
PARAMETERS = (
  (r".*attn/(query|key|value)/kernel", ("fsdp", "tensor", None)),  # D, N, H
  (r".*attn/(query|key|value)/bias", ("tensor", None)),
  (r".*attn/out/kernel", ("tensor", None, "fsdp")),  # N, H, D
  (r".*attn/logit_bias", ("tensor",)),
  (r".*attn/forget_gate/kernel", ("fsdp", "tensor")),  # D, N
  (r".*attn/forget_gate/bias", ("tensor",)),
  (r".*mlp/(gate|up)/kernel", ("fsdp", "tensor")),  # D, F
  (r".*mlp/(gate|up)/bias", ("tensor",)),
  (r".*mlp/down/kernel", ("tensor", "fsdp")),  # F, D
  (r"embed", ("tensor", "fsdp")),  # V, D
  (r"head/kernel", ("fsdp", None)),  # D, V
)

_SIZE = whole(low=1, high=2**20)
FIELDS = {
  "mesh.data": whole(low=1, high=2**20, optional=True),
  "mesh.fsdp": whole(low=1, high=2**20, optional=True),
  "mesh.tensor": _SIZE,
  "mesh.sequence": _SIZE,
  "mesh.exchange": choice(ring.EXCHANGES),
}


def sizes(config: ConfigDict, devices: int) -> dict[str, int]:
  """The size of each axis, {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}.

  The axis of config.mesh that is None takes the devices that the others leave.
  devices: the number of devices. Raises ValueError if the sizes do not multiply
  to that number.
  """
  given = {name: config.mesh[name] for name in AXES}
  named = " x ".join(f"config.mesh.{k}={v}" for k, v in given.items())
  free = [name for name, size in given.items() if size is None]
  taken = math.prod(size for size in given.values() if size is not None)
  if len(free) > 1:
    raise ValueError(f"{named}; at most one of them may be None")
  if devices % taken or not (free or taken == devices):
    must = "divide" if free else "be"
    raise ValueError(
      f"{named}: {taken} devices; must {must} the {devices} that there are"
    )
  return given | dict.fromkeys(free, devices // taken)


def make(
  config: ConfigDict | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """The mesh of devices with the sizes of config.mesh.

  config: None for a mesh that only splits batches. devices: None for all
  devices. Raises ValueError if config.mesh does not fit the devices.
  """
  count = jax.device_count() if devices is None else len(devices)
  given = {"data": count} if config is None else sizes(config, count)
  return _mesh(given, devices)


def for_evaluation(config: ConfigDict) -> Mesh:
  """The mesh of config.mesh, or another one if that does not fit the devices.

  The other one splits batches and parameters over as many devices as divide
  config.batch_size, and heads and channels over the rest.
  """
  count = jax.device_count()
  with contextlib.suppress(ValueError):
    # The run may have been trained on another number of devices.
    return _mesh(sizes(config, count))
  fsdp = math.gcd(config.batch_size, count)
  return _mesh({"fsdp": fsdp, "tensor": count // fsdp})


def _mesh(given, devices=None):
  return jax.make_mesh(
    [given.get(name, 1) for name in AXES],
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices,
  )


# Rules of the config.


def _sizes_make_the_devices(config):
  sizes(config, jax.device_count())


def _processes_read_their_own_rows(config):
  mesh = config.mesh
  local, processes = jax.local_device_count(), jax.process_count()
  if processes > 1 and local % (mesh.tensor * mesh.sequence):
    raise ValueError(
      f"config.mesh.tensor={mesh.tensor} x config.mesh.sequence="
      f"{mesh.sequence}; must divide the {local} devices of each of the "
      f"{processes} processes, which read different rows"
    )


def _devices_share_a_batch(config):
  mesh = sizes(config, jax.device_count())
  devices = mesh["data"] * mesh["fsdp"]
  batch_size = config.batch_size // config.optim.accumulate
  if batch_size % devices:
    raise ValueError(
      f"config.batch_size={config.batch_size} in config.optim.accumulate="
      f"{config.optim.accumulate} parts; each part must be a multiple of the "
      f"{devices} devices of config.mesh.data x config.mesh.fsdp"
    )


def _blocks_of_keys_add_up(config):
  if config.mesh.sequence > 1 and config.attn.kind == "softmax":
    raise ValueError(
      f"config.mesh.sequence={config.mesh.sequence}; must be 1 with "
      "config.attn.kind='softmax', whose blocks of keys do not add up"
    )


def _heads_divide(config):
  """A single key head is right with any mesh, because all devices have it."""
  heads = config.model.num_heads
  kv_heads, tensor = config.attn.num_kv_heads or heads, config.mesh.tensor
  if heads % tensor or (kv_heads > 1 and kv_heads % tensor):
    raise ValueError(
      f"config.mesh.tensor={tensor}; must divide config.model.num_heads="
      f"{heads} and config.attn.num_kv_heads={config.attn.num_kv_heads}"
    )


RULES = (
  _sizes_make_the_devices,
  _processes_read_their_own_rows,
  _devices_share_a_batch,
  _blocks_of_keys_add_up,
  _heads_divide,
)


def validate_parameters(config: ConfigDict, params: Any) -> None:
  """Raises ValueError if an axis of the mesh does not divide a parameter.

  params: the parameters, or their shapes. The message names the axis of
  config.mesh and the parameter.
  """
  mesh = sizes(config, jax.device_count())
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = optim.path_name(path)
    for axis, over in enumerate(_axes(name, leaf.ndim)):
      length = leaf.shape[axis]
      if over and length > 1 and length % mesh[over]:
        raise ValueError(
          f"config.mesh.{over}={mesh[over]}; must divide {length}, axis {axis} "
          f"of the parameter {name} with the shape {leaf.shape}"
        )


# Shardings.


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that puts the whole array on each device."""
  return NamedSharding(mesh, PartitionSpec())


def batch(mesh: Mesh) -> NamedSharding:
  """The sharding that splits the leading axis over the axes of BATCH."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def put(tree: Any, mesh: Mesh) -> Any:
  """Makes global arrays on the devices from this process's share of a batch.

  tree: a pytree of NumPy arrays, whose leading axis is the process's share of
  the batch.
  """
  # This copy is intended, but with several processes JAX does not know that.
  with jax.transfer_guard("allow"):
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(batch(mesh), x), tree
    )


def largest(value: float, mesh: Mesh) -> Any:
  """The largest of the values that the processes give, on every device.

  All processes must call it. It does not wait for them: with several processes
  the result is an array that the devices compute later.
  """
  if jax.process_count() == 1:
    return value
  own = np.full(jax.local_device_count(), value, np.float32)
  split = NamedSharding(mesh, PartitionSpec(AXES))
  with jax.transfer_guard("allow"):
    values = jax.make_array_from_process_local_data(split, own)
  return _largest(replicated(mesh))(values)


@functools.cache
def _largest(sharding):
  return jax.jit(jnp.max, out_shardings=sharding)


def _axes(name, ndim):
  """The axis of the mesh, or None, for each axis of the parameter `name`."""
  for pattern, last in PARAMETERS:
    if re.fullmatch(pattern, name) and len(last) <= ndim:
      return (None,) * (ndim - len(last)) + last
  return (None,) * ndim


def _spec(mesh, shape, axes):
  """The PartitionSpec with those of the axes that divide the shape."""

  def fits(length, over):
    names = (over,) if isinstance(over, str) else over or ()
    size = math.prod(mesh.shape[name] for name in names)
    return over if size > 1 and length % size == 0 else None

  return PartitionSpec(*map(fits, shape, axes))


def parameters(params: Any, mesh: Mesh) -> Any:
  """The sharding of each parameter by its path, a tree like `params`.

  params: a nested dict of arrays or shapes. An axis that the mesh does not
  divide is not split. (For training validate_parameters refuses this, but a run
  may be evaluated on any number of devices.)
  """

  def sharding(path, x):
    axes = _axes(optim.path_name(path), len(x.shape))
    return NamedSharding(mesh, _spec(mesh, x.shape, axes))

  return jax.tree_util.tree_map_with_path(sharding, params)


def optimizer(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
  """The sharding of each array of the optimizer's state.

  An array that belongs to a parameter is split like it. All others, the counts
  of steps, are replicated.
  """
  return optax.tree.map_params(
    tx,
    lambda _, sharding: sharding,
    jax.eval_shape(tx.init, params),
    parameters(params, mesh),
    transform_non_params=lambda _: replicated(mesh),
  )


# Attention.


@functools.cache
def attention_fn(mesh: Mesh, exchange: str = "ring") -> Callable[..., Any]:
  """dot_product_attention for arrays that are split over a mesh.

  Batches are split over the axes of BATCH, and heads over tensor. If the axis
  sequence is larger than 1, every device has a part of the tokens, and
  ring_attention computes the result, in the order zigzag under a causal mask.
  Rows are padded if that axis does not divide their length.

  exchange: one of ring.EXCHANGES.
  """
  parts = mesh.shape["sequence"]

  def attend(query, key, value, bias=None, mask=None, **options):
    if parts > 1:
      if bias is not None or mask is not None:
        raise ValueError(
          f"config.mesh.sequence={parts}; must be 1 for a model that gives "
          "attention a mask or a bias of its own"
        )
      return _over_sequence(mesh, exchange, query, key, value, options)

    def split(x):
      spec = _spec(mesh, x.shape, (BATCH, None, "tensor", None))
      return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    arrays = map(split, (query, key, value))
    return split(
      attention.dot_product_attention(*arrays, bias, mask, **options)
    )

  return attend


# The axes of the arrays that an attention layer passes besides query, key and
# value.
_OPERANDS = {
  "logit_bias": ("tensor",),
  "alibi_slopes": ("tensor",),
  "query_seq_lengths": (BATCH,),
  "key_value_seq_lengths": (BATCH,),
  "query_segment_ids": (BATCH, "sequence"),
  "key_value_segment_ids": (BATCH, "sequence"),
  "query_logit_bias": (BATCH, "tensor", "sequence"),
  "key_logit_bias": (BATCH, "tensor", "sequence"),
}


def _over_sequence(mesh, exchange, query, key, value, options):
  length = query.shape[1]
  # With a window all devices have the same work already.
  balanced = options.get("is_causal") and not options.get("local_window_size")
  multiple = mesh.shape["sequence"] * (2 if balanced else 1)
  padding = -length % multiple
  operands = {
    name: jnp.asarray(options[name])
    for name in _OPERANDS
    if options.get(name) is not None and jnp.ndim(options[name])
  }
  options = {k: x for k, x in options.items() if k not in operands}
  if padding and "key_value_seq_lengths" not in operands:
    operands["key_value_seq_lengths"] = jnp.full(query.shape[:1], length)
  arrays = dict(query=query, key=key, value=value) | operands
  axes = dict.fromkeys(
    ("query", "key", "value"), (BATCH, "sequence", "tensor", None)
  ) | {name: _OPERANDS[name] for name in operands}
  split = {
    name: names.index("sequence")
    for name, names in axes.items()
    if "sequence" in names
  }
  for name, axis in split.items():
    pad = [(0, 0)] * arrays[name].ndim
    pad[axis] = 0, padding
    arrays[name] = jnp.pad(arrays[name], pad)

  def local(arrays):
    order = "contiguous"
    if balanced:
      order = "zigzag"
      arrays = arrays | {
        name: ring.zigzag(arrays[name], "sequence", axis=axis)
        for name, axis in split.items()
      }
    out = ring.ring_attention(
      **arrays, axis_name="sequence", exchange=exchange, order=order, **options
    )
    return ring.zigzag(out, "sequence", inverse=True) if balanced else out

  specs = {k: _spec(mesh, x.shape, axes[k]) for k, x in arrays.items()}
  out = jax.shard_map(
    local, mesh=mesh, in_specs=(specs,), out_specs=specs["query"]
  )(arrays)
  return out[:, :length]


# The memory of a device.


def bytes_a_device(tree: Any) -> int:
  """The bytes of the tree's arrays that one device holds.

  tree: arrays, or shapes with a sharding (jax.ShapeDtypeStruct).
  """
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def table(params: Any) -> rich.table.Table:
  """A table of how each parameter is split, and what a device holds of it.

  "1 fsdp, 2 tensor" means that these axes of the mesh split the axes 1 and 2 of
  the shape. "no rule" means that PARAMETERS has no pattern for the parameter.
  For a single device, which splits nothing, this column is left out.

  params: arrays, or shapes with a sharding.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  several = any(x.sharding.num_devices > 1 for _, x in leaves)
  table = rich.table.Table(
    rich.table.Column("parameter", overflow="fold"),
    "shape",
    *(["split over"] if several else []),
    rich.table.Column("MiB each" if several else "MiB", justify="right"),
    box=rich.box.SIMPLE_HEAD,
    padding=(0, 1, 0, 0),
  )
  for path, x in leaves:
    name = optim.path_name(path)
    table.add_row(
      name,
      "x".join(map(str, x.shape)),
      *([_split_over(name, x)] if several else []),
      f"{bytes_a_device(x) / 2**20:,.2f}",
    )
  table.add_section()
  total = sum(math.prod(x.shape) for _, x in leaves)
  held = f"{bytes_a_device(params) / 2**20:,.2f}"
  table.add_row("all", f"{total:,}", *([""] if several else []), held)
  return table


def _split_over(name, x):
  """How a parameter is split, as text: "1 fsdp, 2 tensor" by axis."""
  parts = [f"{i} {over}" for i, over in enumerate(x.sharding.spec) if over]
  if parts:
    return ", ".join(parts)
  known = any(_axes(name, len(x.shape)))
  return "replicated" if known else "replicated, no rule"


def describe(state: Sequence[Any], mesh: Mesh) -> str:
  """The sizes of the mesh, and the memory that a training state takes.

  state: has `params`, `opt_state` and `ema`.
  """
  shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  parts = {
    "parameters": state.params,
    "optimizer": state.opt_state,
    "average": state.ema,
    "gradients": state.params,
  }
  held = ", ".join(
    f"{name} {bytes_a_device(tree) / 2**20:,.1f}"
    for name, tree in parts.items()
    if tree is not None
  )
  if mesh.size == 1:
    return f"MiB on the device: {held}"
  return f"mesh {shape}; MiB that each device holds: {held}"
