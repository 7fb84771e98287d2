"""All products of a token between two calls of attention, in one kernel.

With few rows these products take the time to read their weights, if nothing
delays them. A kernel for each product does: it starts with an empty memory
pipeline, and the next one waits for its end. Here one program for each
multiprocessor computes all of it, with x the residual stream:

  x    += norm(W_out y)       y: the output of attention
  z     = phi(W_up norm(x))   see layers.Mlp; swiglu also has W_gate
  x    += norm(W_down z)
  heads = W_next norm(x)      query, key and value of the next layer

A product is cut into units, which are dealt out to the programs. Between two
products all programs wait for each other (mosaic/grid.py):

  memory warpgroup                      compute warpgroups
    blocks of W_out ---------------->     units of W_out, results to memory
    blocks of W_up, as soon as a          all programs meet
    slot of the ring is free              norm(x)
    ...                                   units of W_up, ...

Weights depend on no other program. So while programs wait for each other, their
memory warpgroups read on into their rings, which together hold 19 to 28 MB. The
memory of an H200 takes 5 to 7 us for that.

mosaic/one_row.py and mosaic/few_rows.py have the two kernels.
"""

import functools
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sigattn.kernels import device, mosaic

ACTIVATIONS = ("none", "swiglu", "gelu")
_ROWS = 32  # at most
# A warpgroup has a row in its registers. These are the largest rows that fit:
# of the stream, and of what W_out and W_down multiply.
_WIDTH, _HIDDEN = 4096, 12288
_SIDE = 128  # The sides of all matrices are multiples of it.


class Norm(NamedTuple):
  """RMSNorm: x / sqrt(mean(x^2) + epsilon) * scale."""

  scale_D: jax.Array
  epsilon: float


class Branch(NamedTuple):
  """How a branch is added to the stream."""

  weight_DF: jax.Array  # its last product
  norm_out: Norm | None  # of that product's result
  norm_in: Norm | None  # of the stream after it; None if nothing follows


class Weights(NamedTuple):
  """What a token passes between two calls of attention.

  All matrices are (outputs, inputs).
  """

  attention: Branch
  up_FD: jax.Array  # with swiglu the rows of gate, and then those of up
  activation: str  # one of ACTIVATIONS
  mlp: Branch
  next_FD: jax.Array | None  # None after the last layer


def unsupported(x_BD: jax.Array, weights: Weights) -> str:
  """The reason why `run` cannot take these arguments; "" if it can.

  x_BD: the stream. The output of attention has its dtype.

  This imports nothing that an untested version of jax may lack.
  """
  rows, matrices = len(x_BD), _matrices(weights)
  dtypes = {str(x.dtype) for x in (x_BD, *matrices)}
  if reason := mosaic.unsupported_card():
    return reason
  if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
    return f"products of {' and '.join(sorted(dtypes))} are not implemented"
  if weights.activation not in ACTIVATIONS:
    return f"the activation {weights.activation} is not implemented"
  # With too many programs the last ones would not begin before the first end.
  if device.current().cores is None:
    return "the number of multiprocessors is not known"
  if _has_mps():
    return "with MPS another process may occupy a part of the GPU"
  if rows > _ROWS:
    return f"{rows} rows; at most {_ROWS} are implemented"
  if any(size % _SIDE for x in matrices for size in x.shape):
    return f"a side of a matrix is no multiple of {_SIDE}"
  width, inputs = (max(x.shape[i] for x in matrices[::2]) for i in (0, 1))
  if width > _WIDTH or inputs > _HIDDEN:
    return f"more than {_WIDTH} features, or {_HIDDEN} inputs of a product"
  return ""


def run(
  x_BD: jax.Array,
  y_BF: jax.Array,
  weights: Weights,
  counts: jax.Array,
  calls: int,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """(x, heads or None, counts), see the top of this file.

  All programs of a call run at the same time, because they wait for each other.
  So two calls must not, also not those of two models in one program: one must
  depend on the results of the other.

  Args:
    x_BD: the stream before attention's output is added.
    y_BF: the output of attention.
    weights: the matrices and norms.
    counts: (1,) int32, zero before the first of several calls. Each call takes
      those that the call before it returned.
    calls: the number of calls before this one. They have the same matrices but
      for next_FD: only the last call may lack it.
  """
  branches = weights.attention, weights.mlp
  norms = [x for branch in branches for x in (branch.norm_out, branch.norm_in)]
  return _run(
    x_BD, y_BF, _matrices(weights), [x and x.scale_D for x in norms],
    counts, jnp.full((1,), calls, jnp.int32),
    epsilons=tuple(x and x.epsilon for x in norms),
    activation=weights.activation,
  )  # fmt: skip


def _has_mps():
  """Whether several processes may use the GPU at the same time.

  Two that wait in this way could wait for each other for ever. Without MPS each
  of them gets the whole GPU, by turns.
  """
  folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
  return pathlib.Path(folder, "control").exists()


# Layers of the same sizes share one kernel, which is compiled once.
@functools.partial(jax.jit, static_argnames=("epsilons", "activation"))
def _run(
  x_BD, y_BF, matrices, scales, counts, calls, *, epsilons, activation
):  # fmt: skip
  # Import it here, because another jax may lack what this module imports.
  from sigattn.kernels.mosaic import few_rows, one_row

  norms = [
    None if scale is None else Norm(scale, epsilon)
    for scale, epsilon in zip(scales, epsilons, strict=True)
  ]
  kernel = one_row if len(x_BD) == 1 else few_rows
  return kernel.run(x_BD, y_BF, matrices, norms, activation, counts, calls)


def _matrices(weights):
  """The matrices in the order of their products."""
  matrices = [weights.attention.weight_DF, weights.up_FD, weights.mlp.weight_DF]
  return matrices + ([] if weights.next_FD is None else [weights.next_FD])
