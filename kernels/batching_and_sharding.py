"""vmap and sharding rules for the kernels.

JAX can neither batch nor split a kernel, although attention is the same for
every example and every group of heads. Therefore a vmapped axis is folded into
the batch. On a mesh that splits batch or heads, each device computes its part,
and nothing is gathered.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sigattn.kernels.problem import Operands, Problem

_NAMES = ("query", "key", "value")
# The axes of each argument. Axes of _FREE may have size 1, and then keep it.
_INPUTS = ("BTNH", "BSKH", "BSKH")
PAGED = ("BTNH", "PLKH", "PLKH")  # P pages of L keys
_OPERANDS = Operands(
  bias="BNTS", mask="BNTS", logit_bias="BN", alibi_slopes="BN",
  query_seq_lengths="B", key_value_seq_lengths="B", query_segment_ids="BT",
  key_value_segment_ids="BS", query_logit_bias="BNT", key_logit_bias="BNS",
  query_offset="B",
)  # fmt: skip
# The axes of the cotangent of the output, of numbers that belong to a row, and
# of the M pages of an example, by their number.
_EXTRA = {4: "BTNH", 3: "BTN", 2: "BM"}
_FREE = ("BNTS", "BN", "BNT", "BNS")


def over_devices(
  compute: Callable[..., tuple[jax.Array, ...]],
  outputs: Sequence[str],
  problem: Problem,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  *extra: jax.Array,
  inputs: Sequence[str] = _INPUTS,
) -> tuple[jax.Array, ...]:
  """compute(problem, query, ...) on the part that each device of a mesh holds.

  Args:
    compute: takes the other arguments, and works for any batch and heads.
    outputs: the axes of each result, such as "BTNH" or "BN". No result may be a
      sum over examples: compute one for each example, and add them outside.
    problem, query, key, value, operands: as in xla.attention.
    extra: (B, T, N, H) or (B, T, N): the cotangent of the output, for example;
      or a table of pages, (B, M).
    inputs: the axes of query, key and value; PAGED if these lie in pages.
  """
  arrays, tree = jax.tree.flatten((query, key, value, operands, *extra))
  given = [
    axes
    for axes, x in zip(_OPERANDS, operands, strict=True)
    if x is not None
  ]  # fmt: skip
  axes = [*inputs, *given, *(_EXTRA[x.ndim] for x in extra)]

  def local(*arrays):
    query, key, value, operands, *extra = jax.tree.unflatten(tree, arrays)
    of_device = query, key, value, operands
    results = compute(resized(problem, *of_device), *of_device, *extra)
    return tuple(varying(x, arrays) for x in results)

  if jax.sharding.get_abstract_mesh().manual_axes:
    return local(*arrays)  # A shard_map has split the arrays already.
  return _partitioned(local, problem, axes, outputs, arrays)(*arrays)


def resized(
  problem: Problem,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
) -> Problem:
  """The problem with the batch and heads of the arrays."""
  del value
  return dataclasses.replace(
    problem,
    batch=query.shape[0],
    num_heads=query.shape[2],
    num_kv_heads=key.shape[2],
    shapes=Operands(*(x if x is None else x.shape for x in operands)),
  )


# vmap.


def fold(
  name: str,
  x: jax.Array,
  axis: int | None,
  size: int,
  batch: int,
  whole: bool,
) -> jax.Array:
  """Folds a vmapped axis of x into its batch: (size batch, ...).

  Args:
    name: the name of the array, or its axes.
    x: (batch, ...), with or without a vmapped axis.
    axis: the vmapped axis, or None.
    size: the size of the vmapped axis.
    batch: the batch without the vmapped axis.
    whole: whether a batch of 1 that all share also becomes size batch.
  """
  if axis is not None:
    x = jnp.moveaxis(x, axis, 0)
  else:
    free = getattr(_OPERANDS, name, name) in _FREE
    if free and x.shape[0] == 1 and not whole:
      return x
    x = x[None]
  x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
  return x.reshape(size * batch, *x.shape[2:])


def unfold(x: jax.Array, size: int, batch: int, own: int) -> jax.Array:
  """Turns (size batch, ...) into (size, own, ...).

  own: the batch, or 1 for a sum over it.
  """
  x = x.reshape(size, batch, *x.shape[1:])
  return x if own == batch else x.sum(1, keepdims=True)


# shard_map.


def varying(x: jax.Array, arrays: Sequence[jax.Array]) -> jax.Array:
  """x, marked in a shard_map as varying over the devices if an array does."""
  names = frozenset().union(*(jax.typeof(a).mat.varying for a in arrays))
  names -= jax.typeof(x).mat.varying
  return jax.lax.pcast(x, tuple(names), to="varying") if names else x


def cotangent(grad: jax.Array, x: jax.Array) -> jax.Array:
  """grad with the shape and dtype of x; summed over devices that share x."""
  names = jax.typeof(grad).mat.varying - jax.typeof(x).mat.varying
  grad = jax.lax.psum(grad, tuple(names)) if names else grad
  return grad.reshape(x.shape).astype(x.dtype)


def operand_cotangent(
  grad: jax.Array | None, operand: jax.Array | None
) -> jax.Array | None:
  """The cotangent of an operand; None if there is no operand.

  grad: has the operand's shape, except that axes of size 1 are not summed yet.
  None means that nothing needs the gradient; the cotangent is then zeros.
  """
  if operand is None:
    return None
  if grad is None:
    return jnp.zeros_like(operand)
  axes = [axis for axis, n in enumerate(operand.shape) if n == 1]
  return cotangent(grad.sum(axes, keepdims=True), operand)


# Meshes.


def shards(
  query: jax.Array, key: jax.Array, value: jax.Array, operands: Operands
) -> tuple[Mesh, tuple, PartitionSpec] | None:
  """(mesh, specs of the arguments, spec of the output) of an explicit mesh.

  The axes of such a mesh are part of the types of arrays, and an operation that
  XLA cannot split is an error. None if query, key and value are not split.

  Raises:
    ValueError: if anything but batch and heads is split, or if query, key and
      value are split in different ways.
  """
  types = [jax.typeof(x).sharding for x in (query, key, value)]
  if not any(name for sharding in types for name in sharding.spec):
    return None
  batch, _, heads, _ = types[0].spec
  of_queries = PartitionSpec(batch, None, heads, None)
  # A group of query heads is on the same device as its key head. A single key
  # head is on all devices.
  of_keys = PartitionSpec(
    batch, None, heads if key.shape[2] > 1 else None, None
  )
  inputs = of_queries, of_keys, of_keys
  for name, sharding, spec in zip(_NAMES, types, inputs, strict=True):
    if sharding.spec != spec:
      raise ValueError(
        f"{name} is sharded as {sharding.spec}, not {spec}: only batch and"
        " heads may be split, and alike in query, key and value (jax.reshard)"
      )
  names = {"B": batch, "N": heads}

  def of_operand(axes, x):
    if x is None:
      return None
    parts = zip(axes, x.shape, strict=True)
    return PartitionSpec(
      *(names.get(axis) if n > 1 else None for axis, n in parts)
    )

  of_operands = Operands(*map(of_operand, _OPERANDS, operands))
  return types[0].mesh, (*inputs, of_operands), of_queries


def over_shards(
  attend: Callable[..., jax.Array], mesh: Any, in_specs: tuple, out_spec: Any
) -> Callable[..., jax.Array]:
  """attend(query, key, value, operands) on the part that each device holds.

  mesh, in_specs, out_spec: as shards returns them.
  """

  def move(x, spec):  # Operands are small, so they may come from any device.
    return jax.reshard(x, NamedSharding(mesh, spec))

  # Outside of a jit an abstract mesh has no devices.
  @jax.jit
  def spread(query, key, value, operands):
    operands = jax.tree.map(move, operands, in_specs[-1])
    return jax.shard_map(
      attend, mesh=mesh, in_specs=in_specs, out_specs=out_spec
    )(query, key, value, operands)

  return spread


def _partitioned(local, problem, axes, outputs, arrays):
  """`local` on the part of batch and heads that each device holds."""

  def shardings(mesh, spec, arrays, axes):
    batch, _, heads, _ = (*spec, *[None] * (4 - len(spec)))
    if problem.num_kv_heads % _size(mesh, heads):
      heads = None  # A group of query heads needs its key head on its device.
    names = {"B": batch, "N": heads, "K": heads}

    def one(x, axes):
      parts = zip(axes, x.shape, strict=True)
      parts = [None if n == 1 else names.get(axis) for axis, n in parts]
      return NamedSharding(mesh, PartitionSpec(*parts))

    return tuple(map(one, arrays, axes))

  def partition(mesh, arrays, results):
    spec = arrays[0].sharding.spec
    return (
      mesh,
      local,
      shardings(mesh, spec, results, outputs),
      shardings(mesh, spec, arrays, axes),
    )

  call = custom_partitioning(local)
  call.def_partition(
    partition=partition, **_rule(problem, axes, outputs, arrays)
  )
  return call


def _rule(problem, axes, outputs, arrays):
  """The sharding rule in Shardy's notation: only batch and key heads are split.

  For example: b t (k g) h, b s k h, b s k h -> b t (k g) h.
  """
  group = problem.num_heads // problem.num_kv_heads
  heads = "k"
  if group > 1:
    heads = "(k g)" if problem.num_kv_heads > 1 else "g"
  words = {"B": "b", "N": heads}

  def one(index, axes, shape=None):
    # An axis of size 1 that is broadcast is related to no other.
    shape = shape if axes in _FREE and shape else [0] * len(axes)
    return " ".join(
      f"{axis.lower()}{index}" if n == 1 else words.get(axis, axis.lower())
      for axis, n in zip(axes, shape, strict=True)
    )

  left = [
    one(i, a, x.shape)
    for i, (a, x) in enumerate(zip(axes, arrays, strict=True))
  ]
  right = [one("", a) for a in outputs]
  # The letters must be in the order of their first appearance.
  order = dict.fromkeys("".join(axes).replace("N", "G"))
  whole = [x.lower() for x in order if x not in "BK" and (x, group) != ("G", 1)]
  return dict(
    sharding_rule=f"{', '.join(left)} -> {', '.join(right)}",
    need_replication_factors=tuple(whole),
    **({"g": group} if heads == "(k g)" else {}),
  )


def _size(mesh, names):
  """The number of parts into which the axes of a mesh split an array."""
  names = (names,) if isinstance(names, str) else names or ()
  return math.prod(mesh.shape[name] for name in names)
