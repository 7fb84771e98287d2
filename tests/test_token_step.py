"""A token's step in few kernels, interpreted, against that of Stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.inference import pages
from sigattn.kernels import device, triton
from sigattn.kernels.triton import launch, product
from sigattn.kernels.triton.product import Norm
from tests.tasks.small_lm import ALIBI, compiled, make, small, tokens

if jax.default_backend() != "cpu":
  pytest.skip("the kernels are not interpreted here", allow_module_level=True)
# Triton has wheels for Linux alone.
triton_interpreter = pytest.importorskip("tests.kernels.triton_interpreter")


@pytest.fixture
def started(monkeypatch):
  """The names of the kernels, which Triton's interpreter runs."""
  names = []

  def start(kernel, *args, **options):
    names.append(kernel.__name__)
    return triton_interpreter.start(kernel, *args, **options)

  monkeypatch.setattr(launch, "start", start)
  monkeypatch.setattr(triton, "_PACKAGES", {})  # It needs no jax-triton.
  card = device.Device("NVIDIA A100", 80)
  monkeypatch.setattr(device, "current", lambda: card)
  return names


LLAMA = {
  "model.norm": "pre", "model.rope_share": 0.5, "model.tied": False,
  "model.logit_cap": 5.0, "attn.alibi": False, "attn.qk_norm": "none",
  "attn.num_kv_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("activation", product.ACTIVATIONS)
def test_a_product_by_the_kernel_is_that_by_xla(activation, rows, started):
  """With inputs and outputs that are no multiples of a block."""
  draw = np.random.default_rng(0).normal
  x_BD, y_BD = draw(size=(2, rows, 48)).astype("float32")
  scale_D, scale_of_y_D = draw(size=(2, 48)).astype("float32")
  weight_FD = draw(size=(80, 48), scale=0.2).astype("float32")
  squares = np.stack([0.25 * (y_BD**2).sum(1), 0.75 * (y_BD**2).sum(1)])
  stream = product.Stream(x_BD, y_BD, squares, Norm(scale_of_y_D, 0.1))
  if activation == "gelu":
    stream = product.Stream(x_BD, y_BD)
  elif activation == "none":
    stream = product.Stream(x_BD)
  arguments = stream, weight_FD, Norm(scale_D, 0.1), activation, jnp.float32
  expected = product.by_xla(*arguments)
  actual = product.by_kernel(*arguments, product.Tile(16, 32, 4, 2))
  assert started == ["product"]
  for x, y in ((actual.out_BF, expected.out_BF), (actual.x_BD, expected.x_BD)):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  squares_B = (expected.out_BF**2).sum(1)
  np.testing.assert_allclose(actual.squares.sum(0), squares_B, rtol=1e-5)


@pytest.mark.parametrize(
  ("values", "rows", "is_paged"),
  [
    ({}, 3, True),
    (ALIBI | {"attn.window": 5, "attn.normalize": True}, 3, False),
    (LLAMA, 1, False),
    (LLAMA | {"attn.kind": "softmax", "model.mlp": "gelu"}, 3, False),
  ],
)
def test_it_computes_what_the_stack_does(values, rows, is_paged, started):
  length_B = np.array([69, 4, 126], np.int32)[:rows]
  table_BM = None
  if is_paged:
    held = pages.Pages(8, rows, 2)
    for row in range(rows):
      held.take(row, np.zeros(0, np.int32), 128)
    table_BM = jnp.asarray(held.table_BM)

  def run(implementation):
    config = small(depth=2, **values, **{"attn.implementation": implementation})
    return compiled(decode, make(config), tokens(rows), length_B)

  def decode(model, token_B, length_B):
    model.prepare_to_generate()
    empty = model.empty_cache(*((8, 64) if is_paged else (rows, 128)))
    cache = jax.tree.map(
      lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), empty
    )
    return model.decode(token_B, cache, length_B, table_BM)

  expected = run("xla")
  assert not started
  actual = run(None)
  layer = ["product", "decode", "product", "product", "product"]
  assert started == [*2 * layer, "product"]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5),
    actual,
    expected,
  )
