"""Attention on meshes, with plain JAX instead of Triton's kernels.

test_triton.py runs this in its own process with four simulated devices, because
the other tests have one. It prints the errors that it finds.
"""

import dataclasses
import functools
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sigattn import attention
from sigattn.kernels import (
  batching_and_sharding,
  device,
  numerics,
  triton,
  xla,
)
from sigattn.kernels.problem import Operands


def forward(precision, problem, query, key, value, operands):
  del precision
  result = xla.reference(query, key, value, operands, problem)
  return result if problem.normalize else (result,)


def backward(
  precision, wanted, problem, query, key, value, operands, d_out, *rows
):
  """Like the kernels, it does not sum operands' gradients over examples."""
  del precision
  heads = problem.batch, problem.num_heads
  operands = operands._replace(
    alibi_slopes=jnp.broadcast_to(operands.alibi_slopes, heads),
    query_logit_bias=jnp.broadcast_to(
      operands.query_logit_bias, (*heads, problem.query_len)
    ),
    key_logit_bias=jnp.broadcast_to(
      operands.key_logit_bias, (*heads, problem.key_len)
    ),
  )
  arrays = jax.tree.map(
    lambda x: batching_and_sharding.varying(x, [query]),
    (query, key, value, operands),
  )
  shapes = Operands(*(x if x is None else x.shape for x in operands))
  problem = dataclasses.replace(problem, shapes=shapes, normalize=False)

  def plain(query, key, value, operands):
    _, p_BNTS, _ = xla.weights(query, key, operands, problem)
    out = xla.reference(query, key, value, operands, problem)
    return out, jnp.moveaxis(p_BNTS.sum(-1), 1, 2)

  (_, sums), pull_back = jax.vjp(plain, *arrays)
  d_sums = jnp.zeros_like(sums)
  if rows:
    inverse, shift = numerics.inverse_and_shift(*rows, d_out)
    d_out, d_sums = d_out * inverse[..., None], -shift
  *grads, d_operands = pull_back((d_out, d_sums))
  found = {
    "BNT": d_operands.query_logit_bias, "BNS": d_operands.key_logit_bias,
    "BN": d_operands.alibi_slopes,
  }  # fmt: skip
  return *grads, *(found[axes] for axes in wanted.axes)


def attend(
  implementation, query, key, value, bias, slopes, of_queries, of_keys, lengths,
  normalize=False,
):  # fmt: skip
  return attention.dot_product_attention(
    query, key, value, logit_bias=bias, alibi_slopes=slopes, is_causal=True,
    query_logit_bias=of_queries, key_logit_bias=of_keys,
    key_value_seq_lengths=lengths, query_offset=lengths // 3,
    implementation=implementation, normalize=normalize,
  )  # fmt: skip


def with_gradients(f, *arrays):
  out, pull_back = jax.vjp(lambda *x: f(*x, arrays[-1]), *arrays[:-1])
  return out, pull_back(jnp.cos(out))


def along(f, *arrays):
  """The derivative along all arrays except the last one."""
  primals = arrays[:-1]
  return jax.jvp(lambda *x: f(*x, arrays[-1]), primals, primals)


def check(name, actual, expected):
  for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    if not np.allclose(x, y, rtol=1e-5, atol=1e-5):
      raise SystemExit(f"{name}: {np.abs(x - y).max()}")


def check_meshes(kv_heads, normalize):
  rng = np.random.default_rng(0)
  keys = 4, 6, kv_heads, 8
  shapes = (4, 6, 4, 8), keys, keys, (4,), (4,), (4, 4, 6), (4, 1, 6)
  arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
  arrays.append(np.array([3, 6, 2, 5], np.int32))

  def by(name):
    return functools.partial(attend, name, normalize=normalize)

  ours = by("triton")
  expected = with_gradients(by("xla"), *arrays)
  tangents = along(by("xla"), *arrays)
  mesh = make_mesh(jax.sharding.AxisType.Auto)
  split = PartitionSpec("data", None, "model")
  heads, batch = PartitionSpec("model"), PartitionSpec("data")
  of_queries = PartitionSpec("data", "model")
  specs = split, split, split, heads, heads, of_queries, batch, batch
  sharded = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip(arrays, specs, strict=True)
  ]

  check_without_moving("automatic", ours, sharded, expected)
  check(
    "automatic, forward mode",
    jax.jit(functools.partial(along, ours))(*sharded), tangents,
  )  # fmt: skip

  manual = jax.shard_map(ours, mesh=mesh, in_specs=specs, out_specs=split)
  check(
    "shard_map",
    jax.jit(lambda *x: with_gradients(manual, *x))(*arrays),
    expected,
  )
  check(
    "shard_map, forward mode",
    jax.jit(lambda *x: along(manual, *x))(*arrays), tangents,
  )  # fmt: skip

  # In an explicit mesh, the types of query, key and value name its axes.
  mesh = make_mesh(jax.sharding.AxisType.Explicit)
  typed = jax.device_put(arrays[:3], NamedSharding(mesh, split))
  for name in "triton", "xla":
    check_without_moving(
      f"explicit, {name}", by(name),
      [*typed, *arrays[3:]], expected,
    )  # fmt: skip
    check(
      f"explicit, {name}, forward mode",
      jax.jit(functools.partial(along, by(name)))(*typed, *arrays[3:]),
      tangents,
    )


def make_mesh(axis_type):
  return jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def check_without_moving(name, attend, arrays, expected):
  jitted = jax.jit(functools.partial(with_gradients, attend))
  compiled = jitted.lower(*arrays).compile()
  check(name, compiled(*arrays), expected)
  moved = re.findall("all-gather|all-to-all|permute", compiled.as_text())
  if moved:
    raise SystemExit(f"{name}: {moved}")


if __name__ == "__main__":
  triton._forward, triton._backward = forward, backward
  triton._PACKAGES = {}
  device.current = lambda: device.Device("NVIDIA H100", 90)
  jax.config.update("jax_disable_most_optimizations", True)
  for normalize in (False, True):
    check_meshes(kv_heads=2, normalize=normalize)
