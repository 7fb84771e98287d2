"""The kernels on a GPU.

Run them with
  JAX_PLATFORMS=cuda python -m pytest -n 8 tests/kernels/test_gpu.py
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sigattn
from sigattn import paged
from sigattn.kernels import device
from sigattn.kernels.mosaic import tiles
from sigattn.kernels.problem import FLOAT8
from sigattn.kernels.triton import decode
from sigattn.training import mesh as meshes
from tests.kernels import cases, compare

if jax.default_backend() != "gpu":
  pytest.skip("needs a GPU", allow_module_level=True)

CASES = cases.CASES + cases.BLOCKS + cases.ARBITRARY + cases.HIDDEN_KEYS
# The head widths of cases with many blocks.
WIDTHS = {
  "mosaic": (32, 64, 96, 128, 192, 256),
  "triton": (32, 64, 96, 128, 256),
}
# There are more tiles than multiprocessors, so a program computes several.
ROUNDS = [
  cases.Case("rounds", batch=4, queries=520, heads=24, kv_heads=12, width=64),
  cases.Case(
    "rounds_causal", batch=4, queries=400, heads=24, width=128, causal=True
  ),
]


@pytest.fixture(params=WIDTHS, autouse=True)
def implementation(request, monkeypatch):
  compare.use_only(monkeypatch, request.param, device.current())
  return request.param


def larger(case, times, implementation):
  """The case with `times` as many tokens and a width from WIDTHS."""
  widths = WIDTHS[implementation]
  return dataclasses.replace(
    case,
    queries=case.queries * times,
    keys=case.keys and case.keys * times,
    width=widths[len(case.name) % len(widths)],
    window=case.window and tuple(times * x for x in case.window),
  )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bit_output_and_gradients(case, dtype, implementation):
  if implementation == "mosaic":
    case = dataclasses.replace(case, width=64)
  compare.assert_16_bit(case, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bit_of_many_blocks(case, dtype, implementation):
  compare.assert_16_bit(larger(case, 13, implementation), dtype)


@pytest.mark.parametrize("case", cases.WIDE_RANGE, ids=str)
def test_float16_of_normalized_rows(case, implementation):
  if implementation == "mosaic":
    case = dataclasses.replace(case, width=64)
  compare.assert_16_bit(case, "float16")


@pytest.mark.parametrize("width", tiles.FUSED_BACKWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bit_of_what_long_sequences_take(
  case, width, implementation, monkeypatch
):
  """At width 128 programs form clusters, and a cluster may lack its second."""
  if implementation != "mosaic":
    pytest.skip("Triton has one backward pass")
  for name in ("LONG", "FORWARD_CLUSTERS"):
    monkeypatch.setattr(tiles, name, 0)
  monkeypatch.setattr(tiles, "MOST_BLOCKS", math.inf)
  everywhere = {
    width: dataclasses.replace(x, open=0, masked=0, masked_on_h200=0)
    for width, x in tiles.FUSED_BACKWARD.items()
  }
  monkeypatch.setattr(tiles, "FUSED_BACKWARD", everywhere)
  case = dataclasses.replace(larger(case, 13, implementation), width=width)
  compare.assert_16_bit(case, "bfloat16")


@pytest.mark.parametrize("case", ROUNDS, ids=str)
def test_16_bit_of_many_tiles(case):
  compare.assert_16_bit(case, "bfloat16")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_output_and_gradients(case):
  compare.assert_float32(case, 6e-6 if case in cases.ARBITRARY else 4e-6)


@pytest.mark.parametrize("name", ["lengths", "lengths_cross_grouped"])
def test_nan_in_padding_leaks_nowhere(name, implementation):
  changes = (64, "bfloat16") if implementation == "mosaic" else ()
  compare.assert_nan_in_padding_leaks_nowhere(name, *changes)


def few_queries(case):
  """The case with 1 to 16 queries and a longer cache of keys."""
  return dataclasses.replace(
    case,
    queries=1 + len(case.name) % 16,
    keys=30 * (case.keys or case.queries) + 1,
    width=(64, 80, 128)[len(case.name) % 3],
    window=case.window and tuple(30 * x for x in case.window),
  )


def decoded(arrays, options):
  return jax.jit(lambda *x: sigattn.dot_product_attention(*x, **options))(
    *arrays
  )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding(case, dtype, implementation):
  if implementation != "triton" or case.segments:
    pytest.skip("only Triton has a decode kernel, and without segments")
  case = few_queries(case)
  arrays, options, cotangent = cases.draw(case, dtype)
  try:
    out = decoded(arrays, options)
  except NotImplementedError as reason:
    pytest.skip(str(reason))
  expected = cases.exact(case, arrays, options, cotangent)["out"]
  # With so few queries, some cases have outputs of 1e-263. They become 0.
  expected = np.asarray(expected, np.float32)
  bound = 4e-6
  if dtype != "float32":
    plain = compare.plain_16_bit(case, arrays, options, cotangent)["out"]
    unit = float(jnp.finfo(dtype).eps)
    bound = 2 * compare.error(plain, expected) + 0.2 * unit
  assert compare.error(out, expected) <= bound


@pytest.mark.parametrize("normalize", [False, True])
def test_decoding_gives_the_same_bits_at_every_run(
  normalize, implementation, monkeypatch
):
  """A program that added up before all shares were there would change them."""
  if implementation != "triton":
    pytest.skip("only Triton has a decode kernel")
  tile = decode.tile
  monkeypatch.setattr(
    decode, "tile", lambda p, **x: tile(p, **x)._replace(splits=23)
  )
  rng = np.random.default_rng(0)
  shapes = (8, 1, 16, 64), (8, 4001, 8, 64), (8, 4001, 8, 64)
  query, key, value = (
    jnp.asarray(rng.standard_normal(shape), "bfloat16") for shape in shapes
  )
  lengths = jnp.asarray(rng.integers(0, 4002, 8), "int32")

  @jax.jit
  def attend(query, key, value, lengths):
    return sigattn.dot_product_attention(
      query, key, value, key_value_seq_lengths=lengths, normalize=normalize
    )

  wanted = np.asarray(attend(query, key, value, lengths))
  assert np.isfinite(wanted.astype(np.float32)).all()
  for _ in range(200):
    found = attend(query, key, value, lengths)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("length", paged.PAGE_LENGTHS)
def test_pages_change_no_bit(length, dtype, normalize, implementation):
  """NaN in unused pages and unused numbers of the table change none either."""
  if implementation != "triton":
    pytest.skip("only Triton has a decode kernel")
  rng = np.random.default_rng(length)
  lengths = np.array([900, 31, 0, 1024, 513])
  used = -(-lengths // length)
  table = np.full((5, 1024 // length), -5)
  pages = rng.permutation(used.sum() + 9)
  for row, count in enumerate(used):
    start = used[:row].sum()
    table[row, :count] = pages[start : start + count]
  table[1, : used[1]] = table[0, : used[1]]  # two rows share their beginning
  query = jnp.asarray(rng.standard_normal((5, 3, 8, 64)), dtype)
  keys, values = (
    rng.standard_normal((len(pages), length, 2, 64), np.float32)
    for _ in range(2)
  )
  for x in keys, values:
    x[np.setdiff1d(pages, table)] = np.nan
  keys, values = jnp.asarray(keys, dtype), jnp.asarray(values, dtype)
  whole = [x[np.maximum(table, 0)].reshape(5, 1024, 2, 64)
           for x in (keys, values)]  # fmt: skip
  attend = functools.partial(sigattn.paged_attention, normalize=normalize)
  found = jax.jit(attend)(query, keys, values, table, lengths)
  wanted = decoded(
    (query, *whole),
    dict(
      key_value_seq_lengths=lengths, query_offset=lengths - 3, is_causal=True,
      normalize=normalize,
    ),
  )  # fmt: skip
  np.testing.assert_array_equal(found, wanted)
  assert np.asarray(found, np.float32)[[0, 1, 3, 4]].any((1, 2, 3)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("width", [64, 128])
def test_softmax_of_a_few_queries(
  width, queries, dtype, implementation, monkeypatch
):
  if implementation != "triton":
    pytest.skip("only Triton has a decode kernel")
  tile = decode.tile
  monkeypatch.setattr(
    decode, "tile", lambda p, **x: tile(p, **x)._replace(splits=7)
  )
  rng = np.random.default_rng(0)
  shapes = (3, queries, 8, width), (3, 3001, 2, width), (3, 3001, 2, width)
  arrays = [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]
  lengths = np.array([3000, 700, 129])
  options = dict(
    kind="softmax", key_value_seq_lengths=lengths, is_causal=True,
    query_offset=lengths - queries, scale=0.5,
  )  # fmt: skip
  wide = [x.astype("float32") for x in arrays]
  with jax.default_matmul_precision("highest"):
    wanted = decoded(wide, options | {"implementation": "xla"})
  found = decoded(arrays, options | {"implementation": "triton"})
  unit = float(jnp.finfo(dtype).eps)
  assert compare.error(found, wanted) <= (4e-6 if dtype == "float32" else unit)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("kind", ["sigmoid", "normalized", "softmax"])
def test_decoding_from_8_bits(kind, width, dtype, implementation):
  """Pages change no bit here either."""
  if implementation != "triton":
    pytest.skip("only Triton has a decode kernel")
  rng = np.random.default_rng(0)
  shapes = (3, 2, 8, width), (3, 1024, 2, width), (3, 1024, 2, width)
  arrays = [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]
  arrays[1:] = (sigattn.attention.saturated(x, FLOAT8) for x in arrays[1:])
  lengths = np.array([1024, 700, 129])
  options = dict(logit_bias=-4.0, normalize=kind == "normalized")
  if kind == "softmax":
    options = dict(kind=kind)
  place = dict(
    key_value_seq_lengths=lengths, is_causal=True, query_offset=lengths - 2
  )
  query, key, value = (x.astype("float32") for x in arrays)
  with jax.default_matmul_precision("highest"):
    weights = sigattn.attention_weights(query, key, **options, **place)
    wanted = jnp.einsum(
      "bnts,bsnh->btnh", weights.weights_BNTS, jnp.repeat(value, 4, axis=2)
    )
  found = decoded(arrays, options | place | {"implementation": "triton"})
  unit = float(jnp.finfo(dtype).eps)
  assert compare.error(found, wanted) <= (4e-6 if dtype == "float32" else unit)
  pages = [x.reshape(48, 64, 2, width) for x in arrays[1:]]
  table = np.arange(48).reshape(3, 16)
  attend = functools.partial(sigattn.paged_attention, n=1024, **options)
  in_pages = jax.jit(attend)(arrays[0], *pages, table, lengths)
  np.testing.assert_array_equal(in_pages, found)


@pytest.mark.parametrize("page", [None, 16])
def test_a_new_token_is_rounded_to_8_bits(page, implementation):
  if implementation != "triton":
    pytest.skip("only Triton has a decode kernel")
  compare.assert_new_token_is_rounded(page)


@pytest.mark.parametrize("index", range(3))
def test_the_same_bits_at_every_run(index, implementation, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
  case = larger(cases.BLOCKS[index], 40, implementation)
  actual = [compare.run(*cases.draw(case, "bfloat16")) for _ in range(2)]
  for name, value in actual[0].items():
    np.testing.assert_array_equal(value, actual[1][name], name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bias", [-8.0, -11.0, -11.1, -14.0, -16.0])
def test_small_weights_keep_their_sum(bias, dtype):
  """With V = 16, outputs show the row sums: their mean error is below 1e-3."""
  case = cases.Case(
    "sum", batch=1, queries=256, keys=4096, heads=2, width=128, logit_bias=bias
  )
  arrays, options, cotangent = cases.draw(case, dtype)
  arrays[2] = np.full_like(arrays[2], 16)
  expected = cases.exact(case, arrays, options, cotangent)["out"]
  actual = compare.run_or_skip(arrays, options, cotangent)["out"]
  lost = np.mean(np.asarray(actual, np.float64) / expected - 1)
  print(f"{bias=} {dtype} {lost=:.1e}")
  assert abs(lost) < 1e-3


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several GPUs")
@pytest.mark.parametrize("axis", ["batch", "heads"])
@pytest.mark.parametrize("manual", [False, True])
def test_each_gpu_of_a_mesh_computes_its_part(axis, manual):
  """In jit and in shard_map there is no communication between the GPUs."""
  count = 2
  rng = np.random.default_rng(0)
  query, key, value, d_out = (
    jnp.asarray(rng.standard_normal((4, 1024, 4, 64)), "bfloat16")
    for _ in range(4)
  )
  arrays = query, key, value, jnp.full((4,), -6.0), jnp.array([9, 999, 77, 300])

  def attend(query, key, value, bias, lengths):
    return sigattn.dot_product_attention(
      query, key, value, logit_bias=bias, is_causal=True,
      key_value_seq_lengths=lengths,
    )  # fmt: skip

  mesh = jax.make_mesh(
    (count,), (axis,), axis_types=(jax.sharding.AxisType.Auto,)
  )
  names = ("batch", None, "heads"), ("heads",), ("batch",)
  split, heads, batch = (
    PartitionSpec(*(name if name == axis else None for name in x))
    for x in names
  )
  specs = split, split, split, heads, batch
  spread = attend
  if manual:
    spread = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=split)

  def gradients(attend, query, key, value, bias, lengths, d_out):
    out, pull_back = jax.vjp(
      lambda *x: attend(*x, lengths), query, key, value, bias
    )
    return out, *pull_back(d_out)

  expected = jax.jit(functools.partial(gradients, attend))(*arrays, d_out)
  sharded = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip((*arrays, d_out), (*specs, split), strict=True)
  ]
  compiled = (
    jax.jit(functools.partial(gradients, spread)).lower(*sharded).compile()
  )
  text = compiled.as_text()
  assert not re.findall("all-gather|all-to-all|collective-permute", text)
  for x, y in zip(compiled(*sharded), expected, strict=True):
    assert compare.error(x, y) < 1e-3


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several GPUs")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_sequences_on_the_mesh_of_the_training_program(width, is_causal):
  """If dq is added in global memory, gradients still equal one device's."""
  rng = np.random.default_rng(0)
  arrays = [
    jnp.asarray(
      rng.standard_normal((jax.device_count(), 4096, 2, width)), "bfloat16"
    )
    for _ in range(4)
  ]

  @jax.jit
  def gradients(*arrays):
    def attend(*inputs):
      return sigattn.dot_product_attention(*inputs, is_causal=is_causal)

    out, pull_back = jax.vjp(attend, *arrays[:3])
    return out, *pull_back(arrays[3])

  expected = gradients(*arrays)
  batch = meshes.batch(meshes.make())
  actual = gradients(*(jax.device_put(x, batch) for x in arrays))
  for x, y in zip(actual, expected, strict=True):
    assert x.sharding.is_equivalent_to(batch, x.ndim)
    assert compare.error(x, y) < 1e-3
