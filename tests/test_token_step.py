"""A token's step in few kernels equals that of Stack.

Without a GPU, Triton's interpreter runs the kernels.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.inference import engine, pages
from sigattn.inference.sampling import Sampling
from sigattn.kernels import device, products, triton
from sigattn.kernels.triton import decode, launch, product
from tests.kernels import product_cases
from tests.tasks.small_lm import (
  ALIBI,
  GATE,
  LLAMA,
  SOFTMAX,
  WIDE,
  V,
  compiled,
  make,
  small,
  token_step,
  tokens,
)

if jax.default_backend() == "cpu":
  # Triton has wheels only for Linux.
  triton_interpreter = pytest.importorskip("tests.kernels.triton_interpreter")


@pytest.fixture
def started(monkeypatch):
  """The names of the kernels that run."""
  names, run = [], launch.start
  if jax.default_backend() == "cpu":
    run = triton_interpreter.start
    card = device.Device("NVIDIA A100", 80)
    monkeypatch.setattr(device, "current", lambda: card)
    monkeypatch.setattr(triton, "_PACKAGES", {})  # It needs no jax-triton.

  def start(kernel, *args, **options):
    names.append(kernel.__name__)
    return run(kernel, *args, **options)

  monkeypatch.setattr(launch, "start", start)
  with jax.default_matmul_precision("highest"):
    yield names


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("activation", product.ACTIVATIONS)
def test_a_product_of_the_normalised_stream(
  activation, rows, started, monkeypatch
):
  """The product has several blocks, and the last ones are not full."""
  small = product.Tile(16, 32, num_warps=4, num_stages=2)
  monkeypatch.setattr(product, "tile", lambda *_: small)
  draw = np.random.default_rng(0).normal
  x_BD, y_BD = draw(size=(2, rows, 48)).astype("float32")
  scale_D, scale_of_y_D = draw(size=(2, 48)).astype("float32")
  weight_FD = draw(size=(84, 48), scale=0.2).astype("float32")
  stream, s_BD = product.Stream(x_BD), x_BD
  if activation in ("gelu", "gelu_exact"):
    stream, s_BD = product.Stream(x_BD, y_BD), x_BD + y_BD
  elif activation == "swiglu":
    squares = np.array([0.25, 0.75], "float32") * (y_BD[:1] ** 2).sum()
    of_y = product.Norm(scale_of_y_D, 0.1)
    stream = product.Stream(x_BD, y_BD, of_y, squares)
    s_BD = x_BD + normalized(y_BD, scale_of_y_D)
  z_BF = normalized(s_BD, scale_D) @ weight_FD.T
  if activation == "swiglu":
    z_BF = jax.nn.silu(z_BF[:, :42]) * z_BF[:, 42:]
  elif activation != "none":
    z_BF = jax.nn.gelu(z_BF, approximate=activation == "gelu")
  found = product.product(
    stream, weight_FD, product.Norm(scale_D, 0.1), activation
  )
  assert started == ["product" if rows == 1 else "residual"]
  np.testing.assert_allclose(found.out_BF, z_BF, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found.x_BD, s_BD, rtol=1e-5, atol=1e-5)
  if rows == 1:
    np.testing.assert_allclose(found.squares.sum(), (z_BF**2).sum(), rtol=1e-5)


def normalized(x_BD, scale_D):
  return x_BD / np.sqrt((x_BD**2).mean(1, keepdims=True) + 0.1) * scale_D


@pytest.mark.parametrize(
  ("values", "rows", "is_paged", "dtype", "card"),
  [
    ({}, 3, True, None, 80),
    (ALIBI | {"attn.window": 5, "attn.normalize": True}, 3, False, None, 80),
    (LLAMA, 1, False, "float8_e4m3fn", 89),
    (LLAMA, 1, False, "float8_e4m3fn", 86),
    (LLAMA | SOFTMAX | {"model.mlp": "gelu"}, 3, False, None, 80),
    (LLAMA | SOFTMAX | GATE, 3, True, None, 80),
    (GATE, 3, False, None, 80),
  ],
)
def test_it_computes_what_the_stack_does(
  values, rows, is_paged, dtype, card, started, monkeypatch
):
  if jax.default_backend() == "cpu":
    monkeypatch.setattr(device, "current", lambda: device.Device("any", card))
  elif card == 86:
    pytest.skip("needs an older card")
  small_tile = decode.Tile(16, 16, 3, 4, 2)
  monkeypatch.setattr(decode, "tile", lambda *_, **__: small_tile)
  length_B = np.array([69, 4, 126], np.int32)[:rows]
  table_BM = None
  if is_paged:
    held = pages.Pages(8, rows, 2)
    for row in range(rows):
      held.take(row, np.zeros(0, np.int32), 128)
    table_BM = jnp.asarray(held.table_BM)

  def run(implementation):
    config = small(depth=2, **values, **{"attn.implementation": implementation})
    return compiled(step, make(config), tokens(rows), length_B)

  def step(model, token_B, length_B):
    model.prepare_to_generate()
    shape = (8, 64) if is_paged else (rows, 128)
    cache = jax.tree.map(
      lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype),
      model.empty_cache(*shape, dtype),
    )
    return model.decode(token_B, cache, length_B, table_BM)

  expected = run("xla")
  assert not started
  actual = run(None)
  layer = ["product", "decode", "product", "product", "product"]
  if rows > 1:
    layer = ["residual", "decode", "residual"]
  kernels = [*2 * layer, layer[0]]
  # Only Stack casts the keys, and only Stack has forget gates.
  if (dtype and card < 89) or "attn.forget_gate" in values:
    # Without pages its layers call one function, which is traced once.
    kernels = ["decode"] * (1 + is_paged)
  assert started == kernels
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5),
    actual,
    expected,
  )


@pytest.mark.parametrize(
  ("values", "rows"), [({}, 1), (LLAMA | {"model.mlp": "gelu"}, 3)]
)
def test_products_between_two_calls_of_attention(
  values, rows, started, monkeypatch
):
  """They get the weights and norms of the right layers."""
  calls = []

  def plain(x_BD, y_BF, weights, counts, number):
    calls.append(number)
    return *product_cases.exact(x_BD, y_BF, weights), counts

  monkeypatch.setattr(products, "run", plain)
  monkeypatch.setattr(products, "unsupported", lambda *_: "")
  _compare_with_stack({"model.norm": "hybrid", **values}, rows, 2e-4)
  first = "product" if rows == 1 else "residual"
  assert started == [first, *3 * ["decode"], first]
  assert calls == [0, 1, 2]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it needs no GPU")
@pytest.mark.parametrize(
  "case",
  ["1 default joined", "3 llama joined", "2 softmax joined", "3 llama single"],
)
def test_compiled_code_of_a_16_bit_model(case):
  """What Triton makes of its kernels, without a GPU."""
  environment = {k: v for k, v in os.environ.items() if "INTERPRET" not in k}
  module = "tests.kernels.token_step_on_ptx_machine"
  subprocess.run(
    [sys.executable, "-m", module, *case.split()], env=environment,
    timeout=300, check=True,
  )  # fmt: skip


@pytest.mark.skipif(
  device.current().capability != 90, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("values", [{}, LLAMA, SOFTMAX])
def test_a_step_of_a_16_bit_model(values, rows, started):
  """On a Hopper GPU one kernel computes what follows attention."""
  _compare_with_stack(WIDE | values, rows, 0.03)
  first = "product" if rows == 1 else "residual"
  assert started == [first, *3 * ["decode"], first]


@pytest.mark.skipif(
  jax.default_backend() == "cpu", reason="only a GPU has graphs"
)
def test_a_token_is_one_graph(tmp_path):
  """XLA records all kernels of a token in a CUDA graph, Triton's among them.

  Otherwise it starts each kernel by itself, and the gaps between two kernels
  are twice as long.
  """
  config = small(depth=6, **WIDE)
  graphdef, shapes = engine.shapes(config)
  params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
  machine = engine.Engine(graphdef, params, V, end=-1)
  state, steps = machine.empty(1, 256), 16
  decode = machine.lower_decode(state, steps, Sampling()).compile()
  _, state = decode(machine.params, state)
  with jax.profiler.trace(tmp_path):
    jax.block_until_ready(decode(machine.params, state))
  [path] = tmp_path.rglob("*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  names = [
    event.name for plane in planes for line in plane.lines
    for event in line.events
  ]  # fmt: skip
  assert sum(name.startswith("cuGraphLaunch") for name in names) == steps
  # Some kernels run before or after the loop.
  assert sum(name.startswith("cuLaunchKernel") for name in names) < steps


def _compare_with_stack(values, rows, tolerance):
  """A step of three layers, by few kernels and by Stack."""
  length_B = np.arange(rows, dtype=np.int32) * 3 % 100

  def run(implementation):
    config = small(depth=3, **values, **{"attn.implementation": implementation})
    return compiled(token_step, make(config), tokens(rows), length_B)

  for x, y in zip(
    jax.tree.leaves(run(None)), jax.tree.leaves(run("xla")), strict=True
  ):
    assert product_cases.error(x, y.astype(jnp.float32)) < tolerance
