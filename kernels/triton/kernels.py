"""The Triton kernels: forward, dq with the operands' gradients, dk with dv.

Each program has a stationary block of rows (queries; or keys, for dk and dv)
and streams the blocks of the other side past it. A weight depends on its own
logit alone. So the contributions of blocks are simply added, and the backward
pass recomputes the weights from q, k and v.

The blocks in which something is visible are contiguous. Only blocks at the edge
of the visible part have a mask. Blocks that are hidden altogether are neither
loaded nor computed.

Lengths need no mask of the weights: rows beyond them are loaded as zeros, which
add nothing to any sum. Padding may therefore contain NaN. Only the row sums of
normalised rows need a mask, because a key of zeros has a weight too.

With NORMALIZE the rows are divided by their sums s: out = p v / s. The backward
pass is given 1 / s and the shift, do . out / s - ds, of each row, and computes
dz = phi'(z) (do v^T / s - shift) and dv = (p / s)^T do. The normalizer of the
weights is already a part of 1 / s and of the shift (numerics.scales_of_shares).

Arrays: q, out (B, T, N, H), k, v (B, S, K, H). Everything that is known at
compile time is a constexpr, lengths and strides included.
"""

import triton
import triton.language as tl
from sigattn.kernels.problem import HOW_TO_ADD

# The factor of a logit in the argument of _weights, for each ACTIVATION.
UNITS = {
  "tanh": 0.5, "exp": -1.4426950408889634, "relu": 1.0, "relu2": 1.0,
  "silu": 0.5, "exact_silu": -1.4426950408889634,
  "softmax": 1.4426950408889634,  # only in decode_kernel.py
}  # fmt: skip

# The message if _weights lacks a branch for one of them.
NOT_IMPLEMENTED = tl.constexpr(
  "this activation is not implemented in kernels/triton/kernels.py, _weights; "
  f"{HOW_TO_ADD} says what a kind needs"
)


@triton.jit
def tanh(x):
  """tanh in one instruction: exact to 6e-8 near +-1, and to 5e-4 relatively."""
  return tl.inline_asm_elementwise(
    "tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
  )


@triton.jit
def forward(
  q, k, v, logit_bias, slopes, q_bias, k_bias, q_lengths, k_lengths, offsets,
  q_ids, k_ids, spans,
  out, sums,
  T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
  H: tl.constexpr, BLOCK_H: tl.constexpr,
  BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
  ACTIVATION: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
  P_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
  PRECISION: tl.constexpr,
  LEFT: tl.constexpr, RIGHT: tl.constexpr, OFFSET: tl.constexpr,
  BIAS_STRIDE: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
  Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
  Q_LENGTHS: tl.constexpr, K_LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
  SEGMENTS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
  """out_i = OUT_SCALE sum_j p_ij v_j for a block of queries of one head.

  With NORMALIZE sums_i = OUT_SCALE sum_j p_ij, and out_i is divided by it.
  """
  batch, head, first = _place(T, N, BLOCK_Q, RIGHT is not None)
  bias, slope = _per_head(
    logit_bias, slopes, batch, head, ACTIVATION, BIAS, BIAS_STRIDE, SLOPE_STRIDE
  )
  q_len = _length(q_lengths, batch, T, Q_LENGTHS)
  k_len = _length(k_lengths, batch, S, K_LENGTHS)
  q_base, k_base = _bases(batch, head, T, S, N, K, H)
  offset = _offset(offsets, batch, OFFSETS)
  start, full, edge, stop = _runs(
    first, BLOCK_Q, q_len, k_len, offset, spans, batch, _blocks(T, BLOCK_Q),
    BLOCK_KV, LEFT, RIGHT, SEGMENTS,
  )  # fmt: skip
  i = first + tl.arange(0, BLOCK_Q)
  q_tile = _load(q + q_base, first, q_len, N * H, H, BLOCK_H, BLOCK_Q, True)
  i_ids = _load_ids(q_ids + batch * T, i, q_len, SEGMENTS)
  i_bias = _load_bias(q_bias, batch, head, i, q_len, T, ACTIVATION, Q_BIAS)
  k_bias += _bias_base(batch, head, S, K_BIAS)
  acc = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
  total = tl.zeros((BLOCK_Q,), tl.float32)

  RAGGED: tl.constexpr = K_LENGTHS or S % BLOCK_KV != 0
  for j in tl.range(start, stop, BLOCK_KV):
    acc, total = _forward_block(
      acc, total, q_tile, k + k_base, v + k_base, i + offset, j,
      (j < full) | (j >= edge), i_ids, k_ids + batch * S, k_len, bias,
      slope, i_bias, k_bias, OFFSET, K * H, H, BLOCK_H, BLOCK_KV, ACTIVATION,
      SCALE, P_SCALE, PRECISION, LEFT, RIGHT, SLOPE_STRIDE, Q_BIAS, K_BIAS,
      SEGMENTS, RAGGED, NORMALIZE,
    )  # fmt: skip
  if NORMALIZE:
    total = tl.where(i < q_len, total, 0.0)
    row = sums + _row_base(batch, head, T, N)
    tl.store(row + i * N, total * OUT_SCALE, mask=i < T)
    acc *= tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)[
      :, None
    ]
  else:
    acc *= OUT_SCALE
  _store(out + q_base, acc, first, q_len, T, N * H, H, BLOCK_H, BLOCK_Q)


@triton.jit
def _forward_block(
  acc, total, q_tile, k, v, place, start, at_edge, i_ids, k_ids, k_len, bias,
  slope, i_bias, k_bias,
  OFFSET: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr,
  BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, ACTIVATION: tl.constexpr,
  SCALE: tl.constexpr, P_SCALE: tl.constexpr, PRECISION: tl.constexpr,
  LEFT: tl.constexpr, RIGHT: tl.constexpr, SLOPES: tl.constexpr,
  Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
  SEGMENTS: tl.constexpr, RAGGED: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
  """The sums plus the contributions of the keys start .. start + BLOCK_KV."""
  j = start + tl.arange(0, BLOCK_KV)
  k_tile = _load(k, start, k_len, STRIDE, H, BLOCK_H, BLOCK_KV, RAGGED)
  s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
  j_bias = _load_bias_block(k_bias, j, k_len, ACTIVATION, K_BIAS)
  x = _logits(
    s, place[:, None], j[None, :], bias, slope, i_bias[:, None],
    j_bias[None, :], OFFSET, SCALE, SLOPES, Q_BIAS, K_BIAS,
  )  # fmt: skip
  p, _ = _weights(x, ACTIVATION, P_SCALE, 1.0)
  if (LEFT is not None or RIGHT is not None or SEGMENTS) and at_edge:
    j_ids = _load_ids(k_ids, j, k_len, SEGMENTS)
    p = _visible(
      p, place[:, None], j[None, :], i_ids[:, None], j_ids[None, :], LEFT,
      RIGHT, SEGMENTS,
    )  # fmt: skip
  if NORMALIZE:
    if RAGGED:
      p = tl.where(j[None, :] < k_len, p, 0.0)
    total += tl.sum(p, 1)
  v_tile = _load(v, start, k_len, STRIDE, H, BLOCK_H, BLOCK_KV, RAGGED)
  acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
  return acc, total


@triton.jit
def backward_q(
  q, k, v, d_out, inverse, shift, logit_bias, slopes, q_bias, k_bias, q_lengths,
  k_lengths, offsets, q_ids, k_ids, spans,
  d_q, d_rows, d_slope,
  T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
  H: tl.constexpr, BLOCK_H: tl.constexpr,
  BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
  ACTIVATION: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
  D_Z_SCALE: tl.constexpr, D_Q_SCALE: tl.constexpr, SUM_SCALE: tl.constexpr,
  PRECISION: tl.constexpr,
  LEFT: tl.constexpr, RIGHT: tl.constexpr, OFFSET: tl.constexpr,
  BIAS_STRIDE: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
  Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
  Q_LENGTHS: tl.constexpr, K_LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
  SEGMENTS: tl.constexpr, NORMALIZE: tl.constexpr, SUMS: tl.constexpr,
  SLOPE_SUMS: tl.constexpr,
):  # fmt: skip
  """dq_i = D_Q_SCALE sum_j dz_ij k_j, and sums of dz.

  With SUMS d_rows_i = SUM_SCALE sum_j dz_ij, (B, N, T). With SLOPE_SUMS each
  program writes d_slope = -SUM_SCALE sum dz |i + offset - j|, (B, N, blocks of
  queries). With NORMALIZE the rows of sigmoid sum -p^2 (do v^T / s - shift),
  see xla.py, unless SUMS is 2 (differentiation.paired).
  """
  batch, head, first = _place(T, N, BLOCK_Q, RIGHT is not None)
  bias, slope = _per_head(
    logit_bias, slopes, batch, head, ACTIVATION, BIAS, BIAS_STRIDE, SLOPE_STRIDE
  )
  q_len = _length(q_lengths, batch, T, Q_LENGTHS)
  k_len = _length(k_lengths, batch, S, K_LENGTHS)
  q_base, k_base = _bases(batch, head, T, S, N, K, H)
  offset = _offset(offsets, batch, OFFSETS)
  start, full, edge, stop = _runs(
    first, BLOCK_Q, q_len, k_len, offset, spans, batch, _blocks(T, BLOCK_Q),
    BLOCK_KV, LEFT, RIGHT, SEGMENTS,
  )  # fmt: skip
  i = first + tl.arange(0, BLOCK_Q)
  q_tile = _load(q + q_base, first, q_len, N * H, H, BLOCK_H, BLOCK_Q, True)
  do_tile = _load(
    d_out + q_base, first, q_len, N * H, H, BLOCK_H, BLOCK_Q, True
  )
  i_ids = _load_ids(q_ids + batch * T, i, q_len, SEGMENTS)
  row = _row_base(batch, head, T, N)
  i_inverse, i_shift = _load_rows(
    inverse + row, shift + row, i, q_len, N, NORMALIZE
  )
  i_bias = _load_bias(q_bias, batch, head, i, q_len, T, ACTIVATION, Q_BIAS)
  k_bias += _bias_base(batch, head, S, K_BIAS)
  acc = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
  sum_dz = tl.zeros((BLOCK_Q,), tl.float32)
  sum_far = tl.zeros((BLOCK_Q,), tl.float32)

  RAGGED: tl.constexpr = K_LENGTHS or S % BLOCK_KV != 0
  for j in tl.range(start, stop, BLOCK_KV):
    acc, sum_dz, sum_far = _backward_q_block(
      acc, sum_dz, sum_far, q_tile, do_tile, i_inverse, i_shift, k + k_base,
      v + k_base, i + offset, j, (j < full) | (j >= edge), i_ids,
      k_ids + batch * S, k_len, bias, slope, i_bias, k_bias, OFFSET, K * H, H,
      BLOCK_H, BLOCK_KV, ACTIVATION, SCALE, D_Z_SCALE, PRECISION, LEFT, RIGHT,
      SLOPE_STRIDE, Q_BIAS, K_BIAS, SEGMENTS, RAGGED, NORMALIZE, SUMS,
      SLOPE_SUMS,
    )  # fmt: skip
  _store(
    d_q + q_base, acc * D_Q_SCALE, first, q_len, T, N * H, H, BLOCK_H, BLOCK_Q
  )
  blocks: tl.constexpr = _blocks(T, BLOCK_Q)
  share = (batch * N + head) * blocks + first // BLOCK_Q
  if SUMS:
    sum_dz = tl.where(i < q_len, sum_dz * SUM_SCALE, 0.0)
    tl.store(
      d_rows + _bias_base(batch, head, T, 2 * N + 1) + i, sum_dz, mask=i < T
    )
  if SLOPE_SUMS:
    tl.store(d_slope + share, tl.sum(sum_far, 0) * -SUM_SCALE)


@triton.jit
def _backward_q_block(
  acc, sum_dz, sum_far, q_tile, do_tile, i_inverse, i_shift, k, v,
  place, start, at_edge, i_ids, k_ids, k_len, bias, slope, i_bias, k_bias,
  OFFSET: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr,
  BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, ACTIVATION: tl.constexpr,
  SCALE: tl.constexpr, D_Z_SCALE: tl.constexpr, PRECISION: tl.constexpr,
  LEFT: tl.constexpr, RIGHT: tl.constexpr, SLOPES: tl.constexpr,
  Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr, SEGMENTS: tl.constexpr,
  RAGGED: tl.constexpr, NORMALIZE: tl.constexpr, SUMS: tl.constexpr,
  SLOPE_SUMS: tl.constexpr,
):  # fmt: skip
  """The sums plus the contributions of the keys start .. start + BLOCK_KV."""
  j = start + tl.arange(0, BLOCK_KV)
  k_tile = _load(k, start, k_len, STRIDE, H, BLOCK_H, BLOCK_KV, RAGGED)
  v_tile = _load(v, start, k_len, STRIDE, H, BLOCK_H, BLOCK_KV, RAGGED)
  s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
  dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
  j_bias = _load_bias_block(k_bias, j, k_len, ACTIVATION, K_BIAS)
  x = _logits(
    s, place[:, None], j[None, :], bias, slope, i_bias[:, None],
    j_bias[None, :], OFFSET, SCALE, SLOPES, Q_BIAS, K_BIAS,
  )  # fmt: skip
  p, dz = _weights(x, ACTIVATION, 1.0, D_Z_SCALE)
  if NORMALIZE:
    dp = dp * i_inverse[:, None] - i_shift[:, None]
    if RAGGED:  # A key of zeros has a weight, and adds to the sums of dz.
      dp = tl.where(j[None, :] < k_len, dp, 0.0)
  dz *= dp
  if (LEFT is not None or RIGHT is not None or SEGMENTS) and at_edge:
    j_ids = _load_ids(k_ids, j, k_len, SEGMENTS)
    dz = _visible(
      dz, place[:, None], j[None, :], i_ids[:, None], j_ids[None, :], LEFT,
      RIGHT, SEGMENTS,
    )  # fmt: skip
    if NORMALIZE:
      p = _visible(
        p, place[:, None], j[None, :], i_ids[:, None], j_ids[None, :], LEFT,
        RIGHT, SEGMENTS,
      )  # fmt: skip
  if SUMS:
    if (
      NORMALIZE and SUMS != 2 and (ACTIVATION == "tanh" or ACTIVATION == "exp")
    ):
      # In the units of dz, for both forms of the sigmoid.
      sum_dz -= tl.sum(p * p * dp, 1) * D_Z_SCALE
    else:
      sum_dz += tl.sum(dz, 1)
  if SLOPE_SUMS:
    far = _distance(place[:, None], j[None, :], OFFSET)
    sum_far += tl.sum(dz * far, 1)
  acc = tl.dot(dz.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
  return acc, sum_dz, sum_far


@triton.jit
def backward_kv(
  q, k, v, d_out, inverse, shift, logit_bias, slopes, q_bias, k_bias, q_lengths,
  k_lengths, offsets, q_ids, k_ids, spans,
  d_k, d_v, d_keys,
  T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
  H: tl.constexpr, BLOCK_H: tl.constexpr,
  BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
  ACTIVATION: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
  P_SCALE: tl.constexpr, OUT_SCALE: tl.constexpr,
  D_Z_SCALE: tl.constexpr, D_Q_SCALE: tl.constexpr, SUM_SCALE: tl.constexpr,
  PRECISION: tl.constexpr,
  LEFT: tl.constexpr, RIGHT: tl.constexpr, OFFSET: tl.constexpr,
  BIAS_STRIDE: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
  Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
  Q_LENGTHS: tl.constexpr, K_LENGTHS: tl.constexpr, OFFSETS: tl.constexpr,
  SEGMENTS: tl.constexpr, NORMALIZE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
  """dv_j = OUT_SCALE sum_i p_ij do_i, dk_j = D_Q_SCALE sum_i dz_ij q_i.

  A program has a block of keys of one key head, and sums over the queries of
  all its query heads. With SUMS it also writes d_keys_j = SUM_SCALE sum_i dz_ij
  for each query head, (B, N, S). Tiles are transposed (rows are keys, columns
  are queries), so that a product leaves p and dz in the registers from which
  the next product reads them.
  """
  batch, kv_head, first = _place(S, K, BLOCK_KV, False)
  q_len = _length(q_lengths, batch, T, Q_LENGTHS)
  k_len = _length(k_lengths, batch, S, K_LENGTHS)
  offset = _offset(offsets, batch, OFFSETS)
  start, full, edge, stop = _runs(
    first, BLOCK_KV, k_len, q_len, -offset, spans, batch, _blocks(S, BLOCK_KV),
    BLOCK_Q, RIGHT, LEFT, SEGMENTS,
  )  # fmt: skip
  j = first + tl.arange(0, BLOCK_KV)
  _, k_base = _bases(batch, kv_head * (N // K), T, S, N, K, H)
  k_tile = _load(k + k_base, first, k_len, K * H, H, BLOCK_H, BLOCK_KV, True)
  v_tile = _load(v + k_base, first, k_len, K * H, H, BLOCK_H, BLOCK_KV, True)
  j_ids = _load_ids(k_ids + batch * S, j, k_len, SEGMENTS)
  acc_k = tl.zeros((BLOCK_KV, BLOCK_H), tl.float32)
  acc_v = tl.zeros((BLOCK_KV, BLOCK_H), tl.float32)

  RAGGED: tl.constexpr = Q_LENGTHS or T % BLOCK_Q != 0
  for head in range(kv_head * (N // K), (kv_head + 1) * (N // K)):
    bias, slope = _per_head(
      logit_bias, slopes, batch, head, ACTIVATION, BIAS, BIAS_STRIDE,
      SLOPE_STRIDE,
    )  # fmt: skip
    q_base, _ = _bases(batch, head, T, S, N, K, H)
    row = _row_base(batch, head, T, N)
    j_bias = _load_bias(k_bias, batch, head, j, k_len, S, ACTIVATION, K_BIAS)
    i_bias = q_bias + _bias_base(batch, head, T, Q_BIAS)
    sum_dz = tl.zeros((BLOCK_KV,), tl.float32)
    for i in tl.range(start, stop, BLOCK_Q):
      acc_k, acc_v, sum_dz = _backward_kv_block(
        acc_k, acc_v, sum_dz, k_tile, v_tile, q + q_base, d_out + q_base,
        inverse + row, shift + row, j, i, (i < full) | (i >= edge), j_ids,
        q_ids + batch * T, q_len, offset, bias, slope, i_bias, j_bias, OFFSET,
        N, H, BLOCK_H, BLOCK_Q, ACTIVATION, SCALE, P_SCALE, D_Z_SCALE,
        PRECISION, LEFT, RIGHT, SLOPE_STRIDE, Q_BIAS, K_BIAS, SEGMENTS, RAGGED,
        NORMALIZE, SUMS,
      )  # fmt: skip
    if SUMS:
      sum_dz = tl.where(j < k_len, sum_dz * SUM_SCALE, 0.0)
      tl.store(
        d_keys + _bias_base(batch, head, S, 2 * N + 1) + j, sum_dz, mask=j < S
      )
  _store(
    d_k + k_base,
    acc_k * D_Q_SCALE,
    first,
    k_len,
    S,
    K * H,
    H,
    BLOCK_H,
    BLOCK_KV,
  )
  _store(
    d_v + k_base,
    acc_v * OUT_SCALE,
    first,
    k_len,
    S,
    K * H,
    H,
    BLOCK_H,
    BLOCK_KV,
  )


@triton.jit
def _backward_kv_block(
  acc_k, acc_v, sum_dz, k_tile, v_tile, q, d_out, inverse, shift, j, start,
  at_edge, j_ids, q_ids, q_len, offset, bias, slope, i_bias, j_bias,
  OFFSET: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
  BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr, ACTIVATION: tl.constexpr,
  SCALE: tl.constexpr, P_SCALE: tl.constexpr, D_Z_SCALE: tl.constexpr,
  PRECISION: tl.constexpr,
  LEFT: tl.constexpr, RIGHT: tl.constexpr, SLOPES: tl.constexpr,
  Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr, SEGMENTS: tl.constexpr,
  RAGGED: tl.constexpr, NORMALIZE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
  """The sums plus the contributions of queries start .. start + BLOCK_Q."""
  i = start + tl.arange(0, BLOCK_Q)
  q_tile = _load(q, start, q_len, N * H, H, BLOCK_H, BLOCK_Q, RAGGED)
  do_tile = _load(d_out, start, q_len, N * H, H, BLOCK_H, BLOCK_Q, RAGGED)
  s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
  dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
  i_bias = _load_bias_block(i_bias, i, q_len, ACTIVATION, Q_BIAS)
  x = _logits(
    s, (i + offset)[None, :], j[:, None], bias, slope, i_bias[None, :],
    j_bias[:, None], OFFSET, SCALE, SLOPES, Q_BIAS, K_BIAS,
  )  # fmt: skip
  p, derivative = _weights(x, ACTIVATION, P_SCALE, D_Z_SCALE)
  if NORMALIZE:
    i_inverse, i_shift = _load_rows(inverse, shift, i, q_len, N, NORMALIZE)
    p *= i_inverse[None, :]
    dp = dp * i_inverse[None, :] - i_shift[None, :]
  if (LEFT is not None or RIGHT is not None or SEGMENTS) and at_edge:
    i_ids = _load_ids(q_ids, i, q_len, SEGMENTS)
    p = _visible(
      p, (i + offset)[None, :], j[:, None], i_ids[None, :], j_ids[:, None],
      LEFT, RIGHT, SEGMENTS,
    )  # fmt: skip
    derivative = _visible(
      derivative, (i + offset)[None, :], j[:, None], i_ids[None, :],
      j_ids[:, None], LEFT, RIGHT, SEGMENTS,
    )  # fmt: skip
  acc_v = tl.dot(p.to(do_tile.dtype), do_tile, acc_v, input_precision=PRECISION)
  # Meanwhile the tensor cores compute acc_v.
  dz = derivative * dp
  if SUMS:
    sum_dz += tl.sum(dz, 1)
  acc_k = tl.dot(dz.to(q_tile.dtype), q_tile, acc_k, input_precision=PRECISION)
  return acc_k, acc_v, sum_dz


# The mathematics of a tile.


@triton.jit
def _logits(
  s, i, j, bias, slope, i_bias, j_bias, OFFSET, SCALE, SLOPES: tl.constexpr,
  Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
):  # fmt: skip
  """The logits in the units of the activation."""
  if Q_BIAS is not None:
    bias += i_bias
  x = s * SCALE + bias
  if K_BIAS is not None:
    x += j_bias
  if SLOPES is not None:
    x -= slope * _distance(i, j, OFFSET)
  return x


@triton.jit
def _distance(i, j, OFFSET):
  return tl.abs(i - j + OFFSET).to(tl.float32)


@triton.constexpr_function
def _unit(activation):
  return UNITS[activation]


@triton.jit
def _weights(
  x, ACTIVATION: tl.constexpr, P_SCALE: tl.constexpr, D_Z_SCALE: tl.constexpr
):
  """P_SCALE times the weights, and D_Z_SCALE times their derivatives.

  Some constant factors are left in: 2 and 4 for tanh, 2 for the derivative of
  silu, 1/2 for that of relu2. The sums are divided by them when they are
  stored, once per row and not per weight.
  """
  if ACTIVATION == "tanh":
    t = tanh(x)
    p, derivative = t * P_SCALE + P_SCALE, D_Z_SCALE - (t * D_Z_SCALE) * t
  elif ACTIVATION == "exp":
    p = 1.0 / (1.0 + tl.exp2(x))
    derivative = (p - p * p) * D_Z_SCALE
    p *= P_SCALE
  elif ACTIVATION == "silu":  # x is half the logit.
    x = tl.maximum(x, -1e30)  # -inf times 0 is not a number.
    t = tanh(x)
    p = (x * t + x) * P_SCALE
    derivative = (1 + t) * (x - x * t + 1) * D_Z_SCALE
  elif ACTIVATION == "exact_silu":
    z = tl.maximum(x * -0.6931471805599453, -1e30)
    half = 1.0 / (1.0 + tl.exp2(x))
    p = z * half * P_SCALE
    derivative = half * (1 + z * (1 - half)) * D_Z_SCALE
  elif ACTIVATION == "relu":
    p, derivative = (
      tl.maximum(x, 0.0) * P_SCALE,
      tl.where(x > 0, D_Z_SCALE, 0.0),
    )
  elif ACTIVATION == "relu2":
    r = tl.maximum(x, 0.0)
    p, derivative = r * r * P_SCALE, r * D_Z_SCALE
  else:
    tl.static_assert(False, NOT_IMPLEMENTED)
  return p, derivative


@triton.jit
def _visible(
  x, i, j, i_ids, j_ids,
  LEFT: tl.constexpr, RIGHT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
  """x where i - LEFT <= j <= i + RIGHT in the same segment, else 0."""
  if RIGHT is not None:
    x = tl.where(j <= i + RIGHT, x, 0.0)
  if LEFT is not None:
    x = tl.where(i <= j + LEFT, x, 0.0)
  if SEGMENTS:
    x = tl.where(i_ids == j_ids, x, 0.0)
  return x


# What a program works on.


@triton.jit
def _place(
  LENGTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
  LAST_FIRST: tl.constexpr,
):  # fmt: skip
  """Batch, head and first row of this program.

  Blocks of a head are neighbours, so that they find its keys in the cache. The
  blocks with the most work come first.
  """
  blocks: tl.constexpr = _blocks(LENGTH, BLOCK)
  block = tl.program_id(0) % blocks
  if LAST_FIRST:
    block = blocks - 1 - block
  other = tl.program_id(0) // blocks
  return other // HEADS, other % HEADS, block * BLOCK


@triton.constexpr_function
def _blocks(length, block):
  return -(-length // block)


@triton.jit
def _bases(
  batch, head,
  T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
  H: tl.constexpr,
):  # fmt: skip
  """Where a head begins in (B, T, N, H) and in (B, S, K, H)."""
  batch = tl.cast(batch, tl.int64)
  return (batch * (T * N) + head) * H, (batch * (S * K) + head // (N // K)) * H


@triton.jit
def _row_base(batch, head, T: tl.constexpr, N: tl.constexpr):
  """Where the numbers of a head's rows begin in (B, T, N)."""
  return tl.cast(batch, tl.int64) * (T * N) + head


@triton.jit
def _load_rows(
  inverse, shift, i, limit, N: tl.constexpr, NORMALIZE: tl.constexpr
):
  """1 / s and the shift of the rows i, (rows,) each; 0 from limit on."""
  i_inverse, i_shift = i, i  # not read
  if NORMALIZE:
    i_inverse = tl.load(inverse + i * N, mask=i < limit, other=0.0)
    i_shift = tl.load(shift + i * N, mask=i < limit, other=0.0)
  return i_inverse, i_shift


@triton.jit
def _runs(
  first, rows, limit, other_limit, offset, spans, batch,
  BLOCKS: tl.constexpr, OTHER_BLOCK: tl.constexpr,
  BEFORE: tl.constexpr, AFTER: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
  """start, full, edge, stop: what the rows first .. first + rows can see.

  Row r sees r + offset - BEFORE to r + offset + AFTER of the other side. Every
  row sees all of full .. edge. Blocks in start .. full and edge .. stop need a
  mask. All four except stop are multiples of OTHER_BLOCK.
  """
  last = min(first + rows, limit) - 1
  low, full_low = 0, 0
  high, full_high = other_limit, other_limit
  if BEFORE is not None:
    low = max(first + offset - BEFORE, 0)
    full_low = max(last + offset - BEFORE, 0)
  if AFTER is not None:
    high = min(high, last + offset + AFTER + 1)
    full_high = min(full_high, first + offset + AFTER + 1)
  if SEGMENTS:
    span = spans + (batch * BLOCKS + first // rows) * 3
    span_low, span_high = tl.load(span), tl.load(span + 1)
    low, high = max(low, span_low), min(high, span_high)
    full_low = max(full_low, span_low)
    full_high = min(full_high, tl.load(span + 2))
  high = tl.where(last >= first, high, 0)
  start = low // OTHER_BLOCK * OTHER_BLOCK
  full = tl.cdiv(full_low, OTHER_BLOCK) * OTHER_BLOCK
  edge = max(min(full_high, high) // OTHER_BLOCK * OTHER_BLOCK, full)
  return start, full, edge, high


@triton.jit
def _per_head(
  logit_bias, slopes, batch, head, ACTIVATION: tl.constexpr,
  BIAS: tl.constexpr, BIAS_STRIDE: tl.constexpr, SLOPE_STRIDE: tl.constexpr,
):  # fmt: skip
  """Logit bias and slope in the units of the activation."""
  UNIT: tl.constexpr = _unit(ACTIVATION)
  bias, slope = 0.0, 0.0
  if BIAS_STRIDE is None:
    bias = BIAS * UNIT
  else:
    bias = tl.load(logit_bias + batch * BIAS_STRIDE + head) * UNIT
  if SLOPE_STRIDE is not None:
    slope = tl.load(slopes + batch * SLOPE_STRIDE + head) * UNIT
  return bias, slope


@triton.jit
def _length(lengths, batch, full: tl.constexpr, GIVEN: tl.constexpr):
  length = full
  if GIVEN:
    length = min(tl.load(lengths + batch), full)
  return length


@triton.jit
def _offset(offsets, batch, OFFSETS: tl.constexpr):
  """The number that is added to the positions of queries, besides OFFSET."""
  offset = 0
  if OFFSETS:
    offset = tl.load(offsets + batch)
  return offset


@triton.jit
def _bias_base(batch, head, LENGTH: tl.constexpr, STRIDES: tl.constexpr):
  """Where a head's numbers begin in (B or 1, N or 1, length).

  STRIDES: as triton.strides; None for no array.
  """
  base = tl.cast(0, tl.int64)
  if STRIDES is not None:
    row = tl.cast(batch, tl.int64) * (STRIDES // 2) + head * (STRIDES % 2)
    base = row * LENGTH
  return base


@triton.jit
def _load_bias(
  pointer, batch, head, rows, limit, LENGTH: tl.constexpr,
  ACTIVATION: tl.constexpr, STRIDES: tl.constexpr,
):  # fmt: skip
  """A head's numbers for the rows, in units of the activation.

  STRIDES: as in _bias_base.
  """
  pointer += _bias_base(batch, head, LENGTH, STRIDES)
  return _load_bias_block(pointer, rows, limit, ACTIVATION, STRIDES)


@triton.jit
def _load_bias_block(
  pointer, rows, limit, ACTIVATION: tl.constexpr, STRIDES: tl.constexpr
):
  """The numbers of the rows, in units of the activation."""
  UNIT: tl.constexpr = _unit(ACTIVATION)
  values = rows  # not read
  if STRIDES is not None:
    values = tl.load(pointer + rows, mask=rows < limit, other=0.0) * UNIT
  return values


@triton.jit
def _load_ids(ids, rows, limit, SEGMENTS: tl.constexpr):
  values = rows
  if SEGMENTS:
    values = tl.load(ids + rows, mask=rows < limit, other=0)
  return values


@triton.jit
def _load(
  base, first, limit,
  STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
  ROWS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
  """Rows first .. first + ROWS, (ROWS, BLOCK_H); zeros beyond limit and H."""
  rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_H)[None, :]
  base += tl.cast(first, tl.int64) * STRIDE
  pointers = base + rows * STRIDE + columns
  if CHECKED and H == BLOCK_H:
    tile = tl.load(pointers, mask=rows < limit - first, other=0.0)
  elif CHECKED:
    mask = (rows < limit - first) & (columns < H)
    tile = tl.load(pointers, mask=mask, other=0.0)
  elif H == BLOCK_H:
    tile = tl.load(pointers)
  else:
    tile = tl.load(pointers, mask=columns < H, other=0.0)
  return tile


@triton.jit
def _store(
  base, tile, first, limit, length,
  STRIDE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
  ROWS: tl.constexpr,
):  # fmt: skip
  """Stores the rows below length, as zeros from limit on."""
  rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_H)[None, :]
  tile = tl.where(rows < limit - first, tile, 0.0)
  base += tl.cast(first, tl.int64) * STRIDE
  tl.store(
    base + rows * STRIDE + columns,
    tile.to(base.dtype.element_ty),
    mask=(rows < length - first) & (columns < H),
  )
