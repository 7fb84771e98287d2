"""A token's step in few kernels, interpreted, against that of Stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.inference import pages
from sigattn.kernels import device, triton
from sigattn.kernels.triton import launch
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


@pytest.mark.parametrize(
  ("values", "rows", "is_paged"),
  [
    ({}, 1, False),
    ({}, 3, True),
    (ALIBI | {"attn.window": 5, "attn.normalize": True}, 3, False),
    (LLAMA, 1, True),
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
    return compiled(decode, make(config), tokens(rows, 2), length_B)

  def decode(model, token_BT, length_B):
    model.prepare_to_generate()
    empty = model.empty_cache(*((8, 64) if is_paged else (rows, 128)))
    cache = jax.tree.map(
      lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), empty
    )
    found = []
    for i in range(2):
      logits_BV, cache = model.decode(
        token_BT[:, i], cache, length_B + i, table_BM
      )
      found.append(logits_BV)
    return found, cache

  expected = run("xla")
  assert not started
  actual = run(None)
  layer = ["product", "decode", "product", "product", "product"]
  assert started == 2 * [*2 * layer, "product"]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5),
    actual,
    expected,
  )
