"""Ring attention: what it refuses, and that it equals one device."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import sigattn


def test_a_ring_of_simulated_devices_equals_one_device():
  run = subprocess.run(
    [sys.executable, "-m", "tests.ring_on_eight_devices"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize(
  ("options", "said"),
  [
    (dict(kind="softmax"), "kind='softmax'; choose from"),
    (dict(exchange="tree"), "exchange='tree'; choose from"),
    (dict(order="striped"), "order='striped'; choose from"),
    (dict(order="zigzag"), "order='zigzag' with is_causal=False"),
    (
      dict(order="zigzag", is_causal=True, local_window_size=3),
      r"local_window_size=3; .* give 'contiguous'",
    ),
    (dict(order="zigzag", is_causal=True, tokens=3), "T must be even"),
    (dict(keys=5), r"key\.shape=\(1, 5, 2, 8\); must be"),
  ],
)
def test_what_makes_no_sense_is_refused(options, said):
  tokens = options.pop("tokens", 4)
  query = jnp.zeros((1, tokens, 2, 8))
  key = jnp.zeros((1, options.pop("keys", tokens), 2, 8))
  mesh = jax.make_mesh((1,), ("sequence",))

  def attend(query, key):
    return sigattn.ring_attention(
      query, key, key, axis_name="sequence", **options
    )

  spec = jax.sharding.PartitionSpec()
  attend = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
  with pytest.raises(ValueError, match=said):
    jax.eval_shape(attend, query, key)
