"""Ring attention on simulated devices equals one device, with its gradients.

test_ring.py runs this in its own process, because the other tests have one
device. It prints the errors that it finds. Arguments: names of CASES; without
names it runs all. It always runs the examples of docs/scaling.md and of the
docstring.
"""

import functools
import inspect
import os
import pathlib
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import sigattn
from sigattn.kernels import xla

jax.config.update("jax_numpy_rank_promotion", "raise")
BATCH, LENGTH, HEADS, WIDTH = 2, 32, 4, 8

# {name: (options, devices along the sequence)}
CASES = {
  "plain": (dict(), 4),
  "causal": (dict(is_causal=True), 4),
  "zigzag": (dict(is_causal=True, order="zigzag"), 4),
  "zigzag normalised alibi": (
    dict(is_causal=True, order="zigzag", normalize=True, alibi=True), 4,
  ),
  "zigzag grouped segments bias": (
    dict(is_causal=True, order="zigzag", kv_heads=2, segments=True, bias=True),
    2,
  ),
  "zigzag biases": (
    dict(is_causal=True, order="zigzag", biases=True, alibi=True), 4,
  ),
  "silu window biases": (
    dict(kind="silu", is_causal=True, window=(9, 0), biases=True, bias=True), 4,
  ),
  "window": (dict(is_causal=True, window=(5, 0)), 4),
  "window both ways": (dict(window=(9, 3), normalize=True), 4),
  "relu lengths alibi": (
    dict(kind="relu", lengths=True, alibi=True, kv_heads=1), 4,
  ),
  "normalised segments": (
    dict(is_causal=True, normalize=True, segments=True, bias=True), 8,
  ),
  "relu2 normalised zigzag lengths": (
    dict(
      kind="relu2", is_causal=True, normalize=True, order="zigzag",
      lengths=True,
    ), 4,
  ),
  "gathered": (dict(exchange="all_gather", alibi=True), 4),
  "gathered window": (
    dict(exchange="all_gather", is_causal=True, window=(9, 0), lengths=True), 4,
  ),
  "gathered zigzag": (
    dict(
      exchange="all_gather", is_causal=True, order="zigzag", normalize=True,
      segments=True, kv_heads=2, bias=True, biases=True,
    ), 4,
  ),
}  # fmt: skip


def inputs(kv_heads=HEADS, segments=False, lengths=False, alibi=False,
           bias=False, biases=False):  # fmt: skip
  rng = np.random.default_rng(0)
  shapes = dict(
    query=(BATCH, LENGTH, HEADS, WIDTH),
    key=(BATCH, LENGTH, kv_heads, WIDTH),
    value=(BATCH, LENGTH, kv_heads, WIDTH),
  )
  trained = {k: rng.standard_normal(s, np.float32) for k, s in shapes.items()}
  if bias:
    trained["logit_bias"] = np.linspace(-4, -2, HEADS, dtype=np.float32)
  if alibi:
    trained["alibi_slopes"] = np.geomspace(0.5, 0.01, HEADS, dtype=np.float32)
  if biases:
    shape = 1, HEADS, LENGTH
    trained["query_logit_bias"] = rng.standard_normal(shape, np.float32)
    trained["key_logit_bias"] = rng.standard_normal((LENGTH,), np.float32)
  fixed = {}
  if segments:
    ids = np.sort(rng.integers(0, 3, (BATCH, LENGTH)), axis=1)
    fixed["query_segment_ids"] = fixed["key_value_segment_ids"] = ids
  if lengths:
    # The last keys of one example are on another device than its length.
    fixed["query_seq_lengths"] = np.array([13, 32], np.int32)
    fixed["key_value_seq_lengths"] = np.array([13, 32], np.int32)
  return trained, fixed


def both(attend, trained, fixed):
  """(out, gradients) of a loss that depends differently on every number."""
  weights = np.random.default_rng(1).standard_normal(trained["query"].shape)

  def loss(trained):
    out = attend(trained, fixed)
    return (out * jnp.asarray(weights, out.dtype)).sum(), out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
  return {"out": out} | gradients


def over_devices(devices, options, order):
  mesh = jax.make_mesh(
    (8 // devices, devices),
    ("data", "sequence"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )
  split = PartitionSpec("data" if 8 // devices <= BATCH else None, "sequence")
  # The batch of two cannot be split over four devices.
  specs = dict.fromkeys(
    ("query", "key", "value", "query_segment_ids", "key_value_segment_ids"),
    split,
  )

  specs["query_logit_bias"] = PartitionSpec(None, None, "sequence")
  specs["key_logit_bias"] = PartitionSpec("sequence")

  def local(trained, fixed):
    move = functools.partial(sigattn.zigzag, axis_name="sequence")

    def moved(arrays):
      return {
        k: move(x, axis=[*specs[k]].index("sequence")) if k in specs else x
        for k, x in arrays.items()
      }

    if order == "zigzag":
      trained, fixed = moved(trained), moved(fixed)
    out = sigattn.ring_attention(
      **trained, **fixed, axis_name="sequence", order=order, **options
    )
    return move(out, inverse=True) if order == "zigzag" else out

  def attend(trained, fixed):
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(
        {k: specs.get(k, PartitionSpec()) for k in trained},
        {k: specs.get(k, PartitionSpec(split[0])) for k in fixed},
      ),
      out_specs=split,
    )(trained, fixed)

  return attend


def check(name):
  options, devices = CASES[name]
  options = dict(options)
  made = {
    k: options.pop(k)
    for k in ("kv_heads", "segments", "lengths", "alibi", "bias", "biases")
    if k in options
  }
  trained, fixed = inputs(**made)
  order = options.pop("order", "contiguous")
  exchange = options.pop("exchange", "ring")
  if "window" in options:
    options["local_window_size"] = options.pop("window")

  def one(trained, fixed):
    return sigattn.dot_product_attention(**trained, **fixed, **options)

  expected = both(one, trained, fixed)
  attend = over_devices(devices, options | {"exchange": exchange}, order)
  actual = both(attend, trained, fixed)
  for key, x in expected.items():
    error = np.abs(actual[key] - x).max() / np.abs(x).max()
    if not error < 1e-5:
      raise SystemExit(f"{name}: {key} differs by {error} of its largest")


def check_examples():
  """The example of the document, and then that of the docstring."""
  document = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"
  [code] = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
  text = inspect.getdoc(sigattn.ring_attention)
  [docstring] = re.findall(r"\n\n((?:  .*\n|\n)+  out = .*\n)", text)
  names = {}
  for example in code, inspect.cleandoc(docstring):
    names.pop("out", None)
    exec(example, names)
    wanted = sigattn.dot_product_attention(
      *(names[x] for x in "qkv"), is_causal=True
    )
    if not np.abs(names["out"] - wanted).max() < 1e-5:
      raise SystemExit(f"this example gives a wrong result:\n{example}")


if __name__ == "__main__":
  for name in sys.argv[1:] or CASES:
    check(name)
  check_examples()
  # Long sequences use the loop over blocks of keys.
  xla._TILE, xla._MIN_BLOCK = 2**6, 2
  check("window both ways")
