"""The description of one attention, validated once and hashable.

Shapes: B batch, T queries, S keys, N heads, K key-value heads, G = N / K
queries to a key head, H head width.
"""

import dataclasses
import math
from collections.abc import Container
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

ACTIVATIONS = ("sigmoid", "relu", "relu2", "silu")
SIGNED = ("silu",)  # Their weights may be negative, so rows are not normalised.
HOW_TO_ADD = "docs/kernels.md#how-to-add-a-kind-of-attention-an-activation"
_FARTHEST = 2**30  # the largest query_offset
_LONGEST = 2**29  # no window is longer where the lengths are not known
DTYPES = ("float16", "bfloat16", "float32", "float64")
# A cache of keys and values may have this dtype, with a query of 16 or 32 bits.
FLOAT8 = "float8_e4m3fn"


class Operands(NamedTuple):
  """The arrays of attention besides query, key and value; None if absent.

  In Problem.shapes the members are the shapes of these arrays.
  """

  bias: Any = None  # (B or 1, N or 1, T or 1, S or 1), added to the logits
  mask: Any = None  # the same shapes, bool; True: visible
  logit_bias: Any = None  # (B or 1, N), added to the logits
  alibi_slopes: Any = None  # (B or 1, N)
  query_seq_lengths: Any = None  # (B,) int32
  key_value_seq_lengths: Any = None  # (B,) int32
  query_segment_ids: Any = None  # (B, T) int32
  key_value_segment_ids: Any = None  # (B, S) int32
  query_logit_bias: Any = None  # (B or 1, N or 1, T), added to the logits
  key_logit_bias: Any = None  # (B or 1, N or 1, S), added to the logits
  query_offset: Any = None  # (B,) int32: position of query 0 among the keys


# The operands that are added to the logits.
FLOATS = (
  "bias", "logit_bias", "alibi_slopes", "query_logit_bias", "key_logit_bias",
)  # fmt: skip
# The operands that hold integers.
INTEGERS = (
  "query_seq_lengths", "key_value_seq_lengths", "query_segment_ids",
  "key_value_segment_ids", "query_offset",
)  # fmt: skip

# The axes that an operand may leave at 1.
FREE_AXES = Operands(
  bias=range(4), mask=range(4), logit_bias=(0,), alibi_slopes=(0,),
  query_logit_bias=(0, 1), key_logit_bias=(0, 1),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
  """Everything about one attention except the numbers in its arrays.

  It is hashable, so that it can be a static argument of jit, and the key of a
  cache. `make_problem` validates and builds it.
  """

  kind: str  # one of ACTIVATIONS
  batch: int
  query_len: int
  key_len: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  dtype: str  # of query and output
  key_dtype: str  # of key and value: `dtype`, or FLOAT8
  scale: float
  logit_bias: float | None  # None: an array, operands.logit_bias
  normalizer: float  # the weights are activation(logits) / normalizer
  normalize: bool  # and are divided by their sum over a row's visible keys
  is_causal: bool
  # keys to the left and right of a query; None: all on that side
  window: tuple[int | None, int | None] | None
  query_offset: int | None  # None: not given, or an array of the operands
  shapes: Operands  # the shape of each operand, or None
  paired: bool = False  # both logit vectors are one gate's, see differentiation

  @property
  def bounds(self) -> tuple[int | None, int | None]:
    """(left, right): query i sees the keys i - left .. i + right by position.

    None: no bound on that side. A causal mask is right = 0: the keys j <= i. A
    known query_offset is included in the bounds, which may then be negative. If
    query_offset is an array, add operands.query_offset to i.
    """
    left, right = self.window or (None, None)
    right = 0 if self.is_causal else right
    offset = self.query_offset or 0
    return (
      None if left is None else left - offset,
      None if right is None else right + offset,
    )

  @property
  def distance_offset(self) -> int:
    """ALiBi's distance between query i and key j is |i + distance_offset - j|.

    If query_offset is an array, add operands.query_offset to i.
    """
    if self.query_offset is not None:
      return self.query_offset
    if self.shapes.query_offset is not None:
      return 0
    return self.key_len - self.query_len

  @property
  def is_symbolic(self) -> bool:
    """Whether jax.export leaves the batch or a length open."""
    return any(map(symbolic, (self.batch, self.query_len, self.key_len)))

  @property
  def masked_by_data(self) -> bool:
    """Whether visibility depends on more than the sizes and the bounds."""
    s = self.shapes
    moves = s.query_offset is not None and self.bounds != (None, None)
    return moves or any(
      x is not None
      for x in (
        s.mask,
        s.query_seq_lengths,
        s.key_value_seq_lengths,
        s.query_segment_ids,
      )
    )

  def __str__(self) -> str:
    """For example: sigmoid B2 T1024 S1024 N8 K8 H64 bfloat16 causal."""
    words = [
      f"{self.kind} B{self.batch} T{self.query_len} S{self.key_len} "
      f"N{self.num_heads} K{self.num_kv_heads} H{self.head_dim} {self.dtype}"
    ]
    # Softmax is always normalised.
    if self.normalize and self.kind != "softmax":
      words.append("normalized")
    words += [f"keys in {FLOAT8}"] if self.key_dtype == FLOAT8 else []
    words += ["causal"] if self.is_causal else []
    words += [f"window{self.window}"] if self.window else []
    if self.query_offset is not None:
      words.append(f"query_offset{self.query_offset}")
    words += [k for k, v in self.shapes._asdict().items() if v is not None]
    return " ".join(words)


def not_implemented(kind: str, file: str) -> ValueError:
  """The error of a file that lacks a branch for a kind of ACTIVATIONS."""
  is_kernel = file.startswith(("kernels/triton/", "kernels/mosaic/"))
  return ValueError(
    f"{kind=} is not implemented in {file}; {HOW_TO_ADD} says what it needs"
    + ". Until then give implementation='xla'" * is_kernel
  )


def make_problem(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
  *,
  kind: str,
  scale: float,
  logit_bias: float | None,
  normalizer: float,
  normalize: bool = False,
  is_causal: bool,
  window: int | tuple[int | None, int | None] | None,
  query_offset: int | None = None,
  paired: bool = False,
) -> Problem:
  """The Problem of these arrays.

  Args:
    query: (B, T, N, H).
    key, value: (B, S, K, H), of the query's dtype, or see `has_8_bits`.
    operands: see Operands.
    kind: one of ACTIVATIONS.
    scale: the factor of q k^T.
    logit_bias: a float, or None if operands.logit_bias is an array.
    normalizer: the divisor of the weights.
    normalize: whether a row's weights are divided by their sum.
    is_causal: query i sees the keys j <= i.
    window: w or (left, right), numbers of keys beside a query. None: all.
    query_offset: the position of the first query among the keys; None if it is
      not given, or an array, operands.query_offset.
    paired: whether both logit vectors are those of one gate.

  Raises:
    ValueError: for arguments that make no sense. It names the value and the
      choices.
  """
  if kind not in ACTIVATIONS:
    raise ValueError(f"{kind=}; choose from {ACTIVATIONS}")
  _check_arrays(query, key, value)
  problem = Problem(
    kind=kind,
    batch=query.shape[0],
    query_len=query.shape[1],
    key_len=key.shape[1],
    num_heads=query.shape[2],
    num_kv_heads=key.shape[2],
    head_dim=query.shape[3],
    dtype=query.dtype.name,
    key_dtype=key.dtype.name,
    scale=float(scale),
    logit_bias=None if logit_bias is None else float(logit_bias),
    normalizer=normalizer if symbolic(normalizer) else float(normalizer),
    normalize=bool(normalize),
    is_causal=bool(is_causal),
    window=_window(window, query.shape[1] + key.shape[1]),
    query_offset=_offset(query_offset),
    shapes=Operands(*(x if x is None else x.shape for x in operands)),
    paired=bool(paired),
  )
  _check_operands(problem, operands)
  _check_numbers(problem)
  return problem


def has_8_bits(query: Any, key: Any, value: Any) -> bool:
  """Whether key and value are FLOAT8, with a query of 16 or 32 bits."""
  wide = query.dtype.name in ("float16", "bfloat16", "float32")
  return wide and key.dtype.name == value.dtype.name == FLOAT8


def _check_arrays(query, key, value):
  arrays = {"query": query, "key": key, "value": value}
  cached = has_8_bits(query, key, value)
  for name, array in arrays.items():
    if array.ndim != 4:
      raise ValueError(
        f"{name}.shape={array.shape}; must have four axes: batch, length, "
        "heads, head width"
      )
    if cached:
      continue
    if array.dtype.name not in DTYPES:
      raise ValueError(f"{name}.dtype={array.dtype.name}; choose from {DTYPES}")
    if array.dtype != query.dtype:
      raise ValueError(
        f"{name}.dtype={array.dtype.name}; must be the query's, "
        f"{query.dtype.name}"
      )
  if value.shape != key.shape:
    raise ValueError(
      f"key.shape={key.shape}, value.shape={value.shape}; key and value must "
      "have the same shape"
    )
  batch, _, heads, width = query.shape
  if (key.shape[0], key.shape[3]) != (batch, width):
    raise ValueError(
      f"key.shape={key.shape}; its batch and head width must be those of the "
      f"{query.shape=}"
    )
  if not key.shape[2] or heads % key.shape[2]:
    raise ValueError(
      f"key.shape={key.shape}: {key.shape[2]} heads; must divide the query's "
      f"{heads}"
    )


def _window(window, longest):
  """(left, right), from a pair, or from one number for both sides.

  longest: the largest window, which sees every key. Larger numbers would
  overflow in the kernels' int32.
  """
  pair = window if isinstance(window, (tuple, list)) else (window, window)
  if len(pair) != 2 or not all(x is None or _counts(x) for x in pair):
    raise ValueError(
      f"local_window_size={window!r}; must be a number of keys >= 0, or a pair "
      "of such numbers, to the left and to the right, None for all keys there"
    )
  if all(x is None for x in pair):
    return None
  longest = _LONGEST if symbolic(longest) else longest
  return tuple(None if x is None else min(int(x), longest) for x in pair)


def _counts(x):
  is_int = isinstance(x, (int, np.integer)) and not isinstance(x, bool)
  return is_int and x >= 0


def symbolic(size: Any) -> bool:
  """Whether a length is a dimension that jax.export leaves open."""
  return jax.export.is_symbolic_dim(size)


def _offset(offset):
  if offset is None:
    return None
  # Sums of positions must not overflow in the kernels' int32.
  if not -_FARTHEST <= offset <= _FARTHEST:
    raise ValueError(
      f"query_offset={offset!r}; must be from {-_FARTHEST} to {_FARTHEST}"
    )
  return int(offset)


def _check_operands(p, operands):
  logits = (p.batch, p.num_heads, p.query_len, p.key_len)
  per_head = (p.batch, p.num_heads)
  full_shapes = Operands(
    bias=logits,
    mask=logits,
    logit_bias=per_head,
    alibi_slopes=per_head,
    query_seq_lengths=(p.batch,),
    key_value_seq_lengths=(p.batch,),
    query_segment_ids=(p.batch, p.query_len),
    key_value_segment_ids=(p.batch, p.key_len),
    query_logit_bias=(*per_head, p.query_len),
    key_logit_bias=(*per_head, p.key_len),
    query_offset=(p.batch,),
  )
  for name, shape, full, axes in zip(
    Operands._fields, p.shapes, full_shapes, FREE_AXES, strict=True
  ):
    if shape is not None and not fits(shape, full, axes or ()):
      be = "broadcast to" if axes else "be"
      raise ValueError(f"{name}.shape={shape}; must {be} {full}")
  if operands.mask is not None and operands.mask.dtype != bool:
    raise ValueError(
      f"mask.dtype={operands.mask.dtype.name}; must be bool (use bias for "
      "numbers that are added to the logits)"
    )
  for name in FLOATS:
    array = getattr(operands, name)
    if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(
        f"{name}.dtype={array.dtype.name}; must be a float"
        + " (a bool array is a mask)" * (array.dtype == bool)
      )
  for name in INTEGERS:
    array = getattr(operands, name)
    if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
      raise ValueError(f"{name}.dtype={array.dtype.name}; must be an integer")
  if (operands.query_segment_ids is None) != (
    operands.key_value_segment_ids is None
  ):
    raise ValueError(
      "query_segment_ids and key_value_segment_ids; give both or neither"
    )
  if p.query_offset is not None and operands.query_offset is not None:
    raise ValueError("query_offset; must be either a number or an array")


def fits(
  shape: tuple[int, ...], full: tuple[int, ...], free: Container[int]
) -> bool:
  """Whether a shape is `full`, except that its `free` axes may be 1."""
  return len(shape) == len(full) and all(
    n == m or (n == 1 and axis in free)
    for axis, (n, m) in enumerate(zip(shape, full, strict=True))
  )


def _check_numbers(p):
  if (p.logit_bias is None) == (p.shapes.logit_bias is None):
    raise ValueError("logit_bias; must be either a number or an array")
  for name in ("scale", "logit_bias", "normalizer"):
    number = getattr(p, name)
    known = number is not None and not symbolic(number)
    if known and not math.isfinite(number):
      raise ValueError(f"{name}={number!r}; must be finite")
  if p.normalize and p.kind in SIGNED:
    raise ValueError(
      f"normalize=True; must be False with kind={p.kind!r}, whose weights may "
      "be negative"
    )
  if p.normalizer <= 0:
    raise ValueError(f"normalizer={p.normalizer!r}; must be > 0")
