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
  return x * sizes[0] ** 0.5, y * sizes[0] ** 0.5, weights


def build(array, scale, rows, activation, norms, has_next, sizes):
  """(x, y, weights) of the arrays that array(*shape) and scale(size) return.

  norms: "pre" or "hybrid", see layers.Residual.
  """
  width, hidden, heads = sizes

  def norm(exists=True):
    return products.Norm(scale(width), 1e-5) if exists else None

  def branch(inputs, follows=True):
    return products.Branch(
      array(width, inputs), norm(norms == "hybrid"), norm(follows)
    )

  weights = products.Weights(
    branch(width),
    array(hidden * (1 + (activation == "swiglu")), width),
    activation,
    branch(hidden, has_next),
    array(heads, width) if has_next else None,
  )
  return array(rows, width), array(rows, width), weights


def exact(x_BD, y_BF, weights, rounded=lambda x: x):
  """(x, heads) in float32.

  rounded: is applied where the kernels round: to the results of products, to
  the stream, and to normalised rows.
  """
  x_BD, y_BF = (x.astype(jnp.float32) for x in (x_BD, y_BF))

  def times(x, matrix):
    return jnp.dot(x, matrix.astype(jnp.float32).T, precision="highest")

  def normalised(x, norm):
    if norm is None:
      return x
    square = (x * x).mean(1, keepdims=True)
    return rounded(x / jnp.sqrt(square + norm.epsilon) * norm.scale_D[None])

  def added(x, y, branch):
    y = rounded(times(y, branch.weight_DF))
    return rounded(x + normalised(y, branch.norm_out))

  x_BD = added(x_BD, y_BF, weights.attention)
  z = times(normalised(x_BD, weights.attention.norm_in), weights.up_FD)
  if weights.activation == "swiglu":
    gate, up = jnp.split(z, 2, axis=1)
    z = jax.nn.silu(gate) * up
  elif weights.activation == "gelu":
    z = jax.nn.gelu(z)
  x_BD = added(x_BD, rounded(z), weights.mlp)
  if weights.next_FD is None:
    return x_BD, None
  heads = times(normalised(x_BD, weights.mlp.norm_in), weights.next_FD)
  return x_BD, rounded(heads)


def plain(x_BD, y_BF, weights):
  """`exact` with the kernels' roundings."""

  def rounded(x):
    return x.astype(x_BD.dtype).astype(jnp.float32)

  return exact(x_BD, y_BF, weights, rounded)


def error(actual, expected):
  """The largest difference, as a share of the largest number."""
  difference = jnp.abs(actual.astype(jnp.float32) - expected).max()
  return float(difference / jnp.abs(expected).max())
