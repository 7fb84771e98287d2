"""Ring attention equals one device, and refuses wrong arguments."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import sigattn
from benchmarks import scale

# Together these cases have every option; --all-meshes runs the others too.
SOME = [
  "zigzag grouped segments bias",
  "zigzag biases",
  "window both ways",
  "relu2 normalised zigzag lengths",
  "gathered zigzag",
]


@pytest.mark.timeout(600)
def test_a_ring_of_simulated_devices_equals_one_device(request):
  cases = [] if request.config.getoption("--all-meshes") else SOME
  run = subprocess.run(
    [sys.executable, "-m", "tests.ring_on_eight_devices", *cases],
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(
  jax.default_backend() != "gpu" or jax.device_count() < 2,
  reason="needs several GPUs",
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", scale.RINGS)
def test_a_ring_of_gpus_equals_one_gpu(form, normalize):
  """The fused kernels round the output of each block to bfloat16."""
  arguments = types.SimpleNamespace(heads=4, width=128, normalize=normalize)
  length = 2048 * jax.device_count()
  _, expected = scale.one_device(arguments, length)
  _, actual = scale.ring(arguments, length, *form)
  assert scale.error(actual, expected) < 0.01


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
    (dict(normalize="yes"), "normalize='yes'; must be True or False"),
    (dict(scale=jnp.ones(())), "scale=.*; must be a number here"),
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
