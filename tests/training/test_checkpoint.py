"""Checkpoints: what is saved, which is the best, and what is refused."""

import jax
import numpy as np
import pytest

from configs import vit_sigmoid
from sigattn import tasks
from sigattn.training import checkpoint, mesh, run_dir, step


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_saved_state_data_and_best_step_are_restored(tmp_path):
  config = vit_sigmoid.get_config("runlocal")
  config.optim.ema_decay = 0.9
  with run_dir.RunDir(tmp_path, config) as folder:
    folder.begin()
  with pytest.raises(ValueError, match="holds no checkpoint yet"):
    checkpoint.load(tmp_path)
  state, _ = step.init(config, mesh.make())
  data = tasks.train_batches(config)
  accuracies = {1: 0.75, 2: 0.5, 3: None}
  for i, accuracy in accuracies.items():
    next(data)
    values = None if accuracy is None else {"accuracy": accuracy}
    # On exit everything is on disk. is_best reads the metrics from there.
    with checkpoint.Checkpoints(tmp_path, config) as checkpoints:
      if i == 1:
        assert checkpoints.restore(state, data) is state
        assert checkpoints.log_state() is None
      state = jax.tree.map(lambda x: x + 1, state)
      assert checkpoints.is_best(values) == (i == 1)
      checkpoints.save(i, state, data, values, {"i": i})
  expected = next(data)

  fresh, _ = step.init(config, mesh.make())
  data = tasks.train_batches(config)
  with checkpoint.Checkpoints(tmp_path, config) as checkpoints:
    equal(checkpoints.restore(fresh, data), state)
    assert checkpoints.log_state() == {"i": 3}
  equal(next(data), expected)

  _, params, last = checkpoint.load(tmp_path)
  assert last == 3
  equal(params, state.ema)
  assert checkpoint.load(tmp_path, "best")[2] == 1
  with pytest.raises(
    ValueError, match=r"step=7: .* holds the steps \[1, .*3\]"
  ):
    checkpoint.load(tmp_path, 7)


def test_without_a_folder_nothing_is_saved_or_restored():
  config = vit_sigmoid.get_config("runlocal")
  with checkpoint.Checkpoints(None, config) as checkpoints:
    checkpoints.save(1, None, None, {"accuracy": 1.0}, {})
    assert checkpoints.log_state() is None
    assert not checkpoints.is_best({"accuracy": 1.0})
    assert checkpoints.restore("state", None) == "state"
