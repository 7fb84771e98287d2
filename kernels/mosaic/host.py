"""The host side of the Hopper kernels: the choice of kernels and arguments.

Everything here is plain JAX around the kernels: padding, scales, schedules, and
the choice between the two backward passes.

Normalised rows, out = p v / s with s the sums of the rows of p, need more:

  forward   The kernel also returns s. Keys beyond the end of a sequence would
            add to s, so they are hidden (Form.end), unless another mask hides
            them.
  backward  dz = phi'(z) (inverse do v^T - shift), dv = (inverse p)^T do, where
            inverse = 1 / s and shift is as in numerics.inverse_and_shift. In
            bfloat16 with sigmoid, normalized.py multiplies do by the inverse
            before the kernels, so that they read one number a row, the shift.
            In float16 the product could leave the range: a row of weights of
            e^-16 has a sum of 1e-6. With relu the sums may be close to 0, and
            the rounded product would not be exact enough. In these cases the
            kernels read the inverse too.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sigattn.kernels import device, differentiation, numerics, xla
from sigattn.kernels.mosaic import (
  blocks,
  dkv,
  dq,
  forward,
  fused_backward,
  normalized,
  reduce,
  tiles,
  vectors,
)
from sigattn.kernels.mosaic.schedule import Schedule
from sigattn.kernels.mosaic.weights import Form
from sigattn.kernels.problem import Operands, Problem

_ALIGNED = 8  # Sequences are padded to a multiple of it for the copy engine.
# In float16, dz is scaled to about 2^-9 times do v^T for typical weights. Then
# a do v^T of 2^7 may meet a weight of 1 / 2.
_HEADROOM = 9


def attention(
  problem: Problem,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """mosaic.attention: (B, T, N, H), with problem.normalize also (B, T, N)."""
  passes = differentiation.of_kernels(_forward, _backward)
  return differentiation.attention(
    passes, xla.PASSES, problem, query, key, value, operands
  )


def _forward(problem, query, key, value, operands):
  """(out,), or (out, sums) with problem.normalize."""
  length, form = problem.query_len, _form(problem)
  if problem.normalize:
    problem, operands = _with_end(problem, operands)
    hides = operands.key_value_seq_lengths is not None
    form = dataclasses.replace(form, end=hides)
  problem, operands, query, key, value = _aligned(
    problem, operands, query, key, value
  )
  out, *sums = _forward_aligned(form, problem, query, key, value, operands)
  lengths = operands.query_seq_lengths
  sums = [jnp.moveaxis(x, 1, 2)[:, :length] for x in sums]
  return out[:, :length], *(_without_padding(x, lengths) for x in sums)


def _with_end(problem, operands):
  """The arguments; lengths of the keys are added if some block is not full.

  No lengths are needed if a causal mask hides what lies beyond the keys.
  """
  block = tiles.TILES[problem.head_dim].forward.streamed
  if _hides_the_end(problem) or problem.key_len % block == 0:
    return problem, operands
  return _with_lengths(problem, operands)


def _hides_the_end(problem):
  """Whether a mask hides what lies beyond the keys."""
  if problem.shapes.key_value_seq_lengths is not None:
    return True
  _, right = problem.bounds
  moves = problem.shapes.query_offset is not None
  if right is None or moves:
    return False
  return problem.query_len - 1 + right < problem.key_len


def _with_lengths(problem, operands):
  """The arguments with lengths of the keys."""
  if operands.key_value_seq_lengths is not None:
    return problem, operands
  lengths = jnp.full((problem.batch,), problem.key_len, jnp.int32)
  operands = operands._replace(key_value_seq_lengths=lengths)
  shapes = problem.shapes._replace(key_value_seq_lengths=lengths.shape)
  return dataclasses.replace(problem, shapes=shapes), operands


def _forward_aligned(form, problem, query, key, value, operands):
  tile = tiles.TILES[problem.head_dim].forward
  plain = not (
    form.masked or form.alibi or problem.masked_by_data or problem.normalize
  )
  if plain and problem.key_len >= tiles.LONG:
    tile = tiles.LONG_TILES.get(problem.head_dim, tile)
  few = problem.key_len < tiles.FORWARD_CLUSTERS
  if few or not _may_form_clusters(problem, tile):
    tile = dataclasses.replace(tile, cluster=1)
  key, value = (
    _without_padding(x, operands.key_value_seq_lengths) for x in (key, value)
  )
  schedule, inputs = _arguments(
    form, tile, problem, operands, query, key, value
  )
  unit = problem.normalizer * form.output_unit  # of phi
  if problem.normalize:
    scales = 1 / form.weight_scale, 1 / unit
  else:
    scales = (1 / (unit * form.weight_scale),)
  return forward.run(form, tile, schedule, inputs, *scales)


def _backward(wanted, problem, query, key, value, operands, d_out, *rows):
  """(dq, dk, dv), and the sums of dz that are wanted, see differentiation.Sums.

  rows: of normalised rows, as in differentiation.of_kernels.
  """
  lengths, form = (problem.query_len, problem.key_len), _form(problem)
  if problem.normalize:
    weight_scale, dz_scale = numerics.scales_of_shares(problem, _HEADROOM)
    form = dataclasses.replace(
      form, weight_scale=weight_scale, dz_scale=dz_scale
    )
    if wanted.rows:  # Keys beyond the last one would add to the sums of rows.
      problem, operands = _with_lengths(problem, operands)
      form = dataclasses.replace(form, end=True, paired=wanted.paired)
  problem, operands, query, key, value, d_out, *rows = _aligned(
    problem, operands, query, key, value, d_out.astype(query.dtype), *rows
  )
  query, d_out = (
    _without_padding(x, operands.query_seq_lengths) for x in (query, d_out)
  )
  fused, dq_sums = _takes_fused_backward(form, problem, wanted), None
  if problem.normalize:
    out, sums, d_sums = rows  # The first two are 0 in the padding.
    d_sums = _without_padding(d_sums, operands.query_seq_lengths)
    problem, d_out, rows, dq_sums = _in_rows(
      problem, d_out, out, sums, d_sums, fused
    )
  key, value = (
    _without_padding(x, operands.key_value_seq_lengths) for x in (key, value)
  )
  backward = _two_kernel_backward
  if fused:
    backward = functools.partial(_fused_backward, dq_sums)
  d_query, row_sums, dk, dv, *sums = backward(
    wanted, form, problem, operands, query, key, value, d_out, *rows
  )
  if problem.normalize:
    sums = [
      _of_keys(x, lengths[1], operands.key_value_seq_lengths) for x in sums
    ]
  found = _wanted_sums(problem, lengths, row_sums, sums)
  return (
    d_query[:, : lengths[0]], dk[:, : lengths[1]], dv[:, : lengths[1]],
    *(found[axes] for axes in wanted.axes),
  )  # fmt: skip


def _in_rows(problem, d_out, out, sums, d_sums, fused):
  """(problem, d_out, [rows], dq_sums), as the kernels need them.

  rows: (B, N, 1 or 2, T and the rest of a tile), [-shift] or [-shift, inverse].
  The normalizer of the weights becomes a part of them. dq_sums: zeros for the
  fused backward pass, or None.
  """
  normalizer = problem.normalizer
  problem = dataclasses.replace(problem, normalizer=1.0)
  if _reads_inverse(problem):
    inverse, shift = numerics.inverse_and_shift(out, sums, d_sums, d_out)
    of_rows = jnp.stack([-shift, inverse]) / normalizer
    return problem, d_out, [jnp.moveaxis(of_rows, (1, 3), (0, 1))], None
  count = 0
  if fused:
    tile = tiles.FUSED_BACKWARD[problem.head_dim].tile
    count = fused_backward.rows_of_dq(problem.query_len, tile)
  d_out, products, dq_sums = normalized.divide(
    out, d_out, sums, normalizer, count
  )
  d_sums = _pad_to(jnp.moveaxis(d_sums, 1, 2), products.shape[-1])
  return problem, d_out, [(products + d_sums / normalizer)[:, :, None]], dq_sums


def _reads_inverse(problem):
  """Whether the kernels multiply by the inverse; see the top of the file."""
  return problem.dtype == "float16" or problem.kind != "sigmoid"


def _of_keys(dz_sums, count, lengths):
  """Sums of dz, set to 0 for keys beyond the sequences.

  There do v^T is 0, but the shift is not, so that the sums are not 0.
  """
  place = jnp.arange(dz_sums.shape[-1])[None, None]
  if lengths is not None:
    count = jnp.minimum(lengths, count)[:, None, None]
  return jnp.where(place < count, dz_sums, 0.0)


def _takes_fused_backward(form, problem, wanted):
  """Whether the fused backward pass is the faster one, and is allowed.

  It adds dq in no fixed order, so it is not allowed if XLA is asked for
  deterministic operations. At head width 128, with sums of keys and two numbers
  for each row, it fits into shared memory only with fewer blocks.
  """
  two_numbers = problem.normalize and _reads_inverse(problem)
  of_keys = wanted.keys or wanted.slopes
  tight = problem.head_dim > 64 and not _has_vectors(problem)
  if of_keys and two_numbers and tight:
    return False
  flags = os.environ.get("XLA_FLAGS", "").split()
  deterministic = any(
    flag in ("--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops=true")
    for flag in flags
  )
  fused = tiles.FUSED_BACKWARD.get(problem.head_dim)
  if deterministic or fused is None:
    return False
  least = fused.open
  if form.masked:
    on_h200 = device.current().kind.startswith("NVIDIA H200")
    least = fused.masked_on_h200 if on_h200 else fused.masked
  return problem.key_len >= least


def _fused_backward(dq_sums, wanted, form, problem, operands, query, *arrays):
  """[dq, sums of rows or None, dk, dv], and the sums of keys if wanted.

  dq_sums: zeros as in fused_backward.run, or None.
  """
  of_width = tiles.FUSED_BACKWARD[problem.head_dim]
  tile = of_width.tile
  # Two numbers for each row are not read by products, as pipeline.free_barrier
  # asks for.
  two_numbers = problem.normalize and _reads_inverse(problem)
  if two_numbers or not _may_form_clusters(problem, tile):
    tile = dataclasses.replace(tile, cluster=1)
  if _has_vectors(problem):
    tile = dataclasses.replace(tile, stages=of_width.stages_with_vectors)
  row_sums = None
  if wanted.rows:
    length = pl.cdiv(problem.query_len, tile.block_q) * tile.block_q
    shape = tile.warpgroups, problem.batch, problem.num_heads, length
    row_sums = jnp.zeros(shape, jnp.float32)
  if dq_sums is None:
    batch, length, heads, width = query.shape
    length = fused_backward.rows_of_dq(length, tile)
    dq_sums = reduce.zeros(batch, length, heads, width)
  schedule, inputs = _arguments(
    form, tile, problem, operands, query, *arrays, dq_sums=dq_sums,
    row_sums=row_sums,
  )  # fmt: skip
  scales = _scales(form, problem)
  dq_sums, row_sums, *rest = fused_backward.run(
    form, tile, schedule, inputs, scales, sums=wanted.keys or wanted.slopes
  )
  if row_sums is not None:
    row_sums = row_sums.sum(0)
  d_query = reduce.in_rows(dq_sums, query.shape[1], scales["dk"], query.dtype)
  return [d_query, row_sums, *rest]


def _may_form_clusters(problem, tile):
  """Whether programs that form clusters stream hardly more blocks than alone.

  The programs of a cluster stream all blocks that any of them sees, and a
  program beyond the last row streams them too. If the blocks depend on data,
  they may be many more.
  """
  if problem.masked_by_data:
    return False
  alone = _blocks_of_tiles(problem, dataclasses.replace(tile, cluster=1)).sum()
  together = _blocks_of_tiles(problem, tile).sum() * tile.cluster
  return together <= tiles.MOST_BLOCKS * alone


def _two_kernel_backward(wanted, form, problem, operands, *arrays):
  """[dq, sums of rows or None, dk, dv], and the sums of keys if wanted."""
  of_width = tiles.TILES[problem.head_dim]
  schedule, inputs = _arguments(form, of_width.dkv, problem, operands, *arrays)
  arguments = form, of_width.dkv, schedule, inputs
  scales, of_keys = _scales(form, problem), wanted.keys or wanted.slopes
  if problem.head_dim > tiles.WIDEST_DK_AND_DV:
    (dv,) = dkv.run(*arguments, {"dv": scales["dv"]})
    dk, *sums = dkv.run(*arguments, {"dk": scales["dk"]}, sums=of_keys)
  else:
    dk, dv, *sums = dkv.run(*arguments, scales, sums=of_keys)
  tile = of_width.dq
  if _has_vectors(problem) and of_width.dq_with_vectors:
    tile = of_width.dq_with_vectors
  schedule, inputs = _arguments(form, tile, problem, operands, *arrays)
  d_query, *row_sums = dq.run(
    form, tile, schedule, inputs, scales["dk"], sums=wanted.rows
  )
  return [d_query, row_sums[0] if row_sums else None, dk, dv, *sums]


def _scales(form, problem):
  """The factors of dk (and dq) and of dv, applied after the products."""
  return {
    "dk": problem.scale / (problem.normalizer * form.dz_scale),
    "dv": 1 / (problem.normalizer * form.weight_scale),
  }


def _wanted_sums(problem, lengths, row_sums, sums):
  """The sums of dz by their axes, as in differentiation.Sums.

  row_sums: (B, N, T and the rest of a tile), or None. sums: [] or [(1 or 2, B,
  N, S and the rest of a tile)].
  """
  found = {}
  if row_sums is not None:
    found["BNT"] = row_sums[..., : lengths[0]]
  for dz, *far in sums:
    found["BNS"] = dz[..., : lengths[1]]
    if far:
      found["BN"] = far[0].sum(-1)
  return {axes: x / problem.normalizer for axes, x in found.items()}


# Padding.


def _aligned(problem, operands, query, key, value, *d_out):
  """The arguments, padded with zeros, which add nothing to products."""
  rest = [-x % _ALIGNED for x in (problem.query_len, problem.key_len)]
  if not any(rest):
    return problem, operands, query, key, value, *d_out

  def pad(x, side, mode="constant", axis=1):
    if x is None:
      return None
    axes = [(0, 0)] * x.ndim
    axes[axis] = 0, rest[side]
    return jnp.pad(x, axes, mode)

  operands = operands._replace(
    query_segment_ids=pad(operands.query_segment_ids, 0, "edge"),
    key_value_segment_ids=pad(operands.key_value_segment_ids, 1, "edge"),
    query_logit_bias=pad(operands.query_logit_bias, 0, axis=2),
    key_logit_bias=pad(operands.key_logit_bias, 1, axis=2),
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


def _without_padding(x, lengths):
  """x with zeros beyond each length.

  Padding may be NaN, and 0 times NaN is NaN.

  x: (B, L, N, H) or (B, L, N).
  """
  if lengths is None:
    return x
  place = jnp.arange(x.shape[1])
  rest = (None,) * (x.ndim - 2)
  visible = (place[None] < lengths[:, None])[:, :, *rest]
  return jnp.where(visible, x, jnp.zeros((), x.dtype))


# The kernels' arguments.


def _form(problem):
  left, right = problem.bounds
  weight_scale, dz_scale = numerics.float16_scales(problem, _HEADROOM)
  return Form(
    kind=problem.kind,
    exact=problem.kind == "sigmoid" and numerics.exact_sigmoid(problem),
    scale=problem.scale,
    logit_bias=problem.logit_bias,
    alibi=problem.shapes.alibi_slopes is not None,
    left=left,
    right=right,
    segments=problem.shapes.query_segment_ids is not None,
    end=False,
    offset=problem.distance_offset,
    weight_scale=weight_scale,
    dz_scale=dz_scale,
  )


def _arguments(
  form,
  tile,
  problem,
  operands,
  query,
  key,
  value,
  d_out=None,
  rows=None,
  dq_sums=None,
  row_sums=None,
):
  """(the schedule, the inputs of a kernel by their names in pipeline.Gmem)."""
  schedule = _schedule(problem, tile)
  parts, columns = _vectors(problem, operands, tile)
  offsets = operands.query_offset
  of_block = {"query": tile.stationary, "key": tile.streamed}
  name, length = "query_lengths", operands.query_seq_lengths
  if not tile.of_queries:
    of_block = {"query": tile.streamed, "key": tile.stationary}
    name, length = "key_lengths", operands.key_value_seq_lengths
  inputs = {
    "query": query,
    "key": key,
    "value": value,
    "d_out": d_out,
    "dq_sums": dq_sums,
    "row_sums": row_sums,
    "offsets": None if offsets is None else offsets.astype(jnp.int32),
    "parts": parts,
    "columns": columns,
    "scalars": _scalars(problem, operands),
    "plan": blocks.plan(form, problem, operands, tile),
    "query_ids": _pad_ids(operands.query_segment_ids, of_block["query"]),
    "key_ids": _pad_ids(operands.key_value_segment_ids, of_block["key"]),
    "rows": _pad_rows(rows, of_block["query"]),
    name: None if length is None else length.astype(jnp.int32),
    "table": schedule.array(),
  }
  if form.end:
    inputs["key_lengths"] = operands.key_value_seq_lengths.astype(jnp.int32)
  return schedule, inputs


def _has_vectors(problem):
  vectors = problem.shapes.query_logit_bias, problem.shapes.key_logit_bias
  return any(x is not None for x in vectors)


def _vectors(problem, operands, tile):
  """(parts, columns) of the logit vectors, as in pipeline.Gmem."""
  if not _has_vectors(problem):
    return None, None
  heads = problem.batch, problem.num_heads
  of_queries, of_keys = (
    vectors.parts(vector, (*heads, length), problem.scale)
    for vector, length in (
      (operands.query_logit_bias, problem.query_len),
      (operands.key_logit_bias, problem.key_len),
    )
  )
  rows, others = of_queries, of_keys
  if not tile.of_queries:
    rows, others = others, rows
  return _pad_rows(rows, tile.stationary), vectors.streamed(others)


def _schedule(problem, tile):
  heads = problem.num_heads if tile.of_queries else problem.num_kv_heads
  of_tiles = _blocks_of_tiles(problem, tile)
  programs, costs = _programs(), None
  # If work depends on data, there is one program for each tile, and the
  # hardware balances them.
  if problem.masked_by_data:
    programs = len(of_tiles) * problem.batch * heads
  elif problem.bounds != (None, None):
    costs = 1 + of_tiles
  clusters = programs // tile.cluster
  return Schedule(
    len(of_tiles), problem.batch * heads, clusters, tile.of_queries, costs
  )


def _blocks_of_tiles(problem, tile):
  """(tiles,) the number of blocks that each tile of a head sees by positions.

  With clusters these are tiles of a cluster.
  """
  length, others = problem.query_len, problem.key_len
  before, after = problem.bounds
  if not tile.of_queries:
    length, others, before, after = others, length, after, before
  rows = tile.stationary
  return blocks.count_visible(
    pl.cdiv(length, rows), rows, before, after, tile.streamed, others
  )


def _programs():
  """The number of programs that run at a time: one for each multiprocessor."""
  return device.current().cores or 132


def _scalars(problem, operands):
  """(B, N, 2) float32: logit_bias and slope; None if neither is an array."""
  parts = operands.logit_bias, operands.alibi_slopes
  if all(x is None for x in parts):
    return None
  shape = problem.batch, problem.num_heads
  parts = [
    jnp.zeros(shape) if x is None else jnp.broadcast_to(x, shape) for x in parts
  ]
  return jnp.stack(parts, -1).astype(jnp.float32)


def _pad_ids(ids, multiple):
  if ids is None:
    return None
  pad = -ids.shape[1] % multiple
  return jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, pad)), "edge")


def _pad_rows(rows, multiple):
  if rows is None:
    return None
  length = pl.cdiv(rows.shape[-1], multiple) * multiple
  return _pad_to(rows, length)


def _pad_to(x, length):
  """x with zeros at the end of its last axis, up to this length."""
  rest = length - x.shape[-1]
  return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, rest)])
