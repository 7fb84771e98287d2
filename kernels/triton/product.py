"""Products of a matrix with a few rows of the residual stream.

The kernels are in product_kernel.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sigattn.kernels.products import Norm
from sigattn.kernels.triton import launch

ACTIVATIONS = ("none", "swiglu", "gelu", "gelu_exact")


class Stream(NamedTuple):
  """The residual stream s = x + norm(y). The next product computes this sum.

  If nothing is added, all members except x are None. norm: None for no norm.
  squares: for a single row, parts whose sum is the sum of y^2.
  """

  x_BD: jax.Array
  y_BD: jax.Array | None = None
  norm: Norm | None = None
  squares: jax.Array | None = None


class Result(NamedTuple):
  """out (B, F), `squares` of out as in Stream, and s (B, D)."""

  out_BF: jax.Array
  squares: jax.Array | None
  x_BD: jax.Array


class Tile(NamedTuple):
  """The sizes of a kernel."""

  block_out: int  # outputs of a program; with swiglu, pairs of them
  block_in: int  # inputs of a step
  num_warps: int
  num_stages: int  # steps whose weights are loaded ahead


def tile(inputs: int, is_gated: bool) -> Tile:
  """The tile of a product of one row.

  In a whole step of 1B on an H200 it gave 1.36 ms a token; 8 outputs and 1,024
  inputs with 3 stages gave 1.47, and 8 outputs and 512 inputs 1.50.
  """
  block_in = min(512, _power_of_two(inputs))
  return Tile(8 if is_gated else 16, block_in, 4, 4)


def product(
  stream: Stream,
  weight_FD: jax.Array,
  norm: Norm | None = None,
  activation: str = "none",
  dtype: DTypeLike | None = None,
) -> Result:
  """out = phi(W norm(s)) of the residual stream s.

  For one row, one kernel computes all of it. For more rows, a kernel computes
  the norms, and XLA the product.

  Args:
    stream: s, of B rows.
    weight_FD: W. With swiglu it is (2 F, D): the rows of gate, then of up.
    norm: of s; None for no norm.
    activation: phi, one of ACTIVATIONS, see layers.Mlp.
    dtype: of out; None for that of the stream.
  """
  rows, inputs = stream.x_BD.shape
  dtype = dtype or stream.x_BD.dtype
  if rows == 1:
    cut = tile(inputs, activation == "swiglu")
    return of_one_row(stream, weight_FD, norm, activation, dtype, cut)
  h_BD, x_BD = residual(stream, norm)
  z_BF = jnp.einsum("BD,FD->BF", h_BD, weight_FD, preferred_element_type=dtype)
  if activation == "swiglu":
    gate_BF, up_BF = jnp.split(z_BF, 2, axis=1)
    z_BF = jax.nn.silu(gate_BF) * up_BF
  elif activation != "none":
    z_BF = jax.nn.gelu(z_BF, approximate=activation == "gelu")
  return Result(z_BF, None, x_BD)


def of_one_row(
  stream: Stream,
  weight_FD: jax.Array,
  norm: Norm | None,
  activation: str,
  dtype: DTypeLike,
  tile: Tile,
) -> Result:
  """`product` for one row, by the kernel."""
  from sigattn.kernels.triton import product_kernel

  x_1D = stream.x_BD
  outputs = len(weight_FD) // (2 if activation == "swiglu" else 1)
  programs = -(-outputs // tile.block_out)
  parts = 1 if stream.norm is None else len(stream.squares)
  x, y, *scales = _arrays(stream, norm)
  squares = launch.given(stream.squares, "float32")
  out, squares, new_1D = launch.start(
    product_kernel.product,
    (x, y, squares, *scales, weight_FD),
    [
      jax.ShapeDtypeStruct((1, outputs), dtype),
      jax.ShapeDtypeStruct((programs,), "float32"),
      _summed(stream),
    ],
    tile,
    programs,
    _constants(stream, norm)
    | dict(
      OUTPUTS=outputs,
      BLOCK_OUT=tile.block_out,
      BLOCK_IN=tile.block_in,
      STAGES=tile.num_stages,
      PARTS=parts,
      BLOCK_PARTS=_power_of_two(parts),
      ACTIVATION=activation,
    ),
  )
  return Result(out, squares, x_1D if stream.y_BD is None else new_1D)


def residual(stream: Stream, norm: Norm | None) -> tuple[jax.Array, jax.Array]:
  """(norm(s), s), (B, D) each."""
  from sigattn.kernels.triton import product_kernel

  x_BD = stream.x_BD
  if stream.y_BD is None and norm is None:
    return x_BD, x_BD
  rows, inputs = x_BD.shape
  block = _power_of_two(inputs)
  # Each thread has 16 numbers.
  cut = Tile(inputs, block, min(max(block // 512, 1), 16), 1)
  h_BD, new_BD = launch.start(
    product_kernel.residual,
    _arrays(stream, norm),
    [jax.ShapeDtypeStruct(x_BD.shape, x_BD.dtype), _summed(stream)],
    cut,
    rows,
    _constants(stream, norm) | dict(BLOCK_IN=block),
  )
  return h_BD, x_BD if stream.y_BD is None else new_BD


def _arrays(stream, norm):
  """(x, y, the scale of y's norm, the scale of s's norm)."""
  scales = (None if x is None else x.scale_D for x in (stream.norm, norm))
  return (
    stream.x_BD,
    launch.given(stream.y_BD, stream.x_BD.dtype),
    *(launch.given(x, "float32") for x in scales),
  )


def _summed(stream):
  """The type of s; one unused number if s is x."""
  x_BD = stream.x_BD
  shape = (1,) if stream.y_BD is None else x_BD.shape
  return jax.ShapeDtypeStruct(shape, x_BD.dtype)


def _constants(stream, norm):
  return dict(
    INPUTS=stream.x_BD.shape[1],
    ADDS=stream.y_BD is not None,
    X_EPSILON=norm and norm.epsilon,
    Y_EPSILON=stream.norm and stream.norm.epsilon,
  )


def _power_of_two(number):
  """The least power of two that is not below the number."""
  return 1 << (number - 1).bit_length()
