"""The mesh: where a batch lies, and which batch sizes it can split."""

import jax
import numpy as np
import pytest

from configs import vit_sigmoid
from sigattn.training import mesh, setup


def test_batch_is_split_and_the_rest_is_replicated():
  devices = mesh.make()
  size = 2 * jax.device_count()
  batch = mesh.put({"x": np.arange(size)}, devices)
  np.testing.assert_array_equal(batch["x"], np.arange(size))
  assert batch["x"].sharding.is_equivalent_to(mesh.batch(devices), 1)
  assert mesh.replicated(devices).is_fully_replicated


def test_batch_that_the_devices_cannot_share_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 3)
  config = vit_sigmoid.get_config("runlocal")  # 8 images per batch
  with pytest.raises(ValueError, match=r"config\.batch_size=8 .*the 3 devices"):
    setup.validate_config(config)
