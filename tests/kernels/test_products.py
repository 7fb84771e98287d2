"""All products of a token between two calls of attention, in one kernel.

On a GPU:
  JAX_PLATFORMS=cuda python -m pytest tests/kernels/test_products.py
"""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.kernels import device, products
from tests.kernels import product_cases

on_cpu = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="the kernels are not interpreted here"
)
on_gpu = pytest.mark.skipif(
  device.current().capability != 90, reason="needs a Hopper GPU"
)
HOPPER = device.Device("NVIDIA H200", 90, 132)


@on_cpu
@pytest.mark.parametrize(
  "case",
  [
    "1 swiglu hybrid 1", "1 gelu pre 0", "3 none hybrid 0", "8 swiglu pre 1",
    "17 swiglu hybrid 1",
  ],
)  # fmt: skip
def test_interpreted(case):
  """It runs in its own process, because a missing arrival hangs.

  The simulated devices give XLA a thread for each warpgroup.
  """
  devices = " --xla_force_host_platform_device_count=8"
  subprocess.run(
    [sys.executable, "-m", "tests.kernels.products_interpreter", *case.split()],
    env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + devices},
    timeout=120,
    check=True,
  )


@pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None,
  reason="needs the compiler of jax[cuda13]",
)
@pytest.mark.parametrize(
  "case",
  [
    "1 hybrid 1 bfloat16 256 384 768", "1 pre 0 float16 128 384 384",
    "3 pre 0 bfloat16 256 384 384", "17 hybrid 1 float16 256 384 768",
    "32 hybrid 1 bfloat16 256 384 768",
  ],
)  # fmt: skip
def test_compiled_code_of_all_programs(case):
  """Layouts, addresses and meetings, without a GPU."""
  module = "tests.kernels.products_on_ptx_machine"
  subprocess.run(
    [sys.executable, "-m", module, *case.split()],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    timeout=300,
    check=True,
  )


@on_cpu
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 32])
@pytest.mark.parametrize(
  "sizes",
  [
    (128, 128, 384), (256, 384, 768), (640, 1152, 1920), (768, 2048, 2304),
    (2048, 5632, 6144), (2048, 5632, 6144, 1024), (4096, 11008, 12288),
    (4096, 12288, 12288),
  ],
)  # fmt: skip
def test_lowered_for_a_gpu(rows, sizes, monkeypatch):
  """Layouts are valid, shared memory suffices, and layers share a kernel."""
  monkeypatch.setattr(device, "current", lambda: HOPPER)

  @jax.jit
  def two_layers(counts):
    def array(*shape):
      return jnp.zeros(shape, jnp.bfloat16)

    x, y, weights = product_cases.build(
      array, jnp.zeros, rows, "swiglu", "hybrid", True, sizes
    )
    assert not products.unsupported(x, weights)
    x, heads, counts = products.run(x, y, weights, counts, 0)
    return products.run(x, heads[:, : y.shape[1]], weights, counts, 1)

  counts = jax.ShapeDtypeStruct((1,), "int32")
  lowered = two_layers.trace(counts).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({}, ""),
    ({"rows": 33}, "33 rows"),
    ({"dtype": "float32"}, "float32"),
    ({"activation": "gelu_exact"}, "gelu_exact"),
    ({"sizes": (192, 384, 512)}, "multiple of 128"),
    ({"sizes": (8192, 128, 128)}, "4096 features"),
    ({"card": device.Device("NVIDIA A100", 80, 108)}, "Hopper"),
    ({"card": device.Device("NVIDIA H100", 90)}, "multiprocessors"),
  ],
)
def test_what_is_not_supported(change, reason, monkeypatch):
  change = dict(change)
  card = change.pop("card", HOPPER)
  monkeypatch.setattr(device, "current", lambda: card)
  options = dict(rows=2, activation="swiglu", norms="pre", has_next=True)
  x_BD, _, weights = product_cases.draw(**options | change)
  found = products.unsupported(x_BD, weights)
  assert reason in found
  assert bool(found) == bool(reason)


def test_no_second_process_shares_the_gpu(tmp_path, monkeypatch):
  """With MPS two programs that wait could each have a part of the GPU."""
  monkeypatch.setattr(device, "current", lambda: HOPPER)
  monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
  x_BD, _, weights = product_cases.draw(2, "swiglu", "pre", True)
  assert not products.unsupported(x_BD, weights)
  (tmp_path / "control").touch()
  assert "MPS" in products.unsupported(x_BD, weights)


@on_cpu
@pytest.mark.parametrize("counts", [[128, 704, 128, 384], [8, 16, 8, 24]])
def test_units_of_one_row(counts):
  """Each belongs to one program, and no program has two more than another."""
  from sigattn.kernels.mosaic import one_row

  def of_program(_):
    found = []
    for deal in one_row.Deal.of(counts, 132):
      numbers = deal.unit(jnp.arange(max(counts)))
      found.append(
        jnp.where(jnp.arange(max(counts)) < deal.count(), numbers, -1)
      )
    return found

  programs = jnp.arange(132)
  found = jax.vmap(of_program, axis_name="program")(programs)
  for count, units_PI in zip(counts, found, strict=True):
    dealt = np.sort(units_PI[units_PI >= 0])
    np.testing.assert_array_equal(dealt, np.arange(count))
  of_each = sum((units_PI >= 0).sum(1) for units_PI in found)
  assert of_each.max() - of_each.min() <= 1


@on_cpu
@pytest.mark.parametrize("programs", [1, 114, 132])
@pytest.mark.parametrize(
  "shape", [(128, 128), (2048, 5632), (11264, 2048), (22016, 4096)]
)
@pytest.mark.parametrize("number", [0, 1])
def test_units_of_a_few_rows(number, shape, programs):
  """They hold all slabs for all inputs once, in equal shares."""
  from sigattn.kernels.mosaic import few_rows

  cut = few_rows._Cut.of(number, shape, programs)
  slabs, steps = shape[0] // 16, shape[1] // 128
  assert cut.parts == 1 or number == 0
  units = np.arange(cut.units + 1)
  steps_before = np.asarray(jax.vmap(cut.first_step)(units))
  slabs_before = np.asarray(jax.vmap(cut.first_slab)(np.arange(cut.groups + 1)))
  assert [slabs_before[0], slabs_before[-1]] == [0, slabs]
  assert set(np.diff(slabs_before)) <= {1, 2, 3}
  assert [steps_before[0], steps_before[-1]] == [0, cut.groups * steps]
  of_program = np.asarray(jax.vmap(cut.first_unit)(np.arange(programs + 1)))
  assert [of_program[0], of_program[-1]] == [0, cut.units]
  assert np.diff(steps_before).min() > 0
  # The weights of a program, in slabs of 128 inputs.
  of_step = np.repeat(np.diff(slabs_before), steps)
  before = np.concatenate([[0], np.cumsum(of_step)])[steps_before[of_program]]
  if slabs * cut.parts >= programs:
    fair = slabs * steps / programs
    assert np.diff(before).max() <= 1.2 * fair + -(-steps // cut.parts)


@on_gpu
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 17, 32])
@pytest.mark.parametrize(
  ("activation", "norms", "sizes", "dtype"),
  [
    ("swiglu", "hybrid", (2048, 5632, 6144), "bfloat16"),
    ("swiglu", "pre", (768, 2048, 2304), "float16"),
    ("gelu", "hybrid", (1024, 4096, 3072), "bfloat16"),
    ("none", "pre", (128, 128, 384), "bfloat16"),
    ("swiglu", "hybrid", (640, 1152, 1920, 1280), "bfloat16"),
    ("swiglu", "hybrid", (4096, 11008, 12288), "bfloat16"),
  ],
)
def test_several_layers_on_a_gpu(rows, activation, norms, sizes, dtype):
  """Programs meet in each of several calls, and all runs give the same bits."""
  drawn = product_cases.draw(rows, activation, norms, True, sizes, dtype)
  x_BD, y_BF, weights = drawn
  assert not products.unsupported(x_BD, weights)
  last = weights._replace(next_FD=None, mlp=weights.mlp._replace(norm_in=None))

  @jax.jit
  def several(x, y):
    counts, found = jnp.zeros((1,), jnp.int32), []
    for call in range(5):
      of_call = last if call == 4 else weights
      new, heads, counts = products.run(x, y, of_call, counts, call)
      found.append((x, y, new, heads))
      x, y = new, y if heads is None else heads[:, : y.shape[1]]
    return found

  found = several(x_BD, y_BF)
  for call, (x, y, new, heads) in enumerate(found):
    expected = product_cases.exact(x, y, last if call == 4 else weights)
    assert product_cases.error(new, expected[0]) < 0.01
    if call < 4:
      assert product_cases.error(heads, expected[1]) < 0.01
  for _ in range(20):
    again = several(x_BD, y_BF)
    jax.tree.map(np.testing.assert_array_equal, again, found)
