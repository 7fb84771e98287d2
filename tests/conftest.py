"""On the CPU, compiled quickly, with no implicit broadcasting of ranks.

JAX_PLATFORMS=cuda runs the tests of the kernels on a GPU.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ["JAX_PLATFORMS"] == "cpu":
  # Most of the suite's time is compiling what runs once or twice.
  jax.config.update("jax_disable_most_optimizations", True)
