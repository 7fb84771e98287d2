"""Inputs and exact results of kernels/products.py."""

import jax
import jax.numpy as jnp
import numpy as np

from sigattn.kernels import products

SMALL = 256, 384, 512  # features, hidden ones, and those of the heads


def draw(rows, activation, norms, has_next, sizes=SMALL, dtype="bfloat16"):
  """(x, y, weights), see `build`."""
  normal = np.random.default_rng(0).standard_normal

  def array(*shape):
    return jnp.asarray(normal(shape, np.float32) / np.sqrt(shape[-1]), dtype)

  def scale(size):
    return jnp.asarray(1 + normal(size, np.float32) / 9)

  x, y, weights = build(array, scale, rows, activation, norms, has_next, sizes)
  return x * x.shape[1] ** 0.5, y * y.shape[1] ** 0.5, weights


def build(array, scale, rows, activation, norms, has_next, sizes):
  """(x, y, weights) of the arrays that array(*shape) and scale(size) return.

  norms: "pre" or "hybrid", see layers.Residual. sizes: of the stream, of the
  hidden layer, of query, key and value, and of attention's output if it is not
  that of the stream.
  """
  width, hidden, heads, attended = (*sizes, sizes[0])[:4]

  def norm(exists=True):
    return products.Norm(scale(width), 1e-5) if exists else None

  def branch(inputs, follows=True):
    return products.Branch(
      array(width, inputs), norm(norms == "hybrid"), norm(follows)
    )

  weights = products.Weights(
    branch(attended),
    array(hidden * (1 + (activation == "swiglu")), width),
    activation,
    branch(hidden, has_next),
    array(heads, width) if has_next else None,
  )
  return array(rows, width), array(rows, attended), weights


def exact(x_BD, y_BF, weights):
  """(x, heads) in float32, without rounding between the products."""
  x_BD, y_BF = (x.astype(jnp.float32) for x in (x_BD, y_BF))

  def times(x, matrix):
    return jnp.dot(x, matrix.astype(jnp.float32).T, precision="highest")

  def normalised(x, norm):
    if norm is None:
      return x
    square = (x * x).mean(1, keepdims=True)
    return x / jnp.sqrt(square + norm.epsilon) * norm.scale_D[None]

  def added(x, y, branch):
    return x + normalised(times(y, branch.weight_DF), branch.norm_out)

  x_BD = added(x_BD, y_BF, weights.attention)
  z = times(normalised(x_BD, weights.attention.norm_in), weights.up_FD)
  if weights.activation == "swiglu":
    gate, up = jnp.split(z, 2, axis=1)
    z = jax.nn.silu(gate) * up
  elif weights.activation == "gelu":
    z = jax.nn.gelu(z)
  x_BD = added(x_BD, z, weights.mlp)
  if weights.next_FD is None:
    return x_BD, None
  return x_BD, times(normalised(x_BD, weights.mlp.norm_in), weights.next_FD)


def error(actual, expected):
  """The largest difference, as a share of the largest number."""
  difference = jnp.abs(actual.astype(jnp.float32) - expected).max()
  return float(difference / jnp.abs(expected).max())
