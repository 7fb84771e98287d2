"""The Triton kernel for few queries and a long cache of keys.

A program takes all queries of all heads that share a key head as the rows of
one tile, so that a key is loaded once. The keys that the queries see are
divided among SPLITS programs. Weights that are not normalised depend on nothing
but their own logits, so the shares of the programs are simply added. Normalised
rows need the sum of the weights in addition.

A program finds its keys from the lengths, the offset and the window of its
example, and loads no others. So the time depends on the keys that are seen, and
not on the size of the cache.

If one program has all keys of a head, nothing has to be added. Otherwise each
program writes its share in float32. The program that arrives last adds the
shares in the order of the keys, so that every run gives the same bits. The
programs that have arrived are counted in `arrived`, which is zero before and
after. With NEW, `arrived` is the same array as `zeros`.

Softmax needs another number, the peak: the largest logit of a row. It keeps the
weights exp(z - peak) in range. It grows from step to step and differs between
shares, so sums are rescaled whenever they are added. Only ACTIVATION "softmax"
compiles this.

Keys may lie in pages. The keys p PAGE .. (p + 1) PAGE - 1 of an example are
then in the page that its p-th number in `pages` names. Nothing else changes,
and the bits of the result are the same.

With NEW, each row has one token, which is new. q contains its query heads,
followed by its key heads and value heads, which the cache does not contain yet.
The program whose share ends with the new token writes them into the cache,
k_out and v_out (which are k and v), before it reads its keys. No program with
other keys reads that slot. If N / K exceeds ROWS, several programs have the
same keys. Each of them then writes the slot, with the same bits, and reads what
it wrote. Before that, query and key are normalised by RMSNorm over the head if
QK_EPSILON is given, and rotated by RoPE if TURNED is not 0.

k and v may be in 8 bits. Each tile is converted to the dtype of q after it was
loaded, and a new token is rounded to 8 bits when it is written. With HALF the
products are in float16 instead, although q is in bfloat16: one instruction
converts two numbers of 8 bits to float16, and none converts them to bfloat16.

Arrays: q, out (B, T, N, H), with NEW q (B, 1, N + 2 K, H); k, v (B, S, K, H),
or with PAGE (pages, PAGE, K, H); pages (B, S / PAGE); q_scale, k_scale (H,);
cos, sin (B, TURNED / 2).
"""

import triton
import triton.language as tl
from sigattn.kernels.triton.kernels import (
  _bias_base,
  _length,
  _load_bias_block,
  _logits,
  _offset,
  _unit,
  _visible,
  _weights,
)

# The first peak. exp2(-inf - LOWEST) is 0, but -inf - -inf would be NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def decode(
  q, k, v, zeros, pages, q_scale, k_scale, cos, sin, logit_bias, slopes, q_bias,
  k_bias, q_lengths, k_lengths, offsets,
  out, sums, shares, share_sums, share_peaks, arrived, k_out, v_out,
  T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
  H: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr,
  ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, SPLITS: tl.constexpr,
  CELLS: tl.constexpr, ALL_ROWS: tl.constexpr, ADDED_ROWS: tl.constexpr,
  CHUNK: tl.constexpr,
  ACTIVATION: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
  P_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
  LEFT: tl.constexpr, RIGHT: tl.constexpr, OFFSET: tl.constexpr,
  BIAS_STRIDE: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
  Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
  Q_LENGTHS: tl.constexpr, K_LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
  NORMALIZE: tl.constexpr, NEW: tl.constexpr, QK_EPSILON: tl.constexpr,
  TURNED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
  """out_i = OUT_SCALE sum_j p_ij v_j, for ROWS rows and a share of their keys.

  With NORMALIZE sums_i = OUT_SCALE sum_j p_ij, and out_i is divided by it.
  """
  cell, split = tl.program_id(0) % CELLS, tl.program_id(0) // CELLS % SPLITS
  batch, kv_head = tl.program_id(0) // (CELLS * SPLITS), cell % K
  i, head = _rows(cell, N, K, ROWS, ROWS)
  q_len = _length(q_lengths, batch, T, Q_LENGTHS)
  k_len = _length(k_lengths, batch, S, K_LENGTHS)
  offset = _offset(offsets, batch, OFFSETS)
  # These loads do not wait for the offset and the lengths of keys. So every
  # program prepares the new key, although only one writes it.
  HEADS: tl.constexpr = N + 2 * K if NEW else N
  q_row = (tl.cast(batch, tl.int64) * T + i) * HEADS + head
  q_tile = _heads(
    q, q_scale, cos, sin, batch, q_row, i < q_len, H, BLOCK_H, QK_EPSILON,
    TURNED,
  )  # fmt: skip
  if NEW:
    new_row = tl.cast(batch, tl.int64) * HEADS + N + kv_head
    new_row += tl.zeros((1,), tl.int64)
    new_key = _heads(
      q, k_scale, cos, sin, batch, new_row, new_row >= 0, H, BLOCK_H,
      QK_EPSILON, TURNED,
    )  # fmt: skip
    new_value = _heads(
      q, k_scale, cos, sin, batch, new_row + K, new_row >= 0, H, BLOCK_H, None,
      0,
    )  # fmt: skip
  low, high = _seen(q_len, k_len, offset, LEFT, RIGHT)
  blocks = tl.cdiv(max(high - low, 0), BLOCK_KV)
  used = max(min(blocks, SPLITS), 1)  # programs that have keys
  if split < used:
    start = low + blocks * split // used * BLOCK_KV
    stop = min(low + blocks * (split + 1) // used * BLOCK_KV, high)
    if NEW:
      k, v = k_out, v_out
      if (start <= offset) & (offset < stop):
        _write(
          new_key, new_value, k, v, pages, batch, kv_head, offset, S, K, H,
          BLOCK_H, PAGE,
        )  # fmt: skip
    acc, total, peak = _attend(
      q_tile, k, v, pages, logit_bias, slopes, q_bias, k_bias,
      batch, kv_head, head, i, q_len, offset, start, stop, T, S, N, K, H,
      BLOCK_H, PAGE, ROWS, BLOCK_KV, ACTIVATION, SCALE, BIAS, P_SCALE,
      PRECISION, LEFT, RIGHT, OFFSET, BIAS_STRIDE, SLOPE_STRIDE, Q_BIAS, K_BIAS,
      NORMALIZE, HALF,
    )  # fmt: skip
    row = (tl.cast(batch, tl.int64) * T + i) * N + head
    acc = tl.where(i[:, None] < q_len, acc, 0.0) * OUT_SCALE
    total = tl.where(i < q_len, total, 0.0) * OUT_SCALE
    # Triton leaves out what follows a condition that it knows, but not what
    # follows `SPLITS == 1 or used == 1`.
    if SPLITS == 1:  # noqa: SIM114
      _finish(out, sums, acc, total, row, i < T, H, BLOCK_H, NORMALIZE)
    elif used == 1:
      _finish(out, sums, acc, total, row, i < T, H, BLOCK_H, NORMALIZE)
    else:
      _store_share(
        shares, share_sums, share_peaks, acc, total, peak,
        split * ALL_ROWS + row, i < T, H, BLOCK_H, NORMALIZE, ACTIVATION,
      )  # fmt: skip
      # The stores of all threads must be visible before the count grows.
      tl.debug_barrier()
      count = tl.atomic_add(arrived + batch * CELLS + cell, 1, sem="acq_rel")
      if count == used - 1:
        _add_up(
          shares, share_sums, share_peaks, out, sums, batch, cell, used, T, N,
          K, H, BLOCK_H, ROWS, ALL_ROWS, ADDED_ROWS, CHUNK, NORMALIZE,
          ACTIVATION,
        )  # fmt: skip
        tl.store(arrived + batch * CELLS + cell, 0)


# What a program works on.


@triton.jit
def _rows(
  cell, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
  COUNT: tl.constexpr,
):  # fmt: skip
  """(i, head): query and head of the first COUNT of a program's ROWS rows.

  Rows beyond the last get a query number of T or more. Neighbouring programs
  take the same keys of neighbouring heads, which are neighbours in memory.
  """
  row = cell // K * ROWS + tl.arange(0, COUNT)
  return row // (N // K), cell % K * (N // K) + row % (N // K)


@triton.jit
def _seen(q_len, k_len, offset, LEFT: tl.constexpr, RIGHT: tl.constexpr):
  """(low, high): no query sees a key outside of low .. high - 1."""
  low, high = 0, tl.where(q_len > 0, k_len, 0)
  if LEFT is not None:
    low = max(offset - LEFT, 0)
  if RIGHT is not None:
    high = min(high, q_len + offset + RIGHT)
  return low, high


@triton.jit
def _write(
  key, value, k, v, pages, batch, kv_head, slot,
  S: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
  PAGE: tl.constexpr,
):  # fmt: skip
  """Writes the new key and value of a head into their slot."""
  columns = tl.arange(0, BLOCK_H)[None, :]
  key_row = _key_rows(pages, batch, slot, slot + 1, S, PAGE)
  place = (key_row * K + kv_head) * H + columns
  tl.store(k + place, _saturated(key, k), mask=columns < H)
  tl.store(v + place, _saturated(value, v), mask=columns < H)
  # All threads of the program read the slot next.
  tl.debug_barrier()


@triton.jit
def _saturated(x, cache):
  """x in the dtype of the cache, see attention.saturated."""
  if cache.dtype.element_ty == tl.float8e4nv:
    x = tl.clamp(x.to(tl.float32), -448.0, 448.0, tl.PropagateNan.ALL)
  return x.to(cache.dtype.element_ty)


@triton.jit
def _heads(
  q, scale, cos, sin, batch, row, is_row,
  H: tl.constexpr, BLOCK_H: tl.constexpr, EPSILON: tl.constexpr,
  TURNED: tl.constexpr,
):  # fmt: skip
  """Rows of q, (rows, BLOCK_H), normalised and then rotated by RoPE.

  EPSILON: of RMSNorm over the head, None for no norm. TURNED: how many of the
  first features RoPE rotates; see positions.rope.
  """
  HALF: tl.constexpr = TURNED // 2
  columns = tl.arange(0, BLOCK_H)[None, :]
  mask = is_row[:, None] & (columns < H)
  places = q + row[:, None] * H
  x = tl.load(places + columns, mask=mask, other=0.0)
  factor = 1.0
  if EPSILON is not None:
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 1) / H + EPSILON)[:, None]
    x = _scaled(x, factor, scale, columns, H)
  if TURNED:
    is_first, is_turned = columns < HALF, columns < TURNED
    other_columns = tl.where(is_first, columns + HALF, columns - HALF)
    other_mask = mask & is_turned
    other = tl.load(places + other_columns, mask=other_mask, other=0.0)
    if EPSILON is not None:
      other = _scaled(other, factor, scale, other_columns, TURNED)
    angle = batch * HALF + tl.where(is_first, columns, columns - HALF)
    c = tl.load(cos + angle, mask=is_turned, other=1.0)
    s = tl.load(sin + angle, mask=is_turned, other=0.0)
    s = tl.where(is_first, -s, s)
    x = (x.to(tl.float32) * c + other.to(tl.float32) * s).to(x.dtype)
  return x


@triton.jit
def _scaled(x, factor, scale, columns, H: tl.constexpr):
  """x * factor * scale, for the columns below H."""
  is_column = (columns >= 0) & (columns < H)
  scales = tl.load(scale + columns, mask=is_column, other=0.0)
  return (x.to(tl.float32) * factor * scales).to(x.dtype)


@triton.jit
def _attend(
  q_tile, k, v, pages, logit_bias, slopes, q_bias, k_bias, batch,
  kv_head, head, i, q_len, offset, start, stop,
  T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
  H: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr,
  ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, ACTIVATION: tl.constexpr,
  SCALE: tl.constexpr, BIAS: tl.constexpr, P_SCALE: tl.constexpr,
  PRECISION: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
  OFFSET: tl.constexpr, BIAS_STRIDE: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
  Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
  HALF: tl.constexpr,
):  # fmt: skip
  """(sum_j p_ij v_j, sum_j p_ij, peak) over the keys start .. stop - 1."""
  columns = tl.arange(0, BLOCK_H)[None, :]
  is_row = i < q_len
  if HALF:
    wide = tl.clamp(q_tile.to(tl.float32), -65504, 65504, tl.PropagateNan.ALL)
    q_tile = wide.to(tl.float16)
  bias, slope = _of_rows(
    logit_bias, slopes, q_bias, batch, head, i, is_row, T, N, ROWS, ACTIVATION,
    BIAS, BIAS_STRIDE, SLOPE_STRIDE, Q_BIAS,
  )  # fmt: skip
  acc = tl.zeros((ROWS, BLOCK_H), tl.float32)
  total = tl.zeros((ROWS,), tl.float32)
  peak = tl.full((ROWS,), LOWEST, tl.float32)
  for first in tl.range(start, stop, BLOCK_KV):
    j = first + tl.arange(0, BLOCK_KV)
    key_rows = _key_rows(pages, batch, j, stop, S, PAGE)
    places = key_rows[:, None] * (K * H) + kv_head * H + columns
    mask = j[:, None] < stop
    if H != BLOCK_H:
      mask &= columns < H
    k_tile = tl.load(k + places, mask=mask, other=0.0).to(q_tile.dtype)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    j_bias = _of_keys(
      k_bias, batch, head, is_row, j, stop, S, ACTIVATION, K_BIAS
    )
    x = _logits(
      s, (i + offset)[:, None], j[None, :], bias[:, None], slope[:, None], 0.0,
      j_bias, OFFSET, SCALE, SLOPE_STRIDE, None, K_BIAS,
    )  # fmt: skip
    if ACTIVATION == "softmax":
      seen = tl.where(j[None, :] < stop, 1.0, 0.0)
      if T > 1:
        seen = _visible(
          seen, (i + offset)[:, None], j[None, :], 0, 0, LEFT, RIGHT, False
        )
      x = tl.where(seen > 0, x, float("-inf"))
      before = peak
      peak = tl.maximum(peak, tl.max(x, 1))
      p = tl.exp2(x - peak[:, None])
      acc *= tl.exp2(before - peak)[:, None]
      total = total * tl.exp2(before - peak) + tl.sum(p, 1)
    else:
      p, _ = _weights(x, ACTIVATION, P_SCALE, 1.0)
      if T > 1:  # One query sees every key of start .. stop - 1.
        p = _visible(
          p, (i + offset)[:, None], j[None, :], 0, 0, LEFT, RIGHT, False
        )
      if NORMALIZE:
        # Keys from `stop` on were loaded as zeros, which have weights too. The
        # weights are rounded as in the product, so that the rounding of a row
        # with few keys cancels.
        rounded = p.to(q_tile.dtype).to(tl.float32)
        total += tl.sum(tl.where(j[None, :] < stop, rounded, 0.0), 1)
    v_tile = tl.load(v + places, mask=mask, other=0.0).to(q_tile.dtype)
    acc = tl.dot(p.to(q_tile.dtype), v_tile, acc, input_precision=PRECISION)
  return acc, total, peak


@triton.jit
def _key_rows(pages, batch, j, stop, S: tl.constexpr, PAGE: tl.constexpr):
  """Where the keys j lie, counted in keys: int64."""
  if PAGE is None:
    rows = tl.cast(batch, tl.int64) * S + j
  else:
    number = batch * (S // PAGE) + j // PAGE
    page = tl.load(pages + number, mask=j < stop, other=0)
    rows = page.to(tl.int64) * PAGE + j % PAGE
  return rows


@triton.jit
def _of_rows(
  logit_bias, slopes, q_bias, batch, head, i, is_row,
  T: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
  ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BIAS_STRIDE: tl.constexpr,
  SLOPE_STRIDE: tl.constexpr, Q_BIAS: tl.constexpr,
):  # fmt: skip
  """Logit bias and slope of each row, in the units of the activation."""
  UNIT: tl.constexpr = _unit(ACTIVATION)
  slope = tl.zeros((ROWS,), tl.float32)
  if BIAS_STRIDE is None:
    bias = tl.full((ROWS,), BIAS * UNIT, tl.float32)
  else:
    bias = UNIT * tl.load(
      logit_bias + batch * BIAS_STRIDE + head, mask=is_row, other=0.0
    )
  if SLOPE_STRIDE is not None:
    slope = UNIT * tl.load(
      slopes + batch * SLOPE_STRIDE + head, mask=is_row, other=0.0
    )
  if Q_BIAS is not None:
    base = _bias_base(batch, head, T, Q_BIAS)
    bias += UNIT * tl.load(q_bias + base + i, mask=is_row, other=0.0)
  return bias, slope


@triton.jit
def _of_keys(
  k_bias, batch, head, is_row, j, stop, S: tl.constexpr,
  ACTIVATION: tl.constexpr, K_BIAS: tl.constexpr,
):  # fmt: skip
  """The keys' bias, (1 or ROWS, BLOCK_KV), in the units of the activation."""
  UNIT: tl.constexpr = _unit(ACTIVATION)
  if K_BIAS is None:
    values = 0.0  # not read
  elif K_BIAS % 2:  # Each head has its own.
    base = _bias_base(batch, head, S, K_BIAS)
    values = UNIT * tl.load(
      k_bias + base[:, None] + j[None, :],
      mask=is_row[:, None] & (j[None, :] < stop), other=0.0,
    )  # fmt: skip
  else:
    base = _bias_base(batch, 0, S, K_BIAS)
    values = _load_bias_block(k_bias + base, j, stop, ACTIVATION, K_BIAS)
    values = values[None, :]
  return values


# Shares, which one program writes and another adds.


@triton.jit
def _store_share(
  shares, share_sums, share_peaks, acc, total, peak, row, is_row,
  H: tl.constexpr, BLOCK_H: tl.constexpr, NORMALIZE: tl.constexpr,
  ACTIVATION: tl.constexpr,
):  # fmt: skip
  columns = tl.arange(0, BLOCK_H)[None, :]
  mask = is_row[:, None] & (columns < H)
  tl.store(shares + row[:, None] * H + columns, acc, mask=mask)
  if NORMALIZE:
    tl.store(share_sums + row, total, mask=is_row)
  if ACTIVATION == "softmax":
    tl.store(share_peaks + row, peak, mask=is_row)


@triton.jit
def _add_up(
  shares, share_sums, share_peaks, out, sums, batch, cell, used,
  T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
  BLOCK_H: tl.constexpr, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr,
  ADDED_ROWS: tl.constexpr, CHUNK: tl.constexpr, NORMALIZE: tl.constexpr,
  ACTIVATION: tl.constexpr,
):  # fmt: skip
  """Writes the sums of the shares of `used` programs, in their order."""
  i, head = _rows(cell, N, K, ROWS, ADDED_ROWS)
  row = (tl.cast(batch, tl.int64) * T + i) * N + head
  columns = tl.arange(0, BLOCK_H)[None, None, :]
  acc = tl.zeros((ADDED_ROWS, BLOCK_H), tl.float32)
  total = tl.zeros((ADDED_ROWS,), tl.float32)
  peak = tl.full((ADDED_ROWS,), LOWEST, tl.float32)
  for first in range(0, used, CHUNK):
    share = first + tl.arange(0, CHUNK)
    rows = share[:, None] * tl.cast(ALL_ROWS, tl.int64) + row[None, :]
    mask = (share[:, None] < used) & (i[None, :] < T)
    # .cg avoids the L1 cache, which does not see what other programs write.
    part = tl.load(
      shares + rows[:, :, None] * H + columns,
      mask=mask[:, :, None] & (columns < H), other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    if ACTIVATION == "softmax":
      peaks = tl.load(
        share_peaks + rows, mask=mask, other=LOWEST, cache_modifier=".cg"
      )
      before = peak
      peak = tl.maximum(peak, tl.max(peaks, 0))
      factor = tl.exp2(peaks - peak[None, :])
      part *= factor[:, :, None]
      acc *= tl.exp2(before - peak)[:, None]
      total *= tl.exp2(before - peak)
    acc += tl.sum(part, 0)
    if NORMALIZE:
      part = tl.load(
        share_sums + rows, mask=mask, other=0.0, cache_modifier=".cg"
      )
      if ACTIVATION == "softmax":
        part *= factor
      total += tl.sum(part, 0)
  _finish(out, sums, acc, total, row, i < T, H, BLOCK_H, NORMALIZE)


@triton.jit
def _finish(
  out, sums, acc, total, row, is_row,
  H: tl.constexpr, BLOCK_H: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
  columns = tl.arange(0, BLOCK_H)[None, :]
  if NORMALIZE:
    tl.store(sums + row, total, mask=is_row)
    inverse = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    acc *= inverse[:, None]
  mask = is_row[:, None] & (columns < H)
  place = out + row[:, None] * H + columns
  tl.store(place, acc.to(out.dtype.element_ty), mask=mask)
