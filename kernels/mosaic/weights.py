"""The mathematics of one block: from scores q k^T to weights, in registers.

A block of scores s has stationary rows and streamed columns. Its logits are

  z = scale s + logit_bias - slope |i + offset - j|

for query i and key j. Logit vectors are a part of s already, see vectors.py.
The weights are phi(z), or 0 where the pair is hidden.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels.mosaic import registers
from sigattn.kernels.problem import not_implemented

_WGMMA = plgpu.Layout.WGMMA
# Layouts of one number for each row, and of one for each column.
ROW, COLUMN = _WGMMA.reduce(1), _WGMMA.reduce(0)
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Form:
  """The mathematics, as far as the kernels need to know it."""

  kind: str
  exact: bool  # sigmoid by exp2 and an inverse; else by the hardware's tanh
  scale: float
  logit_bias: float | None  # None: it is in Gmem.scalars
  alibi: bool
  left: int | None  # query i sees the keys i - left .. i + right
  right: int | None
  segments: bool
  end: bool  # whether keys beyond a length are hidden (with normalised rows)
  offset: int  # added to row - column in ALiBi's distances
  weight_scale: float  # factor of weights before they are rounded to 16 bits
  dz_scale: float  # the same for gradients of logits
  paired: bool = False  # see differentiation.paired

  @property
  def tanh(self) -> bool:
    """Whether the weights are (1 + tanh(z / 2)) / 2, by the hardware's tanh."""
    return self.kind == "sigmoid" and not self.exact

  @property
  def output_unit(self) -> float:
    """The factor that the forward pass leaves in its weights.

    It is 2 if the weights are 1 + tanh. To halve them would read more registers
    than to add 1 (registers.tanh). The output is divided by it once.
    """
    return 2.0 if self.tanh else 1.0

  @property
  def hidden(self) -> float:
    """The logit of a hidden pair. SiLU multiplies it by 0."""
    return -1e30 if self.kind == "silu" else -math.inf

  @property
  def masked(self) -> bool:
    """Whether positions, segments or lengths hide pairs.

    Lengths usually need no mask, because the keys beyond them are zeros, which
    add nothing to a product. But they would add to the sum of a row.
    """
    bounds = self.left is not None or self.right is not None
    return self.segments or self.end or bounds


@dataclasses.dataclass(frozen=True)
class Place:
  """The positions of a block's rows and columns, counted as keys are."""

  rows: jax.Array  # the position of the first row
  columns: jax.Array  # the position of the first column
  of_queries: bool  # whether rows are queries; otherwise they are keys

  def bounds(self, left: int | None, right: int | None) -> tuple:
    """(low, high): a row sees row + low <= column <= row + high.

    This means query - left <= key <= query + right. None: no bound.
    """
    if not self.of_queries:
      left, right = right, left  # key - right <= query <= key + left
    shift = self.rows - self.columns
    return (
      None if left is None else shift - left,
      None if right is None else shift + right,
    )

  def apart(self, offset: int) -> jax.Array:
    """|query + offset - key| is |row + apart - column|."""
    if not self.of_queries:
      offset = -offset
    return self.rows - self.columns + offset

  def side(self, form: Form) -> float | None:
    """s = 1 or -1, if every visible distance is s (row + apart - column).

    None if the sign depends on the pair.
    """
    if form.right is None or form.right > form.offset:
      return None
    return 1.0 if self.of_queries else -1.0

  def sides(
    self, offset: int, shape: tuple[int, int]
  ) -> tuple[jax.Array, jax.Array]:
    """(whether distances of both signs occur, the sign if there is one)."""
    apart = self.apart(offset)
    above, below = apart >= shape[1] - 1, apart <= 1 - shape[0]
    return ~(above | below), jnp.where(above, 1.0, -1.0)

  def distance(self, x: jax.Array, offset: int) -> jax.Array:
    """|query + offset - key|, float32, of the shape of x."""
    return registers.distance(x, self.apart(offset))


def scalars(
  form: Form, ref: Any, batch: jax.Array, head: jax.Array
) -> tuple[float | jax.Array, jax.Array | None]:
  """(logit_bias, slope) of a head. ref: a Ref (B, N, 2), or None."""
  bias, slope = form.logit_bias, None
  if bias is None:
    bias = ref[batch, head, 0]
  if form.alibi:
    slope = ref[batch, head, 1]
  return bias, slope


def load_ids(
  form: Form,
  ref: Any,
  batch: jax.Array,
  start: jax.Array,
  count: int,
  layout: Any,
) -> jax.Array | None:
  """`count` segment ids from `start` on; None without segments.

  ref: a Ref (B, length). layout: ROW or COLUMN.
  """
  if not form.segments:
    return None
  rows = ref.at[batch, pl.ds(start, count)]
  return plgpu.load(rows, layout=layout, optimized=False)


def load_rows(
  ref: Any, batch: jax.Array, head: jax.Array, start: jax.Array, count: int
) -> list[jax.Array]:
  """The numbers of `count` queries from `start` on, in layout ROW.

  ref: a Ref (B, N, kinds, length), as Gmem.rows, or None: an empty list.
  """
  if ref is None:
    return []
  return [
    plgpu.load(
      ref.at[batch, head, kind, pl.ds(start, count)], layout=ROW,
      optimized=False,
    )
    for kind in range(ref.shape[2])
  ]  # fmt: skip


def offset(ref: Any, batch: jax.Array) -> int | jax.Array:
  """The number added to the positions of queries. ref: (B,), or None."""
  return 0 if ref is None else ref[batch]


def zeros(rows: int) -> jax.Array:
  """Zeros in layout ROW, to which sums of rows are added."""
  return plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROW)


def row_gradient(
  form: Form, p: jax.Array, dz: jax.Array, dp: jax.Array, is_normalized: bool
) -> jax.Array:
  """The terms whose sum over the keys is the gradient of a query's logit bias.

  They are dz, but -p^2 dp for normalised sigmoid, where dz nearly cancels; see
  xla.py and differentiation.paired.
  """
  if is_normalized and form.kind == "sigmoid" and not form.paired:
    return -(p * p) * dp
  return dz


def of_normalized(dp: jax.Array, rows: list[jax.Array], axis: int) -> jax.Array:
  """inverse dp - shift; dp if the rows are not normalised.

  rows: [-shift], [-shift, inverse] or []. axis: the axis of queries in dp.
  """
  if not rows:
    return dp
  minus_shift, *inverse = (
    lax.broadcast_in_dim(x, dp.shape, [axis]) for x in rows
  )
  for x in inverse:
    dp = x * dp
  return dp + minus_shift


def to_16_bits(x: jax.Array, factor: float, dtype: jnp.dtype) -> jax.Array:
  """x times a power of two that keeps small numbers from underflow."""
  return (x if factor == 1 else x * factor).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Logits:
  """Turns the scores of a block into logits, in units of the activation."""

  form: Form
  place: Place
  unit: float  # The activation takes unit * z.
  scale: float  # unit times the scale of the scores
  bias: float | jax.Array  # unit times the logit bias
  slope: jax.Array | None
  load_ids: Callable[[], tuple]
  end: jax.Array | None  # the first column that is hidden
  masked: bool | jax.Array
  paced: bool
  polynomial: bool

  def hide(self, x, hidden):
    """x, or `hidden` where a pair is not visible."""
    if not self.form.masked or self.masked is False:
      return x
    cover = functools.partial(self._cover, hidden=hidden)
    if self.masked is True:
      return cover(x)
    return lax.cond(self.masked, cover, lambda x: x, x)

  def _cover(self, x, hidden):
    form = self.form
    if form.left is not None or form.right is not None:
      low, high = self.place.bounds(form.left, form.right)
      # The fused backward pass has no registers left at head width 64, where
      # its blocks have 128 queries.
      shares = self.place.of_queries or x.shape[1] <= 64
      x = registers.hide(x, low, high, hidden, shares)
    if self.end is not None:
      x = registers.hide_from(x, self.end, hidden)
    if form.segments:
      row, column = self.load_ids()
      same = lax.broadcast_in_dim(row, x.shape, [0]) == lax.broadcast_in_dim(
        column, x.shape, [1]
      )
      x = jnp.where(same, x, hidden)
    return x

  def activate(self, z):
    """Hides logits, and then applies tanh if that is the form of the sigmoid.

    Logits are hidden and not weights, because hiding weights lets the compiler
    move work between the products, which then wait for each other.
    """
    z = self.hide(z, self.form.hidden * self.unit)
    return jnp.tanh(z) if self.form.tanh else z

  def one_sided(self, x, _=None, sign=1.0):
    """What `compute` returns, if all distances have one sign.

    A distance is then sign (row + apart - column). Without ALiBi there are no
    distances.
    """
    plane = ()
    if self.form.alibi:
      slope = -self.unit * sign * self.slope
      plane = slope, self.place.apart(self.form.offset)
    if self.paced:
      line = self.scale, self.bias, *plane
      if self.form.tanh:
        return registers.tanh(x, *line)
      return registers.paced_sigmoid(x, self.polynomial, *line)
    if self.form.alibi:
      return self.activate(
        x * self.scale + registers.plane(x, self.bias, *plane)
      )
    return self.activate(x * self.scale + self.bias)

  def two_sided(self, x, _=None):
    """The same if a distance is an absolute value."""
    far = self.place.distance(x, self.form.offset)
    z = x * self.scale + self.bias - (self.unit * self.slope) * far
    if not self.paced:
      return self.activate(z)
    if self.form.tanh:
      return jnp.tanh(z)
    return registers.sigmoid(z, self.polynomial)

  def compute(self, s):
    """tanh or the paced sigmoid of the logits; the logits of other forms."""
    # A paced form is computed directly from the scores, so scores are masked.
    x = self.hide(s, -math.inf) if self.paced else s
    form, place = self.form, self.place
    sign = place.side(form)
    if not form.alibi or sign is not None:
      return self.one_sided(x, sign=sign)
    if not place.of_queries:
      return self.two_sided(x)  # There are no registers for a branch.
    both, sign = place.sides(form.offset, x.shape)
    return lax.cond(
      both,
      functools.partial(self.two_sided, x),
      functools.partial(self.one_sided, x, sign=sign),
      None,
    )


def weights(
  form: Form,
  s: jax.Array,
  bias: float | jax.Array,
  slope: jax.Array | None,
  place: Place,
  ids: Callable[[], tuple],
  masked: bool | jax.Array,
  *,
  end: jax.Array | None = None,
  paced: bool = False,
  polynomial: bool = False,
  in_output_unit: bool = False,
) -> tuple[jax.Array, Callable[[], jax.Array] | None]:
  """(phi(z), phi') of the logits z = scale s + bias - slope distance.

  phi' is a function without arguments, to be called only where it is needed.

  Args:
    form: the mathematics.
    s: (rows, columns) float32, in registers as the tensor cores leave it.
    bias, slope: numbers that the whole head shares.
    place: the positions of the block.
    ids: returns the segment ids of the rows and of the columns.
    masked: whether a pair may be hidden: a bool, or a traced bool, on which the
      kernel branches.
    end: the first column that is beyond the length of its sequence; None if
      such columns are not hidden.
    paced: whether the sigmoid is computed in small groups (registers.tanh).
    polynomial: whether half of the exact sigmoid's inverses are computed by a
      polynomial (registers.sigmoid).
    in_output_unit: returns weights in Form.output_unit, and no phi'.
  """
  unit = {"sigmoid": -_LOG2_E if form.exact else 0.5, "silu": 0.5}.get(
    form.kind, 1.0
  )
  paced = paced and form.kind == "sigmoid" and form.scale > 0
  z = _Logits(
    form=form, place=place, unit=unit, scale=unit * form.scale,
    bias=unit * bias, slope=slope, load_ids=ids, end=end, masked=masked,
    paced=paced, polynomial=polynomial,
  ).compute(s)  # fmt: skip
  if form.kind == "relu":
    return jnp.maximum(z, 0.0), lambda: jnp.where(z > 0, 1.0, 0.0)
  if form.kind == "relu2":
    p = jnp.maximum(z, 0.0)
    return p * p, lambda: 2 * p
  if form.kind == "silu":  # z is half the logit.
    t = jnp.tanh(z)
    p = z * t + z
    return p, lambda: (0.5 + 0.5 * t) * (1 + z - z * t)
  if form.kind != "sigmoid":
    raise not_implemented(form.kind, "kernels/mosaic/weights.py")
  if form.tanh and in_output_unit:
    return 1 + z, None
  if form.exact and not paced:
    z = registers.sigmoid(z, polynomial)
  p = 0.5 * z + 0.5 if form.tanh else z
  return p, lambda: p - p * p
