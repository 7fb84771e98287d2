"""What a kernel lacks beside plain JAX: vmap, and meshes that split a batch."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.problem import Operands


def over_batch(compute, problem, *arrays):
  return compute(problem, *arrays)
