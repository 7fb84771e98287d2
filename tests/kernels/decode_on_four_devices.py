"""Decoding on the mesh that train.py makes, with batch and heads split.

test_triton.py runs this in its own process with four simulated devices, because
the other tests have one. It checks contiguous keys and pages in two ways:

  shard_map  Triton's interpreter runs the decode kernel on each device's part.
  automatic  Plain JAX replaces the kernel. XLA's partitioning splits it, and
             moves nothing between devices.
"""

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
from ml_collections import ConfigDict

import sigattn
from sigattn.kernels import decoding, device, triton, xla
from sigattn.kernels.triton import decode, launch
from sigattn.training import mesh as meshes
from tests.kernels import cases, triton_interpreter

QUERY = PartitionSpec(meshes.BATCH, None, "tensor")
PAGES = PartitionSpec(None, None, "tensor")
ROWS, HEADS = PartitionSpec(meshes.BATCH), PartitionSpec("tensor")


def contiguous(implementation, query, key, value, bias, lengths):
  return sigattn.dot_product_attention(
    query, key, value, logit_bias=bias, is_causal=True, normalize=True,
    key_value_seq_lengths=lengths, query_offset=lengths - query.shape[1],
    implementation=implementation,
  )  # fmt: skip


def in_pages(implementation, query, key, value, bias, lengths, table):
  return sigattn.paged_attention(
    query, key, value, table, lengths, logit_bias=bias, normalize=True,
    implementation=implementation,
  )  # fmt: skip


def plain_decode(
  problem, precision, tile, query, key, value, operands, pages=None
):
  """Replaces decode.forward, for the part of one device."""
  del precision, tile
  if pages is not None:
    seen_BS = decoding.seen(problem, operands)
    key, value = (decoding.gather(x, pages, seen_BS) for x in (key, value))
  result = xla.reference(query, key, value, operands, problem)
  return result if problem.normalize else (result, None)


def check(name, attend, arrays, specs, mesh, is_manual):
  expected = attend("xla", *arrays)
  sharded = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip(arrays, specs, strict=True)
  ]

  def spread(*arrays):
    return attend("triton", *arrays)

  if is_manual:
    spread = jax.shard_map(spread, mesh=mesh, in_specs=specs, out_specs=QUERY)
  compiled = jax.jit(spread).lower(*sharded).compile()
  actual = compiled(*sharded)
  wrong = np.abs(np.asarray(actual) - expected).max()
  moved = re.findall("all-gather|all-to-all|permute", compiled.as_text())
  split = actual.sharding.is_equivalent_to(NamedSharding(mesh, QUERY), 4)
  if not (wrong < 1e-5 and split and not moved):
    raise SystemExit(f"{name}: {wrong}, {actual.sharding}, {moved}")


def check_all(is_manual):
  sizes = dict(data=2, fsdp=1, tensor=2, sequence=1)
  mesh = meshes.make(ConfigDict({"mesh": sizes}))
  (query, *pages, table, lengths), whole = cases.draw_paged([40, 64, 37, 5])
  rest = jnp.linspace(-4, -2, query.shape[2]), jnp.asarray(lengths)
  arrays = [query, *map(np.nan_to_num, whole), *rest]
  specs = QUERY, QUERY, QUERY, HEADS, ROWS
  check("contiguous", contiguous, arrays, specs, mesh, is_manual)
  arrays = [query, *map(np.nan_to_num, pages), *rest, table]
  specs = QUERY, PAGES, PAGES, HEADS, ROWS, ROWS
  check("in pages", in_pages, arrays, specs, mesh, is_manual)


if __name__ == "__main__":
  device.current = lambda: device.Device("NVIDIA H100", 90)
  launch.start, triton._PACKAGES = triton_interpreter.start, {}
  decode.LEAST_KEYS = 1
  decode.tile = lambda *_, **__: decode.Tile(16, 16, 2, 4, 2)
  check_all(is_manual=True)
  decode.forward = plain_decode
  jax.clear_caches()
  check_all(is_manual=False)
