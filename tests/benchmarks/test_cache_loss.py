"""The benchmark of a cache in 8 bits: its losses are those of the model."""

import numpy as np

from benchmarks import cache_loss
from sigattn.inference import engine
from sigattn.training import setup
from tests.tasks import small_lm


def test_losses_token_by_token_are_those_of_the_model():
  config = small_lm.small(depth=2)
  _, params = setup.init(config)
  token_BT = small_lm.tokens(3, 13)
  token_BT[1, 9:] = -1
  graphdef, state = engine.prepared(config, params)
  found, rounded = (
    cache_loss.losses(graphdef, state, token_BT, dtype)
    for dtype in (None, "float8_e4m3fn")
  )
  machine = engine.Engine(graphdef, state, small_lm.V, end=-1)
  wanted = -np.asarray(machine.score(token_BT)[0])
  wanted[token_BT[:, 1:] < 0] = 0
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
  assert 0 < np.abs(rounded - found).mean() < 0.1
