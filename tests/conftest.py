"""On the CPU, compiled quickly, with no implicit broadcasting of ranks."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the suite's time is compiling what runs once or twice.
jax.config.update("jax_disable_most_optimizations", True)
