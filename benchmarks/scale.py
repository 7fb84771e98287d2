"""Measures how training scales with devices: python -m benchmarks.scale

It has two parts, each measured on all devices of this machine and on one:

  train  the 1B language model in rows of 4,096 tokens. The mesh axis data or
         fsdp splits the batch; the axis tensor splits heads and channels. The
         batch has --rows rows for each device, also with tensor.
  ring   forward and backward pass of causal sigmoid attention over one
         sequence, which is split over the devices, with each exchange

It prints each row, and then writes benchmarks/results/scale_<device>.json.
`scaling` is tokens per second, divided by the number of devices and by the
tokens per second of one device. `error` of a ring compares its output and
gradients with those of one device: it is the relative root mean square of the
difference.

  python -m benchmarks.scale --parts train --meshes data fsdp
  python -m benchmarks.scale --parts ring --lengths 65536

On a CPU, with sizes that it can compute:

  export XLA_FLAGS=--xla_force_host_platform_device_count=2
  python -m benchmarks.scale \\
    --model runlocal --length 32 --rows 2 --lengths 64 --heads 2 --width 8
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sigattn
from benchmarks import attention
from configs import lm_sigmoid
from sigattn.data import text
from sigattn.training import mesh as meshes
from sigattn.training import process, step

SPLITS = ("data", "fsdp", "tensor")
# (exchange, order) of each ring. In the contiguous order the last device has
# twice the mean work.
RINGS = (
  ("ring", "zigzag"),
  ("ring", "contiguous"),
  ("all_gather", "zigzag"),
)
_SECONDS = 3  # of a measurement


def seconds(call):
  """Median time of a call, until its result is ready.

  call: a function without arguments. The first call, which may compile, and the
  second are not counted.
  """

  def once():
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin

  once()
  count = max(3, min(int(_SECONDS / once()), 20))
  return statistics.median(once() for _ in range(count))


# Training.


def train(arguments, split, devices):
  """The row of a model that is trained on `devices`, split along one axis."""
  config = lm_sigmoid.get_config(arguments.model)
  with config.unlocked():
    config.data.length = arguments.length
    config.batch_size = arguments.rows * len(devices)
    config.optim.accumulate = 1
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.mesh[split] = len(devices)
  mesh = meshes.make(config, devices)
  state, update = step.init(config, mesh)
  update = step.jitted(update)
  shape = config.batch_size, config.data.length + 1
  token = np.random.default_rng(0).integers(0, text.vocab_size(config), shape)
  batch = meshes.put({"token": token.astype(np.int32)}, mesh)

  def one():
    nonlocal state
    state, metrics = update(state, batch)
    return metrics["loss"]

  duration = seconds(one)
  return {
    "model": arguments.model,
    "n": config.data.length,
    "mesh": {split: len(devices)},
    "devices": len(devices),
    "rows": config.batch_size,
    "milliseconds": duration * 1e3,
    "tokens_per_second": config.batch_size * config.data.length / duration,
    "peak_gib": _peak_gib(devices),
  }


def _peak_gib(devices):
  """The peak memory of the device that used most; None on a CPU."""
  stats = [device.memory_stats() for device in devices]
  if None in stats:
    return None
  return max(x["peak_bytes_in_use"] for x in stats) / 2**30


# One long sequence.


def inputs(arguments, length, sharding):
  """query, key, value and the cotangent of the output, made where they lie.

  Each device makes its own part.
  """
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  shape = 1, length, arguments.heads, arguments.width

  @functools.partial(jax.jit, out_shardings=sharding)
  def make():
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape, dtype) for key in keys]

  return make()


def gradients(attend, query, key, value, d_out):
  """(out, dq, dk, dv)."""
  out, pull_back = jax.vjp(attend, query, key, value)
  return out, *pull_back(d_out)


def one_device(arguments, length):
  """(seconds, (out, dq, dk, dv)) of one device that has the whole sequence."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  arrays = inputs(arguments, length, sharding)
  attend = functools.partial(
    sigattn.dot_product_attention,
    is_causal=True,
    normalize=arguments.normalize,
  )
  call = functools.partial(
    jax.jit(functools.partial(gradients, attend)), *arrays
  )
  return seconds(call), call()


def ring(arguments, length, exchange, order):
  """(seconds, (out, dq, dk, dv)) of a ring over all devices.

  The inputs are in the ring's order. The results are brought back into the
  order of the tokens, which the time does not include.
  """
  devices = jax.devices()
  mesh = Mesh(np.array(devices), ("sequence",))
  split = PartitionSpec(None, "sequence")
  over = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=split, out_specs=split
  )
  arrays = inputs(arguments, length, NamedSharding(mesh, split))
  move = functools.partial(sigattn.zigzag, axis_name="sequence")
  if order == "zigzag":
    arrays = [jax.jit(over(move))(x) for x in arrays]
  attend = functools.partial(
    sigattn.ring_attention, axis_name="sequence", exchange=exchange,
    order=order, is_causal=True, normalize=arguments.normalize,
  )  # fmt: skip
  local = over(functools.partial(gradients, attend))
  call = functools.partial(jax.jit(local), *arrays)
  duration, results = seconds(call), call()
  if order == "zigzag":
    back = jax.jit(over(functools.partial(move, inverse=True)))
    results = [back(x) for x in results]
  return duration, results


def error(actual, expected):
  """The largest relative root mean square of a difference."""

  @jax.jit
  def one(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sqrt(((x - y) ** 2).mean() / (y**2).mean())

  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return max(
    float(one(jax.device_put(x, place), y))
    for x, y in zip(actual, expected, strict=True)
  )


def ring_rows(arguments):
  """Yields, for each length, a row for one device and one for each ring."""
  count = jax.device_count()
  normalised = " normalised" if arguments.normalize else ""
  name = (
    f"causal{normalised} sigmoid attention, N={arguments.heads}, "
    f"H={arguments.width}"
  )
  for length in arguments.lengths:
    alone, expected = one_device(arguments, length)
    # A forward pass has 2 n^2 N H operations. With the backward pass it is 3.5
    # times as many.
    flops = 3.5 * 2 * length**2 * arguments.heads * arguments.width

    def row(duration, devices, alone=alone, flops=flops, length=length):
      return {
        "model": name,
        "n": length,
        "mesh": {"sequence": devices},
        "devices": devices,
        "milliseconds": duration * 1e3,
        "tokens_per_second": length / duration,
        "tflops_a_device": flops / duration / devices / 1e12,
        "speed_up": alone / duration,
        "scaling": alone / duration / devices,
      }

    yield row(alone, 1)
    for exchange, order in RINGS if count > 1 else ():
      duration, actual = ring(arguments, length, exchange, order)
      yield row(duration, count) | {
        "exchange": exchange,
        "order": order,
        "error": error(actual, expected),
      }


def train_rows(arguments):
  """Yields a row for one device and each split over all devices."""
  alone = train(arguments, "data", jax.devices()[:1])
  yield alone | {"scaling": 1.0}
  for split in arguments.meshes if jax.device_count() > 1 else ():
    row = train(arguments, split, jax.devices())
    share = row["tokens_per_second"] / row["devices"]
    yield row | {"scaling": share / alone["tokens_per_second"]}


PARTS = {"train": train_rows, "ring": ring_rows}


def main(argv=None):
  process.use_most_of_the_gpu()
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
  parser.add_argument(
    "--meshes", nargs="+", choices=meshes.AXES, default=SPLITS
  )
  parser.add_argument("--model", default="1b", help="of configs/lm_sigmoid.py")
  parser.add_argument("--length", type=int, default=4096, help="of train")
  parser.add_argument("--rows", type=int, default=8, help="on each device")
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=(65536, 262144), help="of ring"
  )
  parser.add_argument("--heads", type=int, default=16)
  parser.add_argument("--width", type=int, default=128, help="of a head")
  parser.add_argument("--normalize", action="store_true", help="of ring")
  parser.add_argument(
    "--out",
    help="a .json file, or a name in benchmarks/results/; default: the device",
  )
  arguments = parser.parse_args(argv)
  kind = jax.devices()[0].device_kind
  name = arguments.out or f"scale_{kind.replace(' ', '_').lower()}"
  rows = []
  for part in arguments.parts:
    for row in PARTS[part](arguments):
      rows.append(row)
      print(
        ", ".join(
          f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
          for k, v in row.items()
        ),
        flush=True,
      )
      path = attention.write(name, kind, {"rows": rows})
  print(f"written to {path}")


if __name__ == "__main__":
  main()
