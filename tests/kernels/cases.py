"""Named attention problems that tests and benchmarks share."""

import dataclasses
import math

import numpy as np

from sigattn.kernels.problem import ACTIVATIONS, SIGNED, not_implemented

# Their weights and derivatives are 0 for z < 0, and a derivative has a jump or
# a corner at 0. Tests that compare derivatives give them a high bias.
FLAT = ("relu", "relu2")


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes and options of one attention problem."""

  name: str
  batch: int = 2
  queries: int = 24
  keys: int | None = None  # None: as many as queries
  heads: int = 4
  kv_heads: int | None = None  # None: as many as heads
  width: int = 8
  kind: str = "sigmoid"
  logit_bias: float | None = None
  bias_per_head: tuple[str, ...] | None = None  # axes of a logit_bias array
  scale: float | None = None
  n: int | None = None  # the length that b and the divisor are made for
  normalize: bool = False
  causal: bool = False
  window: tuple[int, int] | None = None
  alibi: bool = False
  lengths: bool = False
  segments: bool = False
  mask: tuple[int, ...] | None = None  # axes of B, N, T, S that are not 1
  bias: tuple[int, ...] | None = None
  query_bias: tuple[int, ...] | None = None  # axes of B and N that are not 1
  key_bias: tuple[int, ...] | None = None
  offset: int | str | None = None  # a number, or "array": one for each example

  def __str__(self):
    return self.name

  @property
  def shape(self):
    """(B, T, S, N, K, H)."""
    return (
      self.batch,
      self.queries,
      self.keys or self.queries,
      self.heads,
      self.kv_heads or self.heads,
      self.width,
    )


CASES = [
  Case("plain"),
  Case("one_token", queries=1),
  Case("seven", queries=7),
  Case("vit_197", batch=1, queries=197, heads=2),
  Case("cross_short", queries=5, keys=33),
  Case("cross_long", queries=33, keys=5),
  Case("grouped", kv_heads=2),
  Case("one_kv_head", kv_heads=1),
  Case("scaled", scale=0.7),
  Case("bias_low", logit_bias=-16.0),
  Case("bias_high", logit_bias=2.0),
  Case("bias_head", bias_per_head=("N",)),
  Case("bias_example_grouped", bias_per_head=("B", "N"), kv_heads=2),
  Case("causal", causal=True),
  Case("causal_cross", causal=True, queries=9, keys=20),
  Case("window", window=(3, 2)),
  Case("causal_window", causal=True, window=(4, 0)),
  Case("alibi", alibi=True),
  Case("alibi_causal_cross", alibi=True, causal=True, queries=9, keys=20),
  Case("lengths", lengths=True),
  Case("lengths_cross_grouped", lengths=True, keys=31, kv_heads=2),
  Case("segments", segments=True),
  Case("segments_causal", segments=True, causal=True),
  Case("mask", mask=(0, 1, 2, 3)),
  Case("mask_keys", mask=(0, 3)),
  Case("dense_bias", bias=(0, 1, 2, 3)),
  Case("dense_bias_shared", bias=(2, 3), kv_heads=2),
  Case("dense_bias_keys", bias=(1, 3)),
  Case("normalized", normalize=True),
  Case("normalized_causal", normalize=True, causal=True),
  Case("normalized_low", normalize=True, logit_bias=-16.0, kv_heads=2),
  Case(
    "normalized_lengths", normalize=True, lengths=True, keys=31,
    bias_per_head=("N",),
  ),
  Case(
    "normalized_segments", normalize=True, segments=True, window=(9, 3),
    alibi=True,
  ),
  Case(
    "normalized_mask", normalize=True, mask=(0, 1, 2, 3), bias=(2, 3),
    bias_per_head=("B", "N"),
  ),
  Case("normalized_relu", normalize=True, kind="relu", causal=True),
  Case("normalized_relu2", normalize=True, kind="relu2", lengths=True),
  Case("query_vector", query_bias=(0, 1), kv_heads=2),
  Case("key_vector", key_bias=(0, 1), keys=31),
  Case("shared_vectors", query_bias=(), key_bias=(1,), causal=True),
  Case(
    "normalized_vectors", normalize=True, query_bias=(0,), key_bias=(0, 1),
    lengths=True, kv_heads=2,
  ),
  Case("mask_queries", mask=(1, 2)),
  Case("bias_of_one_key", bias=(0, 1, 3), queries=1, keys=20),
  Case("offset", offset=7, causal=True, queries=9, keys=20, alibi=True),
  Case("offset_before", offset=-5, causal=True, alibi=True),
  Case("offset_behind", offset=40, window=(25, 3)),
  Case("offset_of_distances", offset=3, alibi=True),
  Case("offsets", offset="array", causal=True, window=(12, 0), alibi=True),
  Case("offset_one_query", offset="array", causal=True, queries=1, keys=33),
  Case(
    "normalized_offsets", offset="array", causal=True, normalize=True,
    queries=9, keys=30, kv_heads=2,
  ),
  Case("silu", kind="silu"),
  Case(
    "silu_causal_window", kind="silu", causal=True, window=(5, 0), bias=(3,)
  ),
  Case("silu_lengths", kind="silu", lengths=True, logit_bias=-1.0),
  Case("relu", kind="relu"),
  Case("relu_causal_bias", kind="relu", causal=True, logit_bias=0.3),
  Case("relu2", kind="relu2"),
  Case("relu2_lengths", kind="relu2", lengths=True),
  Case(
    "everything", keys=30, kv_heads=2, causal=True, window=(9, 0), alibi=True,
    lengths=True, segments=True, mask=(0, 2, 3), bias=(1, 2, 3),
    bias_per_head=("N",), query_bias=(1,), key_bias=(0,), offset=1,
  ),
]  # fmt: skip

# These have enough blocks that some are full, some lie at an edge, and some are
# skipped. They have no dense operands, which the kernels do not support.
BLOCKS = [
  dataclasses.replace(CASES[-1], name="all_but_dense", mask=None, bias=None),
  Case("blocks_causal", batch=1, queries=70, heads=2, causal=True),
  Case(  # A warpgroup masks fewer blocks than its whole tile has at the edge.
    "blocks_causal_alibi", batch=1, queries=200, heads=1, causal=True,
    alibi=True,
  ),
  # Keys lie before, around and after a block of queries. There are two heads,
  # because the gradient of one slope may be a thousandth of its terms.
  Case("blocks_alibi", batch=1, queries=200, heads=2, alibi=True),
  Case(  # Visible keys lie on both sides of distance 0.
    "blocks_causal_alibi_cross", batch=1, queries=200, keys=90, heads=1,
    causal=True, alibi=True,
  ),
  Case("blocks_cross", batch=1, queries=40, keys=70, heads=2, kv_heads=1),
  Case(
    "blocks_window", batch=1, queries=90, heads=1, window=(40, 35), alibi=True
  ),
  Case(
    "blocks_causal_window", batch=1, queries=90, heads=1, causal=True,
    window=(50, 3),
  ),
  Case(  # The window is narrower than a tile, so no block is full.
    "blocks_narrow_window", batch=1, queries=150, heads=1, causal=True,
    window=(9, 0),
  ),
  Case(
    "blocks_segments", batch=2, queries=70, heads=1, segments=True,
    bias_per_head=("N",),
  ),
  Case("blocks_lengths", batch=3, queries=60, heads=1, lengths=True),
  Case(
    "blocks_normalized_causal", batch=1, queries=70, heads=2, kv_heads=1,
    causal=True, normalize=True,
  ),
  Case(
    "blocks_normalized_lengths", batch=3, queries=60, heads=1, lengths=True,
    normalize=True, bias_per_head=("N",),
  ),
  # Keys beyond the last one, or beyond a length, must not add to a row's sum.
  Case(
    "blocks_normalized", batch=3, queries=200, heads=1, normalize=True,
    lengths=True,
  ),
  Case(
    "blocks_normalized_cross", batch=1, queries=70, keys=150, heads=2,
    kv_heads=1, normalize=True, logit_bias=-8.0,
  ),
  # Each head has its own keys. With shared keys the sum of a slope's gradient
  # was a three hundredth of its terms.
  Case(
    "blocks_offsets", batch=3, queries=70, keys=150, heads=2, causal=True,
    window=(90, 0), offset="array", alibi=True,
  ),
  Case(
    "blocks_offset", batch=1, queries=70, keys=150, heads=1, causal=True,
    offset=40,
  ),
  Case(
    "blocks_vectors", batch=2, queries=150, keys=90, heads=2, kv_heads=1,
    query_bias=(0, 1), key_bias=(0, 1), lengths=True,
  ),
  Case(
    "blocks_normalized_vectors", batch=2, queries=90, keys=150, heads=2,
    query_bias=(0, 1), key_bias=(1,), normalize=True, causal=True,
    offset="array",
  ),
  Case("blocks_silu", batch=1, queries=90, heads=2, kind="silu", causal=True),
  Case(  # There are two heads, because one slope's gradient may be small.
    "blocks_normalized_window", batch=1, queries=150, heads=2, normalize=True,
    causal=True, window=(50, 3), alibi=True,
  ),
]  # fmt: skip

# The derivative of a kind may be close to its weights where these are small.
# In 16 bits the sum of dz over a normalised row would then cancel. The kinds in
# FLAT have a high bias: if a row has one weight that is nearly 0, the rounding
# error of its output divided by this weight is larger than all gradients.
SMALL_WEIGHTS = [
  Case(
    f"small_{kind}", batch=1, queries=40, heads=2, kind=kind, normalize=True,
    logit_bias=4.0 if kind in FLAT else -10.0, query_bias=(0, 1),
  )
  for kind in ACTIVATIONS
  if kind not in SIGNED
]  # fmt: skip

# In float16 the backward pass of normalised rows must stay below 65,504 also if
# one key has nearly the whole weight of a row, if n is far above the number of
# keys, or if all weights are small. The last two change nothing in a normalised
# row of relu, except that they could leave the range.
WIDE_RANGE = [
  *(
    Case(
      f"peaked_{kind}", batch=1, queries=40, keys=200, heads=2, kind=kind,
      normalize=True, logit_bias=-10.0, scale=2.0, query_bias=(0, 1),
    )
    for kind in ACTIVATIONS if kind not in SIGNED
  ),
  Case("relu_of_long_n", kind="relu", normalize=True, n=2**20),
  Case("relu_of_small_scale", kind="relu", normalize=True, scale=1e-4),
]  # fmt: skip

# In the kernels of Triton a mask of keys is a logit of -inf.
HIDDEN_KEYS = [
  Case(f"{kind}_hidden_keys", kind=kind, mask=(0, 3)) for kind in ACTIVATIONS
]


def arbitrary(seed):
  """A Case with random sizes and options, without dense operands."""
  rng = np.random.default_rng(seed)

  def maybe(value):
    return value if rng.random() < 0.4 else None

  kv_heads, group = (int(rng.integers(1, 4)) for _ in range(2))
  kind = str(rng.choice(["sigmoid", "sigmoid", "relu", "relu2"]))
  return Case(
    f"arbitrary{seed}",
    batch=int(rng.integers(1, 4)),
    queries=int(rng.integers(1, 50)),
    keys=maybe(int(rng.integers(1, 50))),
    heads=kv_heads * group,
    kv_heads=kv_heads,
    kind=kind,
    logit_bias=maybe(float(rng.uniform(-16, 2))) if kind == "sigmoid" else None,
    scale=maybe(float(rng.uniform(0.1, 1))),
    causal=bool(rng.random() < 0.4),
    window=maybe(tuple(int(x) for x in rng.integers(0, 30, 2))),
    alibi=bool(rng.random() < 0.4),
    lengths=bool(rng.random() < 0.3),
    segments=bool(rng.random() < 0.3),
  )


ARBITRARY = [arbitrary(seed) for seed in range(12)]


def draw(case, dtype="float32", seed=0):
  """(query, key, value), the other arguments, and a cotangent of the output.

  They are NumPy arrays. query, key, value and cotangent are rounded to dtype.
  """
  rng = np.random.default_rng(seed)
  b, t, s, n, k, h = case.shape

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  arrays = [normal(b, t, n, h), normal(b, s, k, h), normal(b, s, k, h)]
  cotangent = normal(b, t, n, h)
  options = dict(
    kind=case.kind,
    logit_bias=case.logit_bias,
    scale=case.scale,
    is_causal=case.causal,
    local_window_size=case.window,
  )
  if case.n:
    options["n"] = case.n
  if case.normalize:
    options["normalize"] = True
  logits = (b, n, t, s)

  def some(axes):
    return [m if axis in axes else 1 for axis, m in enumerate(logits)]

  if case.bias_per_head:
    axes = [{"B": b, "N": n}[axis] for axis in case.bias_per_head]
    options["logit_bias"] = normal(*axes) - np.float32(math.log(s))
  if case.alibi:
    options["alibi_slopes"] = 2.0 ** -np.arange(1, n + 1, dtype=np.float32)
  if case.lengths:  # the first example has no keys
    options["query_seq_lengths"] = np.linspace(1, t, b, dtype=np.int32)
    options["key_value_seq_lengths"] = np.linspace(0, s - 2, b, dtype=np.int32)
  if case.segments:
    options["query_segment_ids"] = np.sort(rng.integers(0, 3, (b, t)))
    options["key_value_segment_ids"] = np.sort(rng.integers(0, 3, (b, s)))
  if case.mask:
    options["mask"] = rng.random(some(case.mask)) < 0.7
  if case.bias:
    options["bias"] = normal(*some(case.bias))
  for name, axes, length in (
    ("query_logit_bias", case.query_bias, t),
    ("key_logit_bias", case.key_bias, s),
  ):
    if axes is not None:
      options[name] = normal(*some(axes)[:2], length)
  if case.offset is not None:
    options["query_offset"] = case.offset
  if case.offset == "array":
    # Queries lie before the keys, among them, and after them.
    options["query_offset"] = np.linspace(-t // 2, s, b, dtype=np.int32)
  arrays = [np.asarray(x).astype(_dtype(dtype)) for x in (*arrays, cotangent)]
  return arrays[:3], options, arrays[3]


def _dtype(name):
  import ml_dtypes

  return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def visible(case, options):
  """bool (B, N, T, S), computed directly from the definition."""
  b, t, s, n, *_ = case.shape
  seen = np.ones((b, n, t, s), bool)
  i, j = np.arange(t)[:, None], np.arange(s)[None]
  place = i + _offsets(options, 0)
  if case.causal:
    seen &= j <= place
  if case.window:
    seen &= (place - case.window[0] <= j) & (j <= place + case.window[1])
  for example in range(b):
    if case.lengths:
      seen[example] &= i < options["query_seq_lengths"][example]
      seen[example] &= j < options["key_value_seq_lengths"][example]
    if case.segments:
      queries = options["query_segment_ids"][example][:, None]
      seen[example] &= queries == options["key_value_segment_ids"][example]
  if case.mask:
    seen &= options["mask"]
  return seen


def _offsets(options, default):
  """The query_offset of each example, (B or 1, 1, 1, 1)."""
  offset = options.get("query_offset", default)
  return np.reshape(offset, (-1, 1, 1, 1))


def distance(case, options):
  """ALiBi's distance of each pair, (B or 1, 1, T, S)."""
  _, t, s, *_ = case.shape
  apart = np.arange(t)[:, None] - np.arange(s)[None]
  return abs(apart + _offsets(options, s - t))


def vectors(options):
  """The sum of the logit vectors, (B or 1, N or 1, T, S or 1)."""
  total = np.zeros((1, 1, 1, 1))
  if "query_logit_bias" in options:
    total = total + options["query_logit_bias"][..., None].astype(np.float64)
  if "key_logit_bias" in options:
    total = total + options["key_logit_bias"][:, :, None].astype(np.float64)
  return total


def exact(case, arrays, options, cotangent):
  """Output and gradients in NumPy float64, as a dict of arrays.

  Its keys are out, query, key and value. If the case has arrays for logit_bias,
  alibi_slopes, bias and the logit vectors, these are also keys.
  """
  q, k, v, do = (np.asarray(x, np.float64) for x in (*arrays, cotangent))
  b, t, s, n, kv, h = case.shape
  k, v = (np.repeat(x, n // kv, axis=2) for x in (k, v))
  scale = h**-0.5 if case.scale is None else case.scale
  z = scale * np.einsum("btnh,bsnh->bnts", q, k)
  if case.bias:
    z = z + options["bias"].astype(np.float64)
  z = z + vectors(options)
  if case.alibi:
    slopes = options["alibi_slopes"].astype(np.float64)
    z = z - slopes[:, None, None] * distance(case, options)
  offset, length = options["logit_bias"], case.n or s
  if offset is None:
    offset = -math.log(length) if case.kind == "sigmoid" else 0.0
  z = z + np.asarray(offset, np.float64).reshape(*np.shape(offset), 1, 1)
  if case.kind == "sigmoid":
    p = np.exp(-np.logaddexp(0, -z))  # does not overflow
    derivative = p / (1 + np.exp(z))
  elif case.kind == "relu":
    p, derivative = np.maximum(z, 0) / length, (z > 0) / length
  elif case.kind == "silu":
    half = np.exp(-np.logaddexp(0, -z))
    p = z * half / length
    derivative = (half + z * half / (1 + np.exp(z))) / length
  elif case.kind == "relu2":
    p = np.maximum(z, 0) ** 2 / length
    derivative = 2 * np.maximum(z, 0) / length
  else:
    raise not_implemented(case.kind, "tests/kernels/cases.py")
  seen = visible(case, options)
  p, derivative = p * seen, derivative * seen
  dp = np.einsum("btnh,bsnh->bnts", do, v)
  if case.normalize:
    sums = p.sum(-1, keepdims=True)
    sums = np.where(sums > 0, sums, np.inf)  # rows without weight are 0
    p, derivative = p / sums, derivative / sums
    dp = dp - (p * dp).sum(-1, keepdims=True)
  dz = derivative * dp
  dk = scale * np.einsum("bnts,btnh->bsnh", dz, q)
  dv = np.einsum("bnts,btnh->bsnh", p, do)
  results = {
    "out": np.einsum("bnts,bsnh->btnh", p, v),
    "query": scale * np.einsum("bnts,bsnh->btnh", dz, k),
    "key": dk.reshape(b, s, kv, n // kv, h).sum(3),
    "value": dv.reshape(b, s, kv, n // kv, h).sum(3),
  }
  if case.bias_per_head:
    results["logit_bias"] = _reduce(dz.sum((2, 3)), np.shape(offset))
  if case.alibi:
    results["alibi_slopes"] = -(dz * distance(case, options)).sum((0, 2, 3))
  for name, axis in (("query_logit_bias", 3), ("key_logit_bias", 2)):
    if name in options:
      results[name] = _reduce(dz.sum(axis), options[name].shape)
  if case.bias:
    results["bias"] = _reduce(dz, options["bias"].shape)
  return results


def _reduce(x, shape):
  """Sums x over the axes that are missing or 1 in `shape`."""
  x = x.sum(tuple(range(x.ndim - len(shape))))
  axes = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] > 1)
  return x.sum(axes, keepdims=True)


PAGE = 16  # tokens of a page


def draw_paged(lengths, queries=3, heads=4, kv_heads=2, width=8, shared=0):
  """(query, key pages, value pages, table, lengths), and contiguous k and v.

  The rows begin with `shared` common pages. Unused pages hold NaN, and unused
  entries of the table hold numbers of no page.
  """
  rng = np.random.default_rng(0)
  used = [-(-x // PAGE) for x in lengths]
  table = np.full((len(lengths), max(used) + 1), 2**31 - 1)
  table[:, -1] = -7
  numbers = iter(rng.permutation(3 + sum(used)))
  common = [next(numbers) for _ in range(shared)]
  for row, count in enumerate(used):
    own = [next(numbers) for _ in range(count - shared)]
    table[row, :count] = [*common, *own][:count]
  pages = rng.standard_normal(
    (2, 3 + sum(used), PAGE, kv_heads, width), np.float32
  )
  whole = np.zeros((2, *table.shape, PAGE, kv_heads, width), np.float32)
  for row, count in enumerate(used):
    whole[:, row, :count] = pages[:, table[row, :count]]
  whole = whole.reshape(2, len(lengths), -1, kv_heads, width)
  for row, length in enumerate(lengths):
    whole[:, row, length:] = np.nan
    if length % PAGE:
      pages[:, table[row, used[row] - 1], length % PAGE :] = np.nan
  names = {x for row, count in zip(table, used, strict=True)
           for x in row[:count]}  # fmt: skip
  pages[:, [x for x in range(pages.shape[1]) if x not in names]] = np.nan
  query = rng.standard_normal((len(lengths), queries, heads, width), np.float32)
  return (query, *pages, table, np.array(lengths)), whole
