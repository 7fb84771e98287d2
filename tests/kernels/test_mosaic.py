"""The Hopper kernels without a GPU: results, lowering and refused problems."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sigattn
from benchmarks import tune_triton
from sigattn.kernels import device, mosaic, xla
from sigattn.kernels.differentiation import Sums
from sigattn.kernels.mosaic import (
  blocks,
  dkv,
  host,
  registers,
  tiles,
  weights,
)
from sigattn.kernels.problem import Operands
from tests.kernels import cases, compare, ptx

if jax.default_backend() != "cpu":
  pytest.skip("the kernels are not interpreted here", allow_module_level=True)

H100 = device.Device("NVIDIA H100", 90)


INTERPRETED = {
  (32, "two_kernels"): ["normalized_relu"],
  (64, "two_kernels"): [
    "all_but_dense", "blocks_causal_alibi", "blocks_narrow_window",
    "blocks_causal_alibi_cross", "normalized_segments",
    "normalized_low.float16", "blocks_normalized_vectors", "mask_keys",
  ],
  (128, "two_kernels"): [
    "blocks_window", "blocks_normalized_cross", "query_vector",
    "offset_behind",
  ],
  (128, "clusters"): ["blocks_normalized_causal", "blocks_narrow_window"],
  (64, "fused"): [
    "all_but_dense", "grouped", "blocks_alibi", "normalized_causal",
    "blocks_normalized", "normalized_low", "blocks_vectors", "blocks_offsets",
    "blocks_silu", "relu_of_long_n.float16",
  ],
  (128, "fused"): [
    "vit_197", "blocks_causal", "blocks_normalized_window",
    "normalized_relu2.float16", "shared_vectors",
    "normalized_vectors.float16",
  ],
}  # fmt: skip


@pytest.mark.parametrize(("width", "form"), INTERPRETED)
def test_interpreted_output_and_gradients(width, form):
  """It runs in its own process, because a missing arrival at a barrier hangs.

  It simulates eight devices: each warpgroup blocks a thread of XLA, and XLA has
  no more threads than devices or cores.
  """
  subprocess.run(
    [
      sys.executable,
      "-m",
      "tests.kernels.mosaic_interpreter",
      str(width),
      form,
      *INTERPRETED[width, form],
    ],
    env=os.environ
    | {
      "XLA_FLAGS": os.environ["XLA_FLAGS"]
      + " --xla_force_host_platform_device_count=8",
    },
    timeout=250,
    check=True,
  )


@pytest.mark.parametrize(
  ("code", "bound"),
  [(registers._DIVISION, 3e-7), (registers._POLYNOMIAL, 3.3e-5)],
)
def test_the_inverse_of_the_exact_sigmoid(code, bound):
  """1 / (1 + z) keeps its relative precision for all weights down to e^-80."""
  z = np.exp(np.linspace(-20, 80, 2**21, dtype=np.float32))
  error = ptx.run(code, z) * (1 + np.float64(z)) - 1
  assert np.abs(error).max() < bound


@pytest.mark.parametrize("code", registers._INVERSES[True])
def test_the_exact_sigmoid_of_extreme_logits(code):
  """Hidden pairs have weight 0, and a number that is none remains so."""
  z = np.float32([np.inf, 2.0**127, 0, np.nan])
  actual = ptx.run(code, z)
  assert not actual[:2].any()
  np.testing.assert_allclose(actual[2:], [1, np.nan], rtol=3.3e-5)


@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize(
  ("width", "length", "is_causal"),
  [(width, 1024, True) for width in tiles.TILES]
  + [
    (width, 4096, is_causal)
    for width in tiles.FUSED_BACKWARD
    for is_causal in (False, True)
  ]
  + [(width, tiles.LONG, True) for width in tiles.FUSED_BACKWARD],
)
def test_tiles_are_lowered_for_cuda(width, length, is_causal, has_slopes):
  problem = tune_triton.example(width, "bfloat16", length, is_causal=is_causal)
  _assert_lowered(problem, has_slopes)


@pytest.mark.parametrize(
  ("width", "dtype", "length", "is_causal", "has_slopes"),
  [(width, "float16", 1024, True, True) for width in tiles.TILES]
  + [
    (width, "bfloat16", length, is_causal, False)
    for width in (64, 128)
    for length in (1024, 4096)
    for is_causal in (False, True)
  ]
  + [(width, "float16", 4096, True, True) for width in (64, 128)],
)
def test_tiles_of_normalized_rows_are_lowered_for_cuda(
  width, dtype, length, is_causal, has_slopes
):
  """float16 needs more shared memory than bfloat16, and so does relu."""
  problem = tune_triton.example(width, dtype, length, is_causal=is_causal)
  _assert_lowered(dataclasses.replace(problem, normalize=True), has_slopes)


@pytest.mark.parametrize(
  ("dtype", "normalize"), [("bfloat16", False), ("float16", True)]
)
@pytest.mark.parametrize(
  ("width", "length"),
  [(width, 1024) for width in tiles.TILES]
  + [(width, 4096) for width in tiles.FUSED_BACKWARD],
)
def test_tiles_of_logit_vectors_are_lowered_for_cuda(
  width, length, dtype, normalize, monkeypatch
):
  """The problems also have all other trained operands, and offsets."""
  compare.use_only(monkeypatch, "mosaic", H100)

  def loss(query, key, value, offset, *trained):
    names = (
      "logit_bias", "alibi_slopes", "query_logit_bias", "key_logit_bias",
    )  # fmt: skip
    out = sigattn.dot_product_attention(
      query, key, value, normalize=normalize, is_causal=True,
      query_offset=offset, **dict(zip(names, trained, strict=True)),
    )  # fmt: skip
    return out.astype("float32").sum()

  def shape(*axes, dtype="float32"):
    return jax.ShapeDtypeStruct(axes, dtype)

  query = shape(2, length, 4, width, dtype=dtype)
  key = shape(2, length, 2, width, dtype=dtype)
  vector, heads = shape(2, 4, length), shape(4)
  gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 4, 5, 6, 7)))
  arrays = shape(2, dtype="int32"), heads, heads, vector, vector
  lowered = gradients.trace(query, key, key, *arrays).lower(
    lowering_platforms=("cuda",)
  )
  assert lowered.as_text().count("custom_call @mosaic_gpu") >= 2


def _assert_lowered(problem, has_slopes):
  """Checks that shapes and layouts are valid, and that shared memory suffices.

  Problems with trained slopes of ALiBi need the most shared memory.
  """
  width, slopes = problem.head_dim, None
  if has_slopes:
    slopes = jax.ShapeDtypeStruct((1, problem.num_heads), "float32")
    shapes = Operands(alibi_slopes=slopes.shape)
    problem = dataclasses.replace(problem, shapes=shapes)
  shape = problem.batch, problem.query_len, problem.num_heads, width
  x = jax.ShapeDtypeStruct(shape, problem.dtype)
  row = jax.ShapeDtypeStruct(shape[:3], "float32")
  rows = [x, row, row] if problem.normalize else []

  def both(query, key, value, slopes, d_out, *rows):
    inputs = query, key, value, Operands(alibi_slopes=slopes)
    return (
      host._forward(problem, *inputs),
      host._backward(Sums(slopes=has_slopes), problem, *inputs, d_out, *rows),
    )

  traced = jax.jit(both).trace(x, x, x, slopes, x, *rows)
  lowered = traced.lower(lowering_platforms=("cuda",))
  # There is one kernel for the output, and one for dk and dv, or two for wide
  # heads. Another computes dq, or rounds what the kernel of the keys added. One
  # more divides do by the sums of normalised rows.
  count = 3 + (width > tiles.WIDEST_DK_AND_DV)
  count += problem.normalize and not host._reads_inverse(problem)
  assert lowered.as_text().count("custom_call @mosaic_gpu") == count


@pytest.mark.parametrize("around", ["jit", "shard_map", "explicit mesh"])
@pytest.mark.parametrize(
  "options",
  [
    {"is_causal": True},
    {"local_window_size": 64},
    {},
    {"normalize": True},
    {"normalize": True, "is_causal": True},
  ],
  ids=str,
)
def test_what_users_call_is_lowered(options, around, monkeypatch):
  """Lowers the public operation with its derivative, vmap and partitioning."""
  compare.use_only(monkeypatch, "mosaic", H100)

  def attend(query, key, value):
    return sigattn.dot_product_attention(query, key, value, **options)

  attend, sharding = jax.vmap(attend), None
  if around != "jit":
    mesh = jax.make_mesh((1,), ("batch",))
    split = jax.sharding.PartitionSpec(None, "batch")
    sharding = jax.sharding.NamedSharding(mesh, split)
  if around == "shard_map":
    attend = jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split)

  def loss(*arrays):
    return attend(*arrays).astype("float32").sum()

  shape = 2, 2, 1024, 2, 64
  x = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sharding)
  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
  lowered = gradients.trace(x, x, x).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["grouped", "normalized_vectors", "offsets"])
def test_tangents_equal_float64(name, dtype, monkeypatch):
  """The portable form computes tangents.

  It also computes the results here. Tangents of normalised rows are given
  them, so that a kernel would be compiled, for which there is no GPU.
  """
  compare.use_only(monkeypatch, "mosaic", H100)
  monkeypatch.setattr(host, "_forward", xla.PASSES.forward)
  (case,) = [c for c in cases.CASES if c.name == name]
  case = dataclasses.replace(case, width=64)
  # The bound is half a unit for the output and as much for weights in 16 bits.
  compare.assert_tangents(case, float(jnp.finfo(dtype).eps), dtype)


def test_gradients_on_the_mesh_of_the_training_program():
  """XLA splits the batch between four simulated devices."""
  subprocess.run(
    [sys.executable, "-m", "tests.kernels.hopper_on_four_devices"],
    timeout=250,
    check=True,
  )


@pytest.mark.parametrize(
  ("capability", "change", "reason"),
  [
    (90, {}, ""),
    (90, {"normalize": True}, ""),
    (90, {"scale": 0.0}, "scale=0 is not implemented"),
    (
      90,
      {"shapes": Operands(mask=(1, 1, 9, 9))},
      "a dense mask is not implemented",
    ),
    (90, {"shapes": Operands(mask=(1, 1, 1, 9))}, ""),
    (90, {"head_dim": 80}, "head_dim=80; one of [32, 64, 96, 128, 192, 256]"),
    (
      90,
      {"kind": "new"},
      f"kind='new'; one of {mosaic.KINDS}",
    ),
    (90, {"dtype": "float32"}, "float32 is not implemented"),
    (80, {}, "needs a Hopper GPU (9.0), device is Testing"),
    (100, {}, "needs a Hopper GPU (9.0), device is Testing"),
    (None, {}, "needs a Hopper GPU (9.0), device is Testing"),
  ],
)
def test_what_it_declines(capability, change, reason, monkeypatch):
  card = device.Device("Testing", capability)
  compare.use_only(monkeypatch, "mosaic", card)
  problem = dataclasses.replace(tune_triton.example(64, "bfloat16"), **change)
  assert mosaic.unsupported(problem) == reason


def test_a_kind_without_a_branch_is_an_error():
  form = host._form(tune_triton.example(64, "bfloat16"))
  form = dataclasses.replace(form, kind="new", exact=False)
  place = weights.Place(0, 0, True)
  message = "kind='new' is not implemented in kernels/mosaic/weights.py; docs/"
  with pytest.raises(ValueError, match=message):
    weights.weights(
      form, jnp.ones((64, 64)), 0.0, None, place, tuple, masked=False
    )


def test_it_declines_a_jax_that_it_was_not_tested_with(monkeypatch, caplog):
  """The reason names both versions, and one warning says so."""
  compare.use_only(monkeypatch, "mosaic", H100)
  monkeypatch.setattr(jax, "__version__", "0.12.0")
  problem = tune_triton.example(64, "bfloat16")
  mosaic._warn_of_jax.cache_clear()
  reason = mosaic.unsupported(problem)
  assert reason == "tested with jax 0.11.2, installed is 0.12.0"
  assert mosaic.unsupported(dataclasses.replace(problem, batch=7)) == reason
  [warning] = caplog.records
  assert warning.levelname == "WARNING"
  assert "jax 0.12.0 is installed" in warning.getMessage()
  mosaic._warn_of_jax.cache_clear()


def test_the_jax_of_these_tests_is_a_tested_one():
  assert jax.__version__ in mosaic.TESTED_JAX


def test_asking_imports_nothing_that_changes_with_jax():
  program = (
    "import sys, sigattn.kernels.mosaic as mosaic;"
    "from benchmarks import tune_triton;"
    "mosaic.unsupported(tune_triton.example(64, 'bfloat16'));"
    "changing = 'jax.experimental.mosaic.gpu', 'sigattn.kernels.mosaic.host';"
    "assert not sys.modules.keys() & set(changing), sys.modules.keys()"
  )
  subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
  ("width", "length", "is_causal", "cards"),
  [
    (64, 512, False, []), (64, 1024, False, ["H100", "H200"]),
    (64, 1024, True, ["H100", "H200"]),
    (128, 512, False, []), (128, 1024, False, ["H100", "H200"]),
    (128, 1024, True, ["H200"]), (128, 2048, True, ["H100", "H200"]),
    (96, 8192, False, []),
  ],
)  # fmt: skip
@pytest.mark.parametrize("card", ["H100", "H200"])
def test_the_fused_backward_pass_is_taken_where_it_is_faster(
  width, length, is_causal, cards, card, monkeypatch
):
  kind = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}[card]
  monkeypatch.setattr(device, "current", lambda: device.Device(kind, 90))
  problem = tune_triton.example(width, "bfloat16", length, is_causal=is_causal)
  form = host._form(problem)
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  fused = card in cards
  assert host._takes_fused_backward(form, problem, Sums()) == fused
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
  assert not host._takes_fused_backward(form, problem, Sums())


@pytest.mark.parametrize("argnums", [(0,), (0, 3)])
def test_gradients_of_slopes_are_summed_only_where_they_are_wanted(
  argnums, monkeypatch
):
  compare.use_only(monkeypatch, "mosaic", H100)
  requested = []
  run = dkv.run

  def spy(*args, sums):
    requested.append(sums)
    return run(*args, sums=sums)

  monkeypatch.setattr(dkv, "run", spy)

  def loss(query, key, value, slopes):
    out = sigattn.dot_product_attention(query, key, value, alibi_slopes=slopes)
    return out.astype("float32").sum()

  x = jax.ShapeDtypeStruct((1, 512, 2, 64), "bfloat16")
  slopes = jax.ShapeDtypeStruct((2,), "float32")
  gradients = jax.jit(jax.grad(loss, argnums))
  gradients.trace(x, x, x, slopes).lower(lowering_platforms=("cuda",))
  assert set(requested) == {3 in argnums}


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
  ("length", "tokens", "bound"),
  [(1024 * 2**i, 16384, 1.03) for i in range(7)]
  # Few heads: without a good order one program would have 1.5 times its share.
  + [(2048, 4096, 1.04), (4096, 8192, 1.04), (16384, 4096, 1.04)],
)
@pytest.mark.parametrize("of_queries", [True, False])
def test_no_program_gets_much_more_than_its_share(
  width, length, tokens, bound, of_queries, monkeypatch
):
  """Every tile is assigned once, and the programs have similar work."""
  monkeypatch.setattr(host, "_programs", lambda: 132)
  problem = tune_triton.example(width, "bfloat16", length, is_causal=True)
  hidden = 2048 if tokens == 16384 else 1024
  problem = dataclasses.replace(
    problem, batch=max(tokens // length, 1), num_heads=hidden // width,
    num_kv_heads=hidden // width,
  )  # fmt: skip
  of_width = tiles.TILES[width]
  tile = of_width.forward if of_queries else of_width.dkv
  schedule = host._schedule(problem, tile)
  rows = tile.stationary
  tiles_of_programs = [row[1 : 1 + row[0]] for row in schedule.table]
  heads, count = problem.batch * problem.num_heads, length // rows
  assert sorted(np.concatenate(tiles_of_programs)) == list(range(heads * count))
  # The beginning and end of a tile cost as much as a block.
  costs = 1 + np.arange(1, count + 1) * rows // tile.streamed
  costs = costs if of_queries else costs[::-1]
  loads = np.array(
    [costs[of_one % count].sum() for of_one in tiles_of_programs]
  )
  assert loads.max() < bound * loads.mean()


@pytest.mark.parametrize(
  ("queries", "keys", "options", "forward", "backward"),
  [
    (8192, 8192, {}, True, True),
    (8192, 8192, {"is_causal": True}, True, True),
    (4096, 4096, {"is_causal": True}, False, True),
    (2048, 2048, {"is_causal": True}, False, False),
    # Of the blocks that two tiles see, one tile alone sees many.
    (8192, 8192, {"window": (255, 0)}, False, False),
    # The second program of a cluster would have no rows.
    (128, 8192, {}, False, True),
    (8192, 1152, {}, False, False),
  ],
)
def test_programs_form_clusters_where_they_see_the_same_blocks(
  queries, keys, options, forward, backward, monkeypatch
):
  problem = tune_triton.example(128, "bfloat16", 1024, **options)
  problem = dataclasses.replace(problem, query_len=queries, key_len=keys)
  found = []

  def run(form, tile, *_, **__):
    found.append(tile.cluster == 2)
    raise StopIteration

  for module in (host.forward, host.fused_backward):
    monkeypatch.setattr(module, "run", run)
  query, key = (jnp.zeros((1, n, 1, 128), "bfloat16") for n in (queries, keys))
  problem = dataclasses.replace(problem, batch=1, num_heads=1, num_kv_heads=1)
  arrays = query, key, key, Operands()
  with pytest.raises(StopIteration):
    host._forward(problem, *arrays)
  form = host._form(problem)
  with pytest.raises(StopIteration):
    host._fused_backward(
      None, Sums(), form, problem, Operands(), query, key, key, query
    )
  assert found == [forward, backward]


@pytest.mark.parametrize("bounds", [(None, 0), (70, None), (33, 5), (0, 0)])
def test_blocks_seen_are_those_that_kernels_visit(bounds):
  count, rows, block, length = 9, 48, 32, 300
  first = np.arange(count) * rows
  low, _, _, high = blocks.visible_blocks(
    first, first + rows - 1, *bounds, block, length
  )
  actual = blocks.count_visible(count, rows, *bounds, block, length)
  np.testing.assert_array_equal(actual, high - low)
