"""A matrix times a few rows: the residual stream, its norm, an activation.

product_kernel.py holds the kernel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sigattn.kernels.triton import launch

MOST_ROWS = 32  # Each program of the kernel reads all rows.
ACTIVATIONS = ("none", "swiglu", "gelu", "gelu_exact")


class Norm(NamedTuple):
  """RMSNorm: x / sqrt(mean(x^2) + epsilon) * scale."""

  scale_D: jax.Array
  epsilon: float


class Stream(NamedTuple):
  """The residual stream x + norm(y), which the next product adds up.

  squares: (programs, B), whose sum is that of y^2, where the kernel needs it.
  norm: None for none. All but x are None where there is nothing to add.
  """

  x_BD: jax.Array
  y_BD: jax.Array | None = None
  squares: jax.Array | None = None
  norm: Norm | None = None


class Tile(NamedTuple):
  """How the work of the kernel is cut up."""

  block_out: int  # outputs of a program, with swiglu pairs of them
  block_in: int  # inputs of a step
  num_warps: int
  num_stages: int  # steps whose weights are loaded ahead


class Result(NamedTuple):
  """out (B, F), the shares of its squares that Stream names, and s (B, D)."""

  out_BF: jax.Array
  squares: jax.Array | None
  x_BD: jax.Array


def tile(rows: int, outputs: int, inputs: int, is_gated: bool) -> Tile:
  """The tile of a product."""
  if rows == 1:
    block_in = min(1024, _power_of_two(inputs))
    return Tile(4 if is_gated else 8, block_in, 4, 3)
  block_in = min(128, max(_power_of_two(inputs), 16))
  return Tile(16 if is_gated or outputs <= 4096 else 32, block_in, 4, 4)


def product(
  stream: Stream,
  weight_FD: jax.Array,
  norm: Norm | None = None,
  activation: str = "none",
  dtype: DTypeLike | None = None,
) -> Result:
  """out = phi(W norm(s)) of the residual stream s = x + norm(y).

  By the kernel for up to MOST_ROWS rows, and otherwise by XLA.

  Args:
    stream: of B rows.
    weight_FD: W; with swiglu (2 F, D), the gate's rows before those of up.
    norm: of s; None: none.
    activation: phi, one of ACTIVATIONS, see layers.Mlp.
    dtype: of out; None: that of the stream.
  """
  rows, inputs = stream.x_BD.shape
  arrays = stream, weight_FD, norm, activation, dtype or stream.x_BD.dtype
  # Before the norm, a number may be too large for float16.
  if rows > MOST_ROWS or stream.x_BD.dtype == jnp.float16:
    return by_xla(*arrays)
  is_gated = activation == "swiglu"
  outputs = len(weight_FD) // (1 + is_gated)
  return by_kernel(*arrays, tile(rows, outputs, inputs, is_gated))


def by_xla(
  stream: Stream,
  weight_FD: jax.Array,
  norm: Norm | None,
  activation: str,
  dtype: DTypeLike,
) -> Result:
  """As product; without the squares, which it does not need."""
  x_BD = stream.x_BD
  if stream.y_BD is not None:
    x_BD = x_BD + _normalized(stream.y_BD, stream.norm)
  z_BF = jnp.einsum(
    "BD,FD->BF",
    _normalized(x_BD, norm),
    weight_FD,
    preferred_element_type=dtype,
  )
  if activation == "swiglu":
    gate_BF, up_BF = jnp.split(z_BF, 2, axis=1)
    z_BF = jax.nn.silu(gate_BF) * up_BF
  elif activation != "none":
    z_BF = jax.nn.gelu(z_BF, approximate=activation == "gelu")
  return Result(z_BF, None, x_BD)


def _normalized(x_BD, norm):
  if norm is None:
    return x_BD
  wide_BD = x_BD.astype(jnp.float32)
  mean_B1 = (wide_BD**2).mean(1, keepdims=True)
  wide_BD *= jax.lax.rsqrt(mean_B1 + norm.epsilon) * norm.scale_D[None]
  return wide_BD.astype(x_BD.dtype)


def by_kernel(
  stream: Stream,
  weight_FD: jax.Array,
  norm: Norm | None,
  activation: str,
  dtype: DTypeLike,
  tile: Tile,
) -> Result:
  """As product."""
  from sigattn.kernels.triton import product_kernel

  rows, inputs = stream.x_BD.shape
  outputs = len(weight_FD) // (2 if activation == "swiglu" else 1)
  programs = -(-outputs // tile.block_out)
  adds, y_norm = stream.y_BD is not None, stream.norm
  parts = 1 if y_norm is None else len(stream.squares)
  x = stream.x_BD
  shapes = [
    ((rows, outputs), dtype),
    ((programs, rows), "float32"),
    (x.shape if adds else (1,), x.dtype),
  ]
  out, squares, new = launch.start(
    product_kernel.product,
    (
      x,
      launch.given(stream.y_BD, x.dtype),
      launch.given(stream.squares, jnp.float32),
      launch.given(y_norm and y_norm.scale_D, jnp.float32),
      launch.given(norm and norm.scale_D, jnp.float32),
      weight_FD,
    ),
    [jax.ShapeDtypeStruct(*shape) for shape in shapes],
    tile,
    programs,
    dict(
      ROWS=rows,
      INPUTS=inputs,
      OUTPUTS=outputs,
      BLOCK_ROWS=max(_power_of_two(rows), 16),
      BLOCK_OUT=tile.block_out,
      BLOCK_IN=tile.block_in,
      STAGES=tile.num_stages,
      PARTS=parts,
      BLOCK_PARTS=_power_of_two(parts),
      ADDS=adds,
      X_EPSILON=norm and norm.epsilon,
      Y_EPSILON=y_norm and y_norm.epsilon,
      ACTIVATION=activation,
      PRECISION=launch.precision(),
    ),
  )
  return Result(out, squares, new if adds else x)


def _power_of_two(number):
  """The least one that is not below a number."""
  return 1 << (number - 1).bit_length()
