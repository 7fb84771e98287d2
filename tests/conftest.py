"""Settings of JAX for all tests: on the CPU, with fast and cached compilation.

Arrays of different ranks are not broadcast. JAX_PLATFORMS=cuda runs the tests
of the kernels on a GPU. Settings that programs started by tests shall inherit
are environment variables.
"""

import gc
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
  # Compiling takes most of the suite's time, and most programs run only once or
  # twice. XLA's older emitters of fused loops need a quarter of the time of its
  # new ones. To compile the parts of a program in several threads needs twice
  # the time of all cores, and the workers use all of them.
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
  _FLAGS = os.environ.get("XLA_FLAGS", "")
  _FASTER = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
  )
  if _FASTER not in _FLAGS:  # A worker inherits it from its parent process.
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {_FASTER}"
# All workers and programs of a session share the cache of compiled programs. A
# single operation is compiled sooner than it is written and read.
_CACHE = None
if "PYTEST_XDIST_WORKER" not in os.environ:
  _CACHE = tempfile.mkdtemp(prefix="sigattn_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402

# A full collection visits all objects that JAX keeps. With the default
# thresholds this takes 5 % of the time.
gc.set_threshold(20_000, 10, 10)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
  parser.addoption(
    "--all-meshes",
    action="store_true",
    help="train every method, and on every mesh of eight devices",
  )


def pytest_unconfigure():
  if _CACHE is not None:
    shutil.rmtree(_CACHE, ignore_errors=True)
