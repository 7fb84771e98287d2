"""The Triton kernels without a GPU: Triton's interpreter on NumPy arrays.

Another process checks that they compile for each card, because in one process a
kernel is either interpreted or compiled.
"""

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import sigattn
from benchmarks import tune_triton
from sigattn import attention
from sigattn.kernels import device, differentiation, dispatch, numerics, xla
from sigattn.kernels import triton as triton_attention
from sigattn.kernels.problem import FLOAT8, HOW_TO_ADD, Operands
from sigattn.kernels.triton import decode, launch, tiles
from tests.kernels import cases, compare

if jax.default_backend() != "cpu":
  pytest.skip("the kernels are not interpreted here", allow_module_level=True)
# Triton has wheels only for Linux.
triton_interpreter = pytest.importorskip("tests.kernels.triton_interpreter")


@pytest.fixture
def interpreter(monkeypatch):
  """Lets Triton's kernels run on the CPU, which is taken for an H100."""
  from sigattn.kernels.triton import kernels

  monkeypatch.setattr(kernels, "tanh", triton_interpreter.tanh)
  monkeypatch.setattr(launch, "start", triton_interpreter.start)
  monkeypatch.setattr(
    triton_attention, "_PACKAGES", {}
  )  # It needs no jax-triton.
  compare.use_only(monkeypatch, "triton", device.Device("NVIDIA H100", 90))


def set_blocks(monkeypatch, size):
  widths = {str(width): (size, size, 4, 2) for width in tiles.WIDTHS}
  passes = dict.fromkeys(tiles.PASSES, widths)
  table = {"90": {"tiles": {"16": passes, "32": passes}}}
  monkeypatch.setattr(tiles, "_table", lambda: table)


def block_size(case):
  """The size of the blocks. The interpreter is faster with few large ones.

  In the cases of BLOCKS some blocks must be full, also within a window.
  """
  if case not in cases.BLOCKS:
    return 64
  _, queries, keys, *_ = case.shape
  window = sum(case.window) if case.window else math.inf
  return 32 if max(queries, keys) >= 150 and window >= 64 else 16


@pytest.mark.parametrize(
  "case", cases.CASES + cases.BLOCKS + cases.HIDDEN_KEYS, ids=str
)
def test_interpreted_output_and_gradients(case, interpreter, monkeypatch):
  set_blocks(monkeypatch, block_size(case))
  arrays, options, cotangent = cases.draw(case)
  actual = compare.run_or_skip(arrays, options, cotangent)
  expected = cases.exact(case, arrays, options, cotangent)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    assert compare.error(actual[name], value) < 2e-6, name


@pytest.mark.parametrize("has_unit", [False, True])
def test_a_kind_without_a_branch_is_an_error(
  has_unit, interpreter, monkeypatch
):
  from sigattn.kernels.triton import kernels

  file = "kernels/triton/kernels.py"
  message = f"'new' is not implemented in {file}, UNITS; {HOW_TO_ADD}"
  if has_unit:
    message = f"is not implemented in {file}, _weights; {HOW_TO_ADD}"
    monkeypatch.setitem(kernels.UNITS, "new", 1.0)
  x = jnp.ones((1, 20, 1, 8))
  problem = tune_triton.example(8, "float32", length=20)
  problem = dataclasses.replace(
    problem, kind="new", batch=1, num_heads=1, num_kv_heads=1
  )
  with pytest.raises(Exception, match=re.escape(message)):
    triton_attention.attention(x, x, x, Operands(), problem)


@pytest.mark.parametrize("bias", [-16.0, 2.0])
@pytest.mark.parametrize("width", [8, 80])
def test_interpreted_float16(bias, width, interpreter):
  """It tests both forms of the sigmoid, and a width that is no power of two."""
  case = cases.Case(
    "half", batch=1, queries=40, heads=1, width=width, logit_bias=bias
  )
  compare.assert_16_bit(case, "float16")


@pytest.mark.parametrize(
  "case", cases.SMALL_WEIGHTS + cases.WIDE_RANGE, ids=str
)
def test_interpreted_float16_of_normalized_rows(case, interpreter):
  compare.assert_16_bit(case, "float16")


@pytest.fixture
def decoding(monkeypatch):
  """Lets the decode kernel take every problem.

  It is a function of splits.
  """

  def use(splits):
    small = decode.Tile(16, 16, splits, 4, 2)
    monkeypatch.setattr(decode, "tile", lambda *_, **__: small)

  monkeypatch.setattr(decode, "MOST_QUERIES", 99)
  monkeypatch.setattr(decode, "LEAST_KEYS", 1)
  return use


def output(arrays, options):
  return jax.jit(lambda *x: attention.dot_product_attention(*x, **options))(
    *arrays
  )


DECODED = (
  "one_token", "one_kv_head", "bias_example_grouped", "cross_short",
  "alibi_causal_cross", "causal_window", "lengths_cross_grouped",
  "normalized_lengths", "normalized_relu2", "query_vector", "key_vector",
  "shared_vectors", "normalized_vectors", "bias_of_one_key", "offset_before",
  "offset_behind", "offsets", "offset_one_query", "normalized_offsets",
  "silu_lengths", "blocks_offsets",
)  # fmt: skip


# The last of several programs adds up their shares of a row.
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", DECODED)
def test_interpreted_decoding(name, splits, interpreter, decoding):
  decoding(splits)
  (case,) = [c for c in cases.CASES + cases.BLOCKS if c.name == name]
  arrays, options, cotangent = cases.draw(case)
  expected = cases.exact(case, arrays, options, cotangent)["out"]
  assert compare.error(output(arrays, options), expected) < 2e-6


def test_interpreted_decoding_in_float16(interpreter, decoding):
  decoding(3)
  case = cases.Case(
    "half", batch=1, queries=3, keys=70, heads=4, kv_heads=2, width=80,
    logit_bias=-16.0,
  )  # fmt: skip
  compare.assert_16_bit(case, "float16")


@pytest.mark.parametrize("normalize", [False, True])
def test_decoding_loads_no_keys_that_are_not_seen(
  normalize, interpreter, decoding
):
  """NaN in such keys would survive a product with weights of zero."""
  decoding(3)
  rng = np.random.default_rng(0)
  query = rng.standard_normal((2, 1, 2, 8), np.float32)
  key, value = rng.standard_normal((2, 2, 90, 1, 8), np.float32)
  place, window = np.array([80, 41]), 30
  options = dict(
    is_causal=True, local_window_size=(window, 0), query_offset=place,
    normalize=normalize,
  )  # fmt: skip
  clean = output((query, key, value), options)
  for example, last in enumerate(place):
    for x in key, value:
      x[example, last + 1 :] = x[example, : last - window] = np.nan
  np.testing.assert_array_equal(output((query, key, value), options), clean)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["sigmoid", "normalized", "softmax"])
def test_interpreted_decoding_from_8_bits(
  kind, dtype, interpreter, decoding, started
):
  """The kernel reads the rounded keys and values, and adds no other error."""
  decoding(3)
  rng = np.random.default_rng(0)
  query = rng.standard_normal((2, 3, 4, 8)).astype(dtype)
  key, value = compare.rounded(
    rng.standard_normal((2, 2, 70, 2, 8), np.float32)
  )
  logits = np.einsum(
    "btkgh,bskh->bkgts",
    query.reshape(2, 3, 2, 2, 8).astype("float64"), key.astype("float64"),
  ) / np.sqrt(8)  # fmt: skip
  options = dict(logit_bias=-2.0, normalize=True)
  weights = 1 / (1 + np.exp(2.0 - logits))
  if kind == "softmax":
    options, weights = dict(kind=kind), np.exp(logits)
  if kind == "sigmoid":
    options["normalize"] = False
  else:
    weights /= weights.sum(-1, keepdims=True)
  wanted = np.einsum("bkgts,bskh->btkgh", weights, value.astype("float64"))
  found = output((query, key, value), options)
  assert [name for name, _ in started] == ["decode"]
  # Only the output is rounded to bfloat16. The interpreter truncates it.
  bound = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
  assert compare.error(found, wanted.reshape(query.shape)) < bound


@pytest.mark.parametrize("page", [None, 16])
def test_a_new_token_is_rounded_to_8_bits(page, interpreter, decoding):
  decoding(2)
  compare.assert_new_token_is_rounded(page)


def test_older_cards_cast_8_bits_first(interpreter, started, monkeypatch):
  monkeypatch.setattr(device, "current", lambda: device.Device("A10", 86))
  query = np.ones((1, 1, 2, 8), np.float32)
  key = compare.rounded(np.ones((1, 128, 2, 8)) / 3)
  found = output((query, key, key), {})
  # The kernel is the same, so it is traced once.
  wanted = output((query, *2 * [key.astype("float32")]), {})
  assert [name for name, _ in started] == ["decode"]
  np.testing.assert_array_equal(found, wanted)
  reason = "triton: float8_e4m3fn needs a GPU since Ada .8.9., device is A10"
  with pytest.raises(NotImplementedError, match=reason):
    output((query, key, key), {"implementation": "triton"})


PAGED = (
  ({}, "float32"), (dict(normalize=True), FLOAT8),
  (dict(local_window_size=(20, 0)), "float32"),
  (
    dict(kind="relu", alibi_slopes=np.ones(4, np.float32), query_offset=30),
    "float32",
  ),
  (
    dict(
      query_logit_bias=-np.ones(3, np.float32),
      key_logit_bias=np.linspace(-1, 1, 80, dtype="float32"),
    ),
    "float32",
  ),
)  # fmt: skip


@pytest.mark.parametrize(("options", "dtype"), PAGED, ids=str)
def test_interpreted_pages_change_no_bit(
  options, dtype, interpreter, decoding, started
):
  """Pages and numbers that a row does not use are not read."""
  decoding(3)
  arrays, whole = cases.draw_paged([40, 64, 37, 0], shared=2)
  query, keys, values, table, lengths = arrays
  keys, values, whole = (x.astype(dtype) for x in (keys, values, whole))
  arrays = query, keys, values, table, lengths
  found = jax.jit(lambda *x: sigattn.paged_attention(*x, **options))(*arrays)
  (paged,) = [constants for _, constants in started]
  assert paged["PAGE"] == cases.PAGE
  place = dict(is_causal=True, query_offset=lengths - query.shape[1])
  wanted = sigattn.dot_product_attention(
    query, *whole, key_value_seq_lengths=lengths, **place | options
  )
  assert [name for name, _ in started] == ["decode"] * 2
  np.testing.assert_array_equal(found, wanted)


def test_paged_attention_differentiated_and_vmapped(interpreter, decoding):
  decoding(2)
  arrays, _ = cases.draw_paged([40, 20])
  query, keys, values, table, lengths = arrays

  def attend(query, keys, values, implementation=None):
    return sigattn.paged_attention(
      query, keys, values, table, lengths, normalize=True,
      implementation=implementation,
    )  # fmt: skip

  pages = np.nan_to_num(keys), np.nan_to_num(values)
  found, pull_back = jax.vjp(attend, query, *pages)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      dispatch, "IMPLEMENTATIONS",
      dispatch.IMPLEMENTATIONS | {"xla": "sigattn.kernels.xla"},
    )  # fmt: skip
    by_xla = functools.partial(attend, implementation="xla")
    wanted, pull_wanted = jax.vjp(by_xla, query, *pages)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  for x, y in zip(*(f(found) for f in (pull_back, pull_wanted)), strict=True):
    assert compare.error(x, y) < 2e-6
  both = jax.vmap(attend, in_axes=(0, None, None))(
    np.stack([query, -query]), *pages
  )
  np.testing.assert_allclose(both[0], found, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(both[1], attend(-query, *pages))
  apart = jax.vmap(attend, in_axes=(None, 0, None))(
    query, np.stack([pages[1], pages[0]]), pages[1]
  )
  np.testing.assert_array_equal(apart[1], both[0])


def test_many_queries_gather_their_pages(interpreter, started):
  """The decode kernel computes them only if `implementation` names it."""
  arrays, _ = cases.draw_paged([40, 64], queries=17)
  wanted = sigattn.paged_attention(*arrays)
  assert {name for name, _ in started} == {"forward"}
  started.clear()
  found = sigattn.paged_attention(*arrays, implementation="triton")
  assert {name for name, _ in started} == {"decode"}
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


SOFTMAX = {
  "plain": {},
  "window": dict(is_causal=True, local_window_size=(40, 0)),
  "alibi": dict(alibi_slopes=np.array([0.5, 0.1], np.float32), is_causal=True),
  "hidden": dict(key_logit_bias=np.where(np.arange(150) % 3, 30.0, -np.inf)),
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", SOFTMAX)
def test_interpreted_softmax(name, splits, interpreter, decoding):
  """The decode kernel computes a few queries as jax.nn does."""
  decoding(splits)
  rng = np.random.default_rng(0)
  query = 3 * rng.standard_normal((2, 3, 2, 8), np.float32)
  key, value = rng.standard_normal((2, 2, 150, 1, 8), np.float32)
  lengths = np.array([149, 20])
  options = dict(kind="softmax", key_value_seq_lengths=lengths) | SOFTMAX[name]
  if {"is_causal", "local_window_size"} & {*options}:
    options["query_offset"] = lengths - 3

  def attend(implementation, *arrays):
    return sigattn.dot_product_attention(
      *arrays, implementation=implementation, **options
    )

  arrays = query, key, value
  wanted = attend("xla", *arrays)
  poisoned = key.copy(), value.copy()
  for x in poisoned:
    x[0, 149:] = x[1, 20:] = np.nan
  assert compare.error(attend("triton", query, *poisoned), wanted) < 2e-6


def test_softmax_differentiated_vmapped_and_in_pages(
  interpreter, decoding, started
):
  decoding(2)
  arrays, whole = cases.draw_paged([40, 20, 30])
  query, keys, values, table, lengths = arrays
  whole = np.nan_to_num(whole)

  def attend(implementation, query, key, value, length):
    return sigattn.dot_product_attention(
      query, key, value, kind="softmax", key_value_seq_lengths=length,
      is_causal=True, query_offset=length - 3, implementation=implementation,
    )  # fmt: skip

  ours = functools.partial(attend, "triton")
  wanted = attend("xla", query, *whole, lengths)
  found = jax.vmap(ours)(
    query[:, None], *whole[:, :, None], jnp.asarray(lengths)[:, None]
  )
  np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-5, atol=1e-6)
  assert {x["PAGE"] for _, x in started} == {None}
  started.clear()
  paged = sigattn.paged_attention(*arrays, kind="softmax")
  assert {x["PAGE"] for _, x in started} == {cases.PAGE}
  np.testing.assert_allclose(paged, wanted, rtol=1e-5, atol=1e-6)

  def loss(implementation, query):
    return (attend(implementation, query, *whole, lengths) ** 2).sum()

  found, wanted = (jax.grad(functools.partial(loss, x))(query)
                   for x in ("triton", "xla"))  # fmt: skip
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (dict(queries=17), "17 queries; at most 16"),
    (dict(return_residual=True), "return_residual=True is not implemented"),
    (dict(bias=np.ones((2, 150), np.float32)), "a dense bias is not"),
  ],
)
def test_the_softmax_that_the_kernel_refuses(change, reason, interpreter):
  """If `implementation` does not name the kernel, jax.nn computes it."""
  query = np.ones((1, change.pop("queries", 2), 2, 8), np.float32)
  key = np.ones((1, 150, 2, 8), np.float32)
  options = dict(kind="softmax") | change
  with pytest.raises(NotImplementedError, match=reason):
    sigattn.dot_product_attention(
      query, key, key, implementation="triton", **options
    )
  sigattn.dot_product_attention(query, key, key, **options)


def test_one_query_takes_the_decode_kernel(interpreter, started):
  """It also does in loops, under vmap and with gradients. 17 queries do not."""
  rng = np.random.default_rng(0)
  query = rng.standard_normal((2, 17, 2, 8), np.float32)
  key, value = rng.standard_normal((2, 2, 200, 1, 8), np.float32)

  def attend(query, key, value):
    return attention.dot_product_attention(query, key, value, is_causal=True)

  def one(query, place):
    return attention.dot_product_attention(
      query, key, value, is_causal=True, query_offset=place
    )

  whole = attend(query, key, value)
  assert {name for name, _ in started} == {"forward"}
  started.clear()

  @jax.jit
  def loop(query):
    def step(place, out):
      token = jax.lax.dynamic_slice_in_dim(query, place, 1, 1)
      return jax.lax.dynamic_update_slice_in_dim(
        out, one(token, place), place, 1
      )

    return jax.lax.fori_loop(0, 3, step, jnp.zeros_like(query))[:, :3]

  tokens = jnp.moveaxis(query[:, :3, None], 1, 0)
  vmapped = jax.vmap(one, out_axes=1)(tokens, jnp.arange(3))
  for found in loop(query), vmapped[:, :, 0]:
    np.testing.assert_allclose(found, whole[:, :3], rtol=1e-5, atol=1e-7)
  assert {name for name, _ in started} == {"decode"}
  jax.grad(lambda x: one(x, 5).sum())(query[:, :1])
  assert {name for name, _ in started} >= {"backward_q"}


def test_interpreted_nan_in_padding_leaks_nowhere(interpreter, monkeypatch):
  set_blocks(monkeypatch, 16)
  compare.assert_nan_in_padding_leaks_nowhere("lengths_cross_grouped")


@pytest.mark.parametrize("mask", ["causal", "window", "segments"])
def test_interpreted_empty_blocks_are_skipped(mask, interpreter, monkeypatch):
  """NaN in such a block would survive a product with weights of zero."""
  set_blocks(monkeypatch, 16)
  case = cases.Case(
    "skipped", batch=1, queries=64, heads=1, causal=mask == "causal",
    window=(8, 8) if mask == "window" else None,
  )  # fmt: skip
  arrays, options, cotangent = cases.draw(case)
  if mask == "segments":
    ids = np.arange(64)[None] // 32
    options |= {"query_segment_ids": ids, "key_value_segment_ids": ids}
  clean = compare.run(arrays, options, cotangent)
  first, last = [x.copy() for x in arrays], [x.copy() for x in arrays]
  first[0][:, :16] = last[1][:, 48:] = last[2][:, 48:] = np.nan
  # Queries 0 to 31 do not see keys from 48 on. Queries 0 to 15 do not see keys
  # from 32 on, or from 16 on under a causal mask.
  actual = compare.run(last, options, cotangent)
  for name in ("out", "query"):
    np.testing.assert_array_equal(actual[name][:, :32], clean[name][:, :32])
  actual = compare.run(first, options, cotangent)
  for name in ("key", "value"):
    np.testing.assert_array_equal(actual[name][:, 32:], clean[name][:, 32:])
  assert np.isnan(actual["key"][:, :16]).any()


def test_jit_vmap_and_checkpoint_change_nothing(interpreter, monkeypatch):
  set_blocks(monkeypatch, 16)
  case = cases.Case("vmapped", queries=20, heads=2, kv_heads=1, lengths=True)
  arrays, options, cotangent = cases.draw(case)
  lengths = options.pop("key_value_seq_lengths")
  del options["query_seq_lengths"]
  bias = jnp.array([-3.0, -2.0])

  def f(query, key, value, bias, lengths):
    return attention.dot_product_attention(
      query, key, value, logit_bias=bias, key_value_seq_lengths=lengths
    )

  def one(query, key, value, bias, length):
    return f(query, key, value, bias, length[None])

  def with_gradients(g):
    out, pull_back = jax.vjp(lambda *x: g(*x, lengths), *arrays, bias)
    return out, *pull_back(jnp.asarray(cotangent))

  expected = with_gradients(f)
  vmapped = jax.vmap(one, in_axes=(0, 0, 0, None, 0))
  for g in (jax.jit(f), jax.checkpoint(f), vmapped):
    for actual, value in zip(with_gradients(g), expected, strict=True):
      np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-6)


def test_meshes_split_batch_and_heads_without_gathering():
  subprocess.run(
    [sys.executable, "-m", "tests.kernels.on_four_devices"], check=True
  )


def test_decoding_on_the_mesh_of_the_training_program():
  subprocess.run(
    [sys.executable, "-m", "tests.kernels.decode_on_four_devices"], check=True
  )


@pytest.mark.parametrize(
  ("card", "change", "reason"),
  [
    (90, {}, ""),
    (80, {"head_dim": 257}, "head_dim=257; at most 256"),
    (90, {"dtype": "float64"}, "float64 is not implemented"),
    (89, {"key_dtype": FLOAT8}, ""),
    (75, {}, "needs an NVIDIA GPU since Ampere (8.0), device is Testing"),
    (None, {}, "needs an NVIDIA GPU since Ampere (8.0), device is Testing"),
  ],
)
def test_what_it_declines(card, change, reason, monkeypatch):
  compare.use_only(monkeypatch, "triton", device.Device("Testing", card))
  monkeypatch.setattr(triton_attention, "_PACKAGES", {})
  problem = dataclasses.replace(tune_triton.example(64, "bfloat16"), **change)
  assert triton_attention.unsupported(problem) == reason


def test_it_names_the_package_that_is_missing(monkeypatch):
  compare.use_only(monkeypatch, "triton", device.Device("NVIDIA A100", 80))
  monkeypatch.setattr(triton_attention, "_PACKAGES", {"no_such": "no-such"})
  reason = triton_attention.unsupported(tune_triton.example(64, "bfloat16"))
  assert reason == "needs the package no-such (requirements-gpu.txt)"


def test_short_sequences_have_tiles_of_their_own(tmp_path, monkeypatch):
  """The table has them beside the other tiles, for up to 256 tokens."""
  monkeypatch.setattr(device, "current", lambda: device.Device("A10", 86))
  path, short_tile = tmp_path / "tiles.json", tiles.Tile(64, 32, 2, 2)
  tune_triton.write({("16", "forward", 64): short_tile}, short=True, path=path)
  table = json.loads(path.read_text())
  assert table["86"]["device"] == "A10"
  assert table["90"] == tiles._table()["90"]
  monkeypatch.setattr(tiles, "_table", lambda: table)

  def tile(direction, length):
    problem = tune_triton.example(64, "bfloat16", length)
    return tiles.tile(problem, direction, 86)

  assert tile("forward", 256) == short_tile
  assert tile("forward", 257) != short_tile
  assert tile("backward_q", 256) == tile("backward_q", 257)


def test_the_fastest_tile_that_fits_what_it_was_timed_on(monkeypatch):
  monkeypatch.setattr(device, "current", lambda: device.Device("A10", 86))
  spilling, half_timed, first, second = (
    tiles.Tile(block, 32, 4, 2) for block in (16, 32, 64, 128)
  )
  compiled = []

  def resources(problem, direction, tile, capability):
    compiled.append((problem.query_len, problem.is_causal, tile))
    short = problem.query_len == 196
    return tune_triton.Resources(99, 8 * (short and tile == spilling), 0)

  monkeypatch.setattr(tune_triton, "resources", resources)
  full, causal = (
    tune_triton.Job("forward", 64, "bfloat16", is_causal, 196, None)
    for is_causal in (False, True)
  )
  times = {
    full._replace(tile=spilling): 1.0, causal._replace(tile=spilling): 1.0,
    full._replace(tile=half_timed): 1.0,
    full._replace(tile=second): 2.0, causal._replace(tile=second): 4.0,
    full._replace(tile=first): 3.0, causal._replace(tile=first): 2.0,
  }  # fmt: skip
  assert tune_triton.fastest(times) == {("16", "forward", 64): first}
  assert len(compiled) == len(set(compiled)), "one compiled twice"
  assert {tile for *_, tile in compiled} == {spilling, first}


@pytest.mark.parametrize(
  "what",
  [
    "--cards 86 90 --widths 64 --examples causal short",
    "--cards 90 --widths 64 --examples causal --kinds silu",
    # Decoding, with its gradient and with pages.
    "--cards 90 --widths 64 128 --examples token 16-tokens",
  ],
)
def test_tiles_compile_without_spills(what):
  """It compiles some of them; benchmarks.tune_triton --check compiles all."""
  environment = {k: v for k, v in os.environ.items() if "INTERPRET" not in k}
  command = f"benchmarks.tune_triton --check --dtypes bfloat16 {what}"
  subprocess.run(
    [sys.executable, "-m", *command.split()], env=environment, check=True
  )


@pytest.mark.parametrize(
  ("bias", "alibi", "change", "exact"),
  [
    (-8.0, False, {}, False), (-11.0, False, {}, False),
    (-11.1, False, {}, True), (-16.0, False, {}, True),
    (-8.0, True, {}, False), (-9.1, True, {}, True), (None, False, {}, True),
    (-8.0, False, dict(dtype="float16"), False),
    (-9.1, False, dict(dtype="float16"), True),
    (-3.0, True, dict(dtype="float16"), True),
    # Only keys that are far away for ALiBi are visible.
    (-3.0, True, dict(is_causal=True), False),
    (-3.0, True, dict(is_causal=True, query_len=64), True),
    (-3.0, True, dict(window=(99, 0), key_len=64), True),
    (-3.0, True, dict(window=(99, 0), key_len=4000), False),
  ],
)  # fmt: skip
def test_which_biases_take_the_exact_sigmoid(bias, alibi, change, exact):
  heads = jax.ShapeDtypeStruct((1, 32), "float32")
  operands = dispatch.Operands(
    alibi_slopes=heads if alibi else None,
    logit_bias=heads if bias is None else None,
  )
  problem = tune_triton.example(
    64, "bfloat16", operands=operands, logit_bias=bias
  )
  problem = dataclasses.replace(problem, **change)
  assert numerics.exact_sigmoid(problem) == exact


@pytest.mark.parametrize(
  ("asked", "precision"),
  [(None, "ieee"), ("highest", "ieee"), ("tensorfloat32", "tf32"),
   ("high", "tf32x3")],
)  # fmt: skip
def test_float32_is_exact_unless_asked(asked, precision, monkeypatch):
  seen = []

  def start(kernel, arrays, outs, tile, count, constants):
    seen.append(constants["PRECISION"])
    return [jnp.zeros(x.shape, x.dtype) for x in outs]

  monkeypatch.setattr(launch, "start", start)
  monkeypatch.setattr(triton_attention, "_PACKAGES", {})
  card = device.Device("NVIDIA A100", 80)
  compare.use_only(monkeypatch, "triton", card)
  x = jnp.ones((1, 16, 1, 16))
  with jax.default_matmul_precision(asked):
    attention.dot_product_attention(x, x, x)
  assert seen == [precision]


@pytest.mark.parametrize(
  "name", ["grouped", "lengths_cross_grouped", "normalized_vectors", "offsets"]
)
def test_interpreted_tangents(name, interpreter):
  (case,) = [c for c in cases.CASES if c.name == name]
  compare.assert_tangents(case, 5e-6)


@pytest.fixture
def started(monkeypatch):
  """The (name, constants) of each kernel that is started.

  Reverse-mode differentiation of the portable form fails.
  """
  calls = []

  def start(kernel, arrays, outs, tile, count, constants, *places, **named):
    calls.append((kernel.__name__, constants))
    return triton_interpreter.start(
      kernel, arrays, outs, tile, count, constants, *places, **named
    )

  def refuse(*_):
    raise AssertionError("the portable form runs")

  monkeypatch.setattr(launch, "start", start)
  monkeypatch.setattr(xla, "PASSES", differentiation.Passes(refuse, refuse))
  return calls


def _scanned(attend):
  def loss(x):
    def step(x, _):
      return attend(x), None

    return (jax.lax.scan(step, x, None, length=2)[0] ** 2).sum()

  return loss


WAYS = {
  "grad": lambda f: lambda x: (f(x) ** 2).sum(),
  "checkpoint": lambda f: jax.checkpoint(lambda x: (f(x) ** 2).sum()),
  "scan": _scanned,
  "scan of checkpoint": lambda f: _scanned(jax.checkpoint(f)),
  "vmap": lambda f: lambda x: (jax.vmap(f)(x[:, None]) ** 2).sum(),
  "policy": lambda f: jax.checkpoint(
    lambda x: (f(x) ** 2).sum(),
    policy=jax.checkpoint_policies.save_only_these_names("attention"),
  ),
}  # fmt: skip


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_the_backward_kernels(
  way, normalize, interpreter, started, monkeypatch
):
  case = cases.Case("reach", queries=6, heads=2)
  (x, *_), *_ = cases.draw(case)

  def loss():  # a new function each time, so that no cache of JAX has it
    return WAYS[way](
      lambda x: attention.dot_product_attention(x, x, x, normalize=normalize)
    )

  found = jax.jit(jax.grad(loss()))(x)
  names = [name for name, _ in started]
  assert {*names} == {"forward", "backward_q", "backward_kv"}
  monkeypatch.undo()
  wanted = jax.grad(loss())(x)
  assert compare.error(found, wanted) < 2e-6
  if way == "policy":  # The saved output is not computed again.
    assert names.count("forward") == 1


@pytest.mark.parametrize("name", ["linearize", "vjp of jit", "jvp then grad"])
def test_a_linear_map_is_transposed_to_the_backward_kernels(
  name, interpreter, started
):
  case = cases.Case("reach", queries=6, heads=2)
  (x, *_), *_ = cases.draw(case)

  def attend(x):
    return attention.dot_product_attention(x, x, x)

  if name == "linearize":
    out, linear = jax.linearize(attend, jnp.asarray(x))
    jax.linear_transpose(linear, x)(out)
  elif name == "vjp of jit":
    out, pull_back = jax.vjp(jax.jit(attend), x)
    pull_back(out)
  else:
    jax.grad(lambda x: attend(jax.jit(attend)(x)).sum())(x)
  assert {"backward_q", "backward_kv"} <= {name for name, _ in started}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
@pytest.mark.parametrize(
  ("name", "sums"),
  [("query", ()), ("logit_bias", ("keys",)), ("alibi_slopes", ("slopes",)),
   ("query_logit_bias", ("rows",)), ("key_logit_bias", ("keys",))],
)  # fmt: skip
def test_sums_are_computed_only_for_what_is_differentiated(
  name, sums, wrap, interpreter, started
):
  case = cases.Case("reach", queries=6, heads=2)
  arrays, *_ = cases.draw(case)
  arrays = dict(zip(("query", "key", "value"), arrays, strict=True))
  arrays |= dict(
    logit_bias=jnp.zeros(2), alibi_slopes=jnp.ones(2),
    query_logit_bias=jnp.ones(6), key_logit_bias=jnp.ones(6),
  )  # fmt: skip

  @wrap
  def loss(x):
    return attention.dot_product_attention(**arrays | {name: x}).sum()

  jax.grad(loss)(arrays[name])
  constants = dict(started)
  of_queries, of_keys = constants["backward_q"], constants["backward_kv"]
  assert of_queries["SUMS"] == ("rows" in sums)
  assert of_queries["SLOPE_SUMS"] == ("slopes" in sums)
  assert of_keys["SUMS"] == ("keys" in sums)


def test_a_forget_gate_in_16_bits_has_an_exact_gradient(interpreter):
  compare.assert_a_gate_in_16_bits_has_an_exact_gradient("float16")


@pytest.mark.parametrize("normalize", [False, True])
def test_second_derivatives_behind_the_kernels(normalize, interpreter):
  case = cases.Case("second", batch=1, queries=4, heads=2, width=4)
  (query, key, value), *_ = cases.draw(case)

  def loss(implementation, query, bias):
    out = attention.dot_product_attention(
      query, key, value, logit_bias=bias, normalize=normalize,
      implementation=implementation,
    )  # fmt: skip
    return (out**2).sum()

  def products(implementation):
    def gradient(*x):
      return jax.grad(functools.partial(loss, implementation), (0, 1))(*x)

    x = query, jnp.array([-1.0, 0.5])
    return (
      jax.jvp(gradient, x, x)[1],
      jax.vjp(gradient, *x)[1](x),
      jax.jacfwd(functools.partial(loss, implementation))(*x),
    )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      dispatch, "IMPLEMENTATIONS",
      dispatch.IMPLEMENTATIONS | {"xla": "sigattn.kernels.xla"},
    )  # fmt: skip
    found, wanted = products("triton"), products("xla")
  for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    assert compare.error(x, y) < 5e-6
    assert abs(y).max() > 1e-4


def test_a_traced_scale_and_a_traced_bias(interpreter):
  case = cases.Case("traced", queries=6, heads=2, scale=0.7, logit_bias=-0.5)
  arrays, _, cotangent = cases.draw(case)

  @jax.jit
  def gradients(scale, bias, *arrays):
    def attend(scale, bias, *arrays):
      return attention.dot_product_attention(
        *arrays, scale=scale, logit_bias=bias
      )

    out, pull_back = jax.vjp(attend, scale, bias, *arrays)
    return out, *pull_back(jnp.asarray(cotangent))

  options = dict(logit_bias=case.logit_bias)
  wanted = cases.exact(case, arrays, options, cotangent)
  out, d_scale, d_bias, *grads = gradients(0.7, -0.5, *arrays)
  for name, found in zip(
    ("out", "query", "key", "value"), (out, *grads), strict=True
  ):
    assert compare.error(found, wanted[name]) < 2e-6, name
  # scale multiplies the query, so scale * d_scale = sum(query * d_query).
  d_log = (wanted["query"] * arrays[0]).sum()
  np.testing.assert_allclose(0.7 * d_scale, d_log, rtol=1e-4)
  heads = dataclasses.replace(case, logit_bias=None, bias_per_head=("N",))
  options = dict(logit_bias=np.full(2, -0.5, np.float32))
  of_heads = cases.exact(heads, arrays, options, cotangent)["logit_bias"]
  np.testing.assert_allclose(d_bias, of_heads.sum(), rtol=1e-4)


def test_the_cache_of_other_triton_kernels_is_put_back(monkeypatch):
  """jax_triton empties the variable when it is imported."""
  for before in (None, "/somewhere"):
    if before is None:
      monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    else:
      monkeypatch.setenv("TRITON_CACHE_DIR", before)
    with launch.triton_cache_dir():
      os.environ["TRITON_CACHE_DIR"] = ""
    assert os.environ.get("TRITON_CACHE_DIR") == before


def test_calls_that_xla_may_record_in_a_graph(monkeypatch):
  """What jax_triton writes for its own function is changed, if we call it.

  jax_triton needs the CUDA plugin of jax, so a primitive that writes such a
  call takes its place. tests/test_token_step.py looks at the graphs on a GPU.
  """
  start_kernel = jax.extend.core.Primitive("start_kernel")
  start_kernel.def_abstract_eval(lambda x, **_: x)

  def lower(backend, ctx, *arrays, custom_call_target_name):
    assert backend == "backend"
    rule = jax.ffi.ffi_lowering(
      custom_call_target_name, api_version=2, backend_config=b"kernel"
    )
    return rule(ctx, *arrays)

  triton_lib = types.SimpleNamespace(
    triton_kernel_call_p=start_kernel,
    triton_kernel_call_lowering=lower,
    get_cuda_backend="backend",
  )
  package = types.SimpleNamespace(triton_lib=triton_lib)
  monkeypatch.setitem(sys.modules, "jax_triton", package)
  launch._write_calls_of_target.__wrapped__()

  def call(x):
    for target in (launch._TARGET, "another"):
      x = start_kernel.bind(x, custom_call_target_name=target)
    return x

  text = (
    jax.jit(call).trace(jnp.ones(4)).lower(lowering_platforms=("cuda",))
  ).as_text()
  ours, another = (x for x in text.splitlines() if "custom_call" in x)
  assert 'backend_config = {opaque = "kernel"}' in ours
  assert "api_version = 4" in ours
  assert "@another" in another
  assert 'backend_config = "kernel"' in another
  assert "api_version = 2" in another


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bias", [-16.0, -3.0])
def test_interpreted_row_sums_and_their_gradient(
  bias, dtype, interpreter, monkeypatch
):
  """Small sums keep their precision, and shards of the keys can be joined."""
  set_blocks(monkeypatch, 16)
  case = cases.Case("sums", batch=1, queries=20, heads=2, logit_bias=bias)
  (query, key, value), _, cotangent = cases.draw(case, dtype)

  def attend(query, key, value):
    return attention.dot_product_attention(
      query, key, value, logit_bias=bias, normalize=True, return_residual=True
    )

  def joined(query, key, value):
    parts = [attend(query, key[:, i::2], value[:, i::2]) for i in range(2)]
    total = sum(sums for _, sums in parts)
    share = [(out, (sums / total)[..., None]) for out, sums in parts]
    return sum((out * s for out, s in share)).astype(dtype), total

  def with_gradients(f):
    (out, sums), pull_back = jax.vjp(f, query, key, value)
    return out, sums, *pull_back((jnp.asarray(cotangent), jnp.cos(sums) * 1e3))

  bound = 3e-6 if dtype == "float32" else 5e-3
  whole, parts = with_gradients(attend), with_gradients(joined)
  for found, wanted in zip(parts, whole, strict=True):
    assert compare.error(found, wanted) < bound
