"""The optimizers and the schedules equal their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import lm, vit
from sigattn.training import mesh, optim, setup, step


def make_config(**values):
  config = vit.get_config()
  config.total_steps = 100
  config.optim.update(lr=0.5, warmup_steps=10, end_lr=0.1)
  config.optim.update(**values)
  return config


@pytest.mark.parametrize(
  ("name", "middle", "end"),
  [
    ("cosine", 0.5 * (0.1 + 0.9 * 0.5), 0.05),
    ("linear", 0.5 * (1 - 0.9 / 2), 0.05),
    ("constant", 0.5, 0.5),
    ("rsqrt", 0.5 / np.sqrt(1 + 45 / 10), 0.5 / np.sqrt(10)),
  ],
)
def test_schedule(name, middle, end):
  schedule = optim.schedule(make_config(schedule=name))
  np.testing.assert_allclose(schedule(0), 0.05, rtol=1e-6)
  np.testing.assert_allclose(schedule(10), 0.5, rtol=1e-6)
  np.testing.assert_allclose(schedule(55), middle, rtol=1e-5)
  np.testing.assert_allclose(schedule(100), end, rtol=1e-5)


def test_schedule_without_warm_up_starts_at_the_peak():
  schedule = optim.schedule(make_config(warmup_steps=0))
  np.testing.assert_allclose(schedule(0), 0.5, rtol=1e-6)


PARAMS = {
  "layer": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])},
  "head": {"kernel": jnp.array([4.0])},
}


def test_decay_groups_take_the_first_match():
  groups = ((r"head/.*", 0.5), (r".*kernel", 1.0))
  assert optim.decay_factors(PARAMS, groups) == {
    "layer": {"kernel": 1.0, "bias": 0.0},
    "head": {"kernel": 0.5},
  }


def test_decay_group_that_matches_nothing_is_refused():
  with pytest.raises(ValueError, match="decay_groups: 'kernels'"):
    optim.decay_factors(PARAMS, (("kernels", 1.0),))


def test_lr_groups_scale_the_update_and_not_the_decay():
  config = make_config(
    name="sgd", b1=0.0, schedule="constant", warmup_steps=0, clip_norm=0.0
  )
  config.optim.update(weight_decay=0.1, lr_groups=((r".*/kernel", 0.25),))
  tx = optim.make(config, PARAMS)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(
    updates["layer"]["kernel"], -0.5 * np.array([0.25 + 0.1, 0.25 - 0.2])
  )
  np.testing.assert_allclose(updates["layer"]["bias"], [-0.5])
  with pytest.raises(ValueError, match="lr_groups: 'kernels'"):
    optim.lr_factors(PARAMS, (("kernels", 1.0),))


def test_adamw_equals_optax_adamw_on_the_decayed_parameters():
  config = make_config(schedule="constant", warmup_steps=0, clip_norm=0.0)
  config.optim.weight_decay = 0.1
  optimizer = optim.make(config, PARAMS)
  c = config.optim
  mask = {"layer": {"kernel": True, "bias": False}, "head": {"kernel": True}}
  reference = optax.adamw(
    c.lr, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=0.1, mask=mask
  )
  state, reference_state = optimizer.init(PARAMS), reference.init(PARAMS)
  for i in range(3):
    grads = jax.tree.map(lambda x, s=i: jnp.sin(x + s), PARAMS)
    updates, state = optimizer.update(grads, state, PARAMS)
    expected, reference_state = reference.update(grads, reference_state, PARAMS)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
      updates,
      expected,
    )


def test_clipping_is_by_the_norm_of_the_whole_gradient():
  config = make_config(
    name="sgd", b1=0.0, schedule="constant", warmup_steps=0, clip_norm=1.0
  )
  config.optim.weight_decay = 0.0
  tx = optim.make(config, PARAMS)
  grads = jax.tree.map(lambda x: 10 * x, PARAMS)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


def test_average_forgets_the_start_and_then_decays_with_ema_decay():
  ema, params = {"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}
  first = optim.average(ema, params, jnp.array(0), 0.999)
  late = optim.average(ema, params, jnp.array(10**6), 0.999)
  np.testing.assert_allclose(first["w"], 0.9, rtol=1e-6)
  np.testing.assert_allclose(late["w"], 1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_first_moment_has_its_dtype(name):
  for dtype in ("float32", "bfloat16"):
    tx = optim.make(make_config(name=name, mu_dtype=dtype), PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    found = {x.dtype.name for x in jax.tree.leaves(state) if x.shape and x.size}
    others = {"float32"} if name == "adamw" else set()  # the second moment
    assert found == {dtype} | others


def test_gradients_in_bfloat16_are_those_of_its_products():
  config = lm.get_config("runlocal").unlock()
  config.dtype = "bfloat16"
  found = []
  for config.optim.grad_dtype in ("float32", "bfloat16"):
    setup.validate_config(config)
    state, update = step.init(config, mesh.make())
    grads = jax.jit(lambda *a: update(*a)[0])(state, BATCH)  # noqa: B023
    assert {x.dtype.name for x in jax.tree.leaves(grads)} == {"float32"}
    found.append(grads)
  wanted, rounded = found
  flat = jax.tree_util.tree_leaves_with_path(wanted)
  for (path, exact), x in zip(flat, jax.tree.leaves(rounded), strict=True):
    error = jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)
    assert error < jnp.finfo("bfloat16").eps, path
  kernel = rounded["stack"]["blocks"]["mlp"]["up"]["kernel"]
  np.testing.assert_array_equal(kernel, kernel.astype("bfloat16"))


BATCH = {"token": np.random.default_rng(0).integers(0, 64, (8, 33), np.int32)}


def test_bfloat16_gradients_need_bfloat16_activations():
  config = lm.get_config("runlocal").unlock()
  config.optim.grad_dtype = "bfloat16"
  with pytest.raises(ValueError, match="grad_dtype='bfloat16'; must be float"):
    setup.validate_config(config)
