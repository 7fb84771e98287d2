"""Pointwise attention on Hopper GPUs (H100, H200), in Pallas Mosaic GPU.

The host side: what can be done, with which constants, and the derivative. The
kernels are in kernels. Forward saves query, key and value alone.

The backward pass computes dk and dv with the keys at rest. For short sequences
dq comes from a kernel of its own with the queries at rest: seven products of
matrices in all, the same bits at every run. For long ones (_ADDED says from
where) the kernel of the keys adds each block's share of dq to float32 sums in
memory: five products, and a sum whose order, and so whose last bits, differ
from run to run, unless XLA is asked for determinism
(XLA_FLAGS=--xla_gpu_deterministic_ops=true). Both forms measured on an H100,
n = 8,192 without a mask, TFLOP/s by five products: 512 and 607 at head width
128, 398 and 551 at 64 (benchmarks/NOTES.md).
"""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from sigattn.kernels import batching_and_sharding, numerics, segments
from sigattn.kernels.mosaic import kernels, reduce, tiles
from sigattn.kernels.mosaic.kernels import Form, visible_blocks
from sigattn.kernels.mosaic.schedule import Schedule
from sigattn.kernels.problem import Operands

_ALIGNED = 8  # rows: sequences are padded to a multiple for the copy engine


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(problem, query, key, value, operands):
  (out,) = batching_and_sharding.over_batch(
    _forward, ("BTNH",), problem, query, key, value, operands
  )
  return out


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Trained:
  """Whether anyone wants the gradients of logit_bias and slopes."""

  operands: bool


def _save_inputs(problem, *inputs):
  # Leaves are pairs of a value and whether it is differentiated.
  trained = any(x.perturbed for x in jax.tree.leaves(inputs[-1]))
  inputs = jax.tree.map(lambda x: x.value, inputs)
  return attention(problem, *inputs), (_Trained(trained), *inputs)


def _pull_back(problem, saved, d_out):
  trained, query, key, value, operands = saved
  *d_inputs, d_bias_BN, d_slopes_BN = batching_and_sharding.over_batch(
    functools.partial(_backward, trained.operands),
    ("BTNH", "BSKH", "BSKH", "BN", "BN"),
    problem, query, key, value, operands, d_out,
  )  # fmt: skip
  d_operands = Operands()._replace(
    logit_bias=batching_and_sharding.head_cotangent(
      d_bias_BN, operands.logit_bias
    ),
    alibi_slopes=batching_and_sharding.head_cotangent(
      d_slopes_BN, operands.alibi_slopes
    ),
  )
  inputs = query, key, value
  return *map(batching_and_sharding.cotangent, d_inputs, inputs), d_operands


attention.defvjp(_save_inputs, _pull_back, symbolic_zeros=True)


def _forward(problem, query, key, value, operands):
  """(out,)"""
  length, form = problem.query_len, _form(problem)
  problem, operands, query, key, value = _aligned(
    problem, operands, query, key, value
  )
  (out,) = _forward_aligned(form, problem, query, key, value, operands)
  return (out[:, :length],)


def _forward_aligned(form, problem, query, key, value, operands):
  tile = tiles.TILES[problem.head_dim][0]
  plain = not (form.masked or form.alibi or _by_data(operands))
  if plain and problem.key_len >= tiles.LONG:
    tile = tiles.LONG_TILES.get(problem.head_dim, tile)
  key, value = (
    _without_padding(x, operands.key_value_seq_lengths) for x in (key, value)
  )
  return kernels.by_queries(
    form, tile, _schedule(problem, operands, tile, True), query, key, value,
    scale=1 / (problem.normalizer * form.weight_scale * form.output_unit),
    **_operands(form, problem, operands, tile, True),
  )  # fmt: skip


def _backward(sums, problem, query, key, value, operands, d_out):
  """(dq, dk, dv, dlogit_bias (B, N), dslopes (B, N)), the last two float32.

  Without `sums` those two are zeros.
  """
  lengths, form = (problem.query_len, problem.key_len), _form(problem)
  problem, operands, query, key, value, d_out = _aligned(
    problem, operands, query, key, value, d_out.astype(query.dtype)
  )
  dq, dk, dv, *totals = _backward_aligned(
    sums, form, problem, query, key, value, operands, d_out
  )
  return dq[:, : lengths[0]], dk[:, : lengths[1]], dv[:, : lengths[1]], *totals


def _aligned(problem, operands, query, key, value, *d_out):
  """The same with zeros after the sequences, which add nothing to any sum."""
  rest = [-x % _ALIGNED for x in (problem.query_len, problem.key_len)]
  if not any(rest):
    return problem, operands, query, key, value, *d_out

  def pad(x, side, mode="constant"):
    if x is None:
      return None
    axes = [(0, 0)] * x.ndim
    axes[1] = 0, rest[side]
    return jnp.pad(x, axes, mode)

  operands = operands._replace(
    query_segment_ids=pad(operands.query_segment_ids, 0, "edge"),
    key_value_segment_ids=pad(operands.key_value_segment_ids, 1, "edge"),
  )
  problem = dataclasses.replace(
    problem,
    query_len=problem.query_len + rest[0],
    key_len=problem.key_len + rest[1],
    shapes=Operands(*(x if x is None else x.shape for x in operands)),
  )
  return (
    problem, operands, pad(query, 0), pad(key, 1), pad(value, 1),
    *(pad(x, 0) for x in d_out),
  )  # fmt: skip


def _backward_aligned(sums, form, problem, query, key, value, operands, d_out):
  _, query_tile, key_tile = tiles.TILES[problem.head_dim]
  adds = _adds_in_any_order(form, problem)
  if adds:
    key_tile = tiles.ADDED[problem.head_dim].tile
  lengths = operands.query_seq_lengths, operands.key_value_seq_lengths
  query, d_out = (_without_padding(x, lengths[0]) for x in (query, d_out))
  key, value = (_without_padding(x, lengths[1]) for x in (key, value))
  arrays = query, key, value, d_out
  dz_scale = problem.scale / (problem.normalizer * form.slope_scale)
  by_keys = functools.partial(
    kernels.by_keys,
    form, key_tile, _schedule(problem, operands, key_tile, False), *arrays,
    **_operands(form, problem, operands, key_tile, False),
  )  # fmt: skip
  scales = dict(
    key=dz_scale, value=1 / (problem.normalizer * form.weight_scale)
  )

  if adds:
    dq, dk, dv, *rest = by_keys(scales=scales, sums=sums, adds_dq=True)
    dq = reduce.in_rows(dq)[:, : query.shape[1]]
    dq = (dq * dz_scale).astype(query.dtype)
    return dq, dk, dv, *_totals(problem, rest)
  if problem.head_dim > tiles.BOTH:
    (dv,) = by_keys(scales={"value": scales.pop("value")})
    dk, *rest = by_keys(scales=scales, sums=sums)
  else:
    dk, dv, *rest = by_keys(scales=scales, sums=sums)
  (dq,) = kernels.by_queries(
    form, query_tile, _schedule(problem, operands, query_tile, True), *arrays,
    scale=dz_scale, **_operands(form, problem, operands, query_tile, True),
  )  # fmt: skip
  return dq, dk, dv, *_totals(problem, rest)


def _totals(problem, totals):
  """The gradients of logit_bias and slopes: sums over the keys."""
  none = jnp.zeros((problem.batch, problem.num_heads), jnp.float32)
  if not totals:
    return none, none
  totals = totals[0].sum(-1) / problem.normalizer
  return totals[0], totals[1] if len(totals) > 1 else none


def _adds_in_any_order(form, problem):
  """Whether dq is a sum in no fixed order, which long sequences make faster."""
  flags = os.environ.get("XLA_FLAGS", "").split()
  asked = any(
    flag in ("--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops=true")
    for flag in flags
  )
  added = tiles.ADDED.get(problem.head_dim)
  if asked or added is None:
    return False
  return problem.key_len >= (added.masked if form.masked else added.open)


def _form(problem):
  left, right = problem.window or (None, None)
  if problem.is_causal:  # the keys j <= i + 0
    right = 0
  weight_scale = slope_scale = 1.0
  if problem.dtype == "float16" and problem.kind == "sigmoid":
    # Normal numbers begin at 2^-14 = e^-9.7, weights are at most 1. What the
    # gradients of logits reach depends on do v^T: those of the usual weights
    # are lifted to 2^-9 of it, so that some of 2^7 may meet a weight of 1 / 2.
    weight_scale = 2.0**14
    bias = problem.logit_bias
    bias = -math.log(problem.key_len) if bias is None else bias
    slope_scale = 2.0 ** min(max(round(-bias / math.log(2)) - 9, 0), 12)
  elif problem.dtype == "float16" and problem.kind == "relu2":
    # Squares leave the range from 256 on.
    weight_scale = 2.0 ** -max(round(math.log2(problem.normalizer)), 0)
  return Form(
    kind=problem.kind,
    exact=problem.kind == "sigmoid" and numerics.exact_sigmoid(problem),
    scale=problem.scale,
    logit_bias=problem.logit_bias,
    alibi=problem.shapes.alibi_slopes is not None,
    left=left,
    right=right,
    segments=problem.shapes.query_segment_ids is not None,
    offset=problem.key_len - problem.query_len,
    weight_scale=weight_scale,
    slope_scale=slope_scale,
  )


def _schedule(problem, operands, tile, of_queries):
  heads, length, others = problem.num_heads, problem.query_len, problem.key_len
  form = _form(problem)
  before, after = form.left, form.right
  if not of_queries:
    heads, length, others = problem.num_kv_heads, others, length
    before, after = after, before
  rows = tile.rows * tile.warpgroups
  tiles = pl.cdiv(length, rows)
  programs, costs = _programs(), None
  if _by_data(operands):  # As heavy as its data: let the hardware balance.
    programs = tiles * problem.batch * heads
  elif before is not None or after is not None:
    costs = _blocks_seen(tiles, rows, before, after, tile.block, others) + 1
  return Schedule(tiles, problem.batch * heads, programs, of_queries, costs)


def _blocks_seen(tiles, rows, before, after, block, length):
  """(tiles,) how many blocks each tile sees, as visible_blocks has it."""
  first = np.arange(tiles) * rows
  count = pl.cdiv(length, block)
  low, high = np.zeros_like(first), np.full_like(first, count)
  if before is not None:
    low = np.minimum(np.maximum(first - before, 0) // block, count - 1)
  if after is not None:
    high = np.minimum(
      np.maximum(first + rows - 1 + after, 0) // block + 1, count
    )
  return np.maximum(high - low, 1)


def _programs():
  """One for each multiprocessor."""
  found = jax.config.jax_default_device or jax.local_devices()[0]
  return getattr(found, "core_count", None) or 132


def _by_data(operands):
  return any(x is not None for x in operands[4:])


def _without_padding(x_BLNH, lengths):
  """Zeros beyond each length: padding may hold NaN, and 0 NaN is NaN."""
  if lengths is None:
    return x_BLNH
  place = jnp.arange(x_BLNH.shape[1])
  seen = (place[None] < lengths[:, None])[:, :, None, None]
  return jnp.where(seen, x_BLNH, jnp.zeros((), x_BLNH.dtype))


def _operands(form, problem, operands, tile, of_queries):
  """The kernels' arguments for what is neither query, key nor value."""
  rows = tile.rows * tile.warpgroups
  lengths = {
    True: ("query_lengths", operands.query_seq_lengths),
    False: ("key_lengths", operands.key_value_seq_lengths),
  }
  name, length = lengths[of_queries]
  return {
    "scalars": _scalars(problem, operands),
    "plan": _plan(form, problem, operands, rows, tile.block, of_queries),
    "query_ids": _pad(
      operands.query_segment_ids, rows if of_queries else tile.block
    ),
    "key_ids": _pad(
      operands.key_value_segment_ids, tile.block if of_queries else rows
    ),
    name: None if length is None else length.astype(jnp.int32),
  }


def _scalars(problem, operands):
  """(B, N, 2) float32: logit_bias and slope; None where neither is an array."""
  parts = operands.logit_bias, operands.alibi_slopes
  if all(x is None for x in parts):
    return None
  shape = problem.batch, problem.num_heads
  parts = [
    jnp.zeros(shape) if x is None else jnp.broadcast_to(x, shape) for x in parts
  ]
  return jnp.stack(parts, -1).astype(jnp.float32)


def _pad(ids, multiple):
  if ids is None:
    return None
  pad = -ids.shape[1] % multiple
  return jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, pad)), "edge")


def _plan(form, problem, operands, rows, block, of_queries):
  """(B, tiles, 4) int32, as visible_blocks; None where positions decide."""
  if not _by_data(operands):
    return None
  length, others = problem.query_len, problem.key_len
  before, after = form.left, form.right
  lengths = [operands.query_seq_lengths, operands.key_value_seq_lengths]
  ids = [operands.query_segment_ids, operands.key_value_segment_ids]
  if not of_queries:
    length, others, before, after = others, length, after, before
    lengths.reverse()
    ids.reverse()
  first = jnp.arange(pl.cdiv(length, rows), dtype=jnp.int32) * rows
  bounds = visible_blocks(first, first + rows - 1, before, after, block, others)
  shape = problem.batch, len(first)
  low, full_low, full_high, high = (jnp.broadcast_to(x, shape) for x in bounds)
  if lengths[1] is not None:  # Zeros follow: none of them needs a mask.
    high = jnp.minimum(high, pl.cdiv(lengths[1], block)[:, None])
  if lengths[0] is not None:
    high = jnp.where(first[None] < lengths[0][:, None], high, 0)
  if ids[0] is not None:
    spans = segments.spans(*ids, rows)
    begin, end, full_end = (spans[..., i] for i in range(3))
    low = jnp.maximum(low, begin // block)
    high = jnp.minimum(high, pl.cdiv(end, block))
    full_low = jnp.maximum(full_low, pl.cdiv(begin, block))
    last = jnp.where(full_end >= others, high, full_end // block)
    full_high = jnp.minimum(full_high, last)
  low = jnp.minimum(low, pl.cdiv(others, block) - 1)
  high = jnp.maximum(high, low + 1)
  full_low = jnp.clip(full_low, low, high)
  full_high = jnp.clip(full_high, full_low, high)
  return jnp.stack([low, full_low, full_high, high], -1).astype(jnp.int32)
