"""Gradients by the Hopper kernels on the mesh that train.py makes.

test_mosaic.py runs this in its own process with four simulated devices, because
the other tests have one. The kernels add dq in global memory;
custom_partitioning must accept this. There are two checks:

  compile   XLA's partitioning accepts the real kernels at n = 1,024, also with
            normalised rows. The first error must be that a CPU cannot run them.
  run       Plain JAX replaces the kernels, and adds to the same Ref. The
            gradients equal those of the portable implementation, whether the
            batch or the sequence is split.
"""

import math
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import sigattn
from sigattn.kernels import device
from sigattn.kernels.mosaic import host, key_tiles, query_tiles, reduce
from sigattn.training import mesh as meshes
from tests.kernels import compare


def gradients(implementation, query, key, value, d_out, normalize=False):
  def attend(*arrays):
    return sigattn.dot_product_attention(
      *arrays, implementation=implementation, normalize=normalize
    )

  out, pull_back = jax.vjp(attend, query, key, value)
  return out, *pull_back(d_out)


def check_compile(mesh, normalize):
  shape = 4, 1024, 2, 64
  x = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=meshes.batch(mesh))
  lowered = (
    jax.jit(gradients, static_argnums=(0, 5))
    .trace("mosaic", x, x, x, x, normalize)
    .lower(lowering_platforms=("cuda",))
  )
  try:
    lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "No FFI handler registered for mosaic_gpu" not in str(error):
      raise


def launch_plain_jax(name, *_, automatic_barriers=True):
  """Replaces pipeline.launch: plain sigmoid attention in float32."""
  del name, automatic_barriers

  def forward(query, key, value):
    scale, bias = query.shape[-1] ** -0.5, -math.log(key.shape[1])
    z = scale * jnp.einsum("btnh,bsnh->bnts", query, key) + bias
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.sigmoid(z), value)

  def run(inputs):
    query, key, value = (
      inputs[name].astype("float32") for name in ("query", "key", "value")
    )
    if inputs["d_out"] is None:
      return [forward(query, key, value).astype("bfloat16")]
    _, pull_back = jax.vjp(forward, query, key, value)
    dq, dk, dv = pull_back(inputs["d_out"].astype("float32"))
    # The sums do not have the scale of the logits.
    dq = dq * query.shape[-1] ** 0.5
    dq_sums = inputs["dq_sums"]
    dq_sums[...] += jnp.moveaxis(dq, 1, 2).reshape(dq_sums.shape)
    return [dk.astype("bfloat16"), dv.astype("bfloat16")]

  return run


def in_rows_of_plain_jax(total, length, scale, dtype):
  """Replaces reduce.in_rows; the order of the sums is that of their rows."""
  batch, heads, tall, wide = total.shape[:4]
  total = total.reshape(batch, heads, tall * 64, wide * 64)
  return (jnp.moveaxis(total, 1, 2)[:, :length] * scale).astype(dtype)


def check_run(mesh, spec):
  rng = np.random.default_rng(0)
  arrays = [
    jnp.asarray(rng.standard_normal((4, 1024, 2, 64)), "bfloat16")
    for _ in range(4)
  ]
  expected = gradients("xla", *(x.astype("float32") for x in arrays))
  sharding = NamedSharding(mesh, spec)
  arrays = [jax.device_put(x, sharding) for x in arrays]
  actual = jax.jit(gradients, static_argnums=0)("mosaic", *arrays)
  names = "out", "dq", "dk", "dv"
  for name, x, y in zip(names, actual, expected, strict=True):
    if x.sharding.num_devices != 4 or compare.error(x, y) > 4e-3:
      raise SystemExit(f"{spec} {name}: {x.sharding}, {compare.error(x, y)}")


if __name__ == "__main__":
  device.current = lambda: device.Device("NVIDIA H100", 90)
  host._programs = lambda: 132
  check_compile(meshes.make(), normalize=False)
  check_compile(meshes.make(), normalize=True)
  query_tiles.launch = key_tiles.launch = launch_plain_jax
  reduce.in_rows = in_rows_of_plain_jax
  jax.clear_caches()
  for spec in (PartitionSpec("data"), PartitionSpec(None, "data")):
    check_run(meshes.make(), spec)
