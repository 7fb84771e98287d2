"""Attention over a sequence that is split over devices.

The contributions of blocks of keys add up. So the keys can pass from device to
device, and each device adds up what its own queries see (Ring Attention,
2310.01889). If J_i are the blocks of keys and p = phi(scale q k^T + b), then

  plain        out = sum_i p_i v_i
  normalised   out = sum_i s_i out_i / sum_i s_i,   s_i = sum over J_i of p_i

No maximum, no log-sum-exp and no rescaling passes between the blocks. Every
block goes through `dot_product_attention`, and so to its kernels.

Shapes: as in sigattn.attention, with P devices and T = S tokens on each.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from sigattn import attention
from sigattn.kernels import batching_and_sharding, numerics

EXCHANGES = ("ring", "all_gather")
ORDERS = ("contiguous", "zigzag")


def ring_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  axis_name: str,
  exchange: str = "ring",
  order: str = "contiguous",
  kind: str = "sigmoid",
  logit_bias: ArrayLike | None = None,
  query_logit_bias: jax.Array | None = None,
  key_logit_bias: jax.Array | None = None,
  paired_biases: bool = False,
  n: float | None = None,
  normalize: bool = False,
  alibi_slopes: ArrayLike | None = None,
  scale: float | None = None,
  is_causal: bool = False,
  query_seq_lengths: jax.Array | None = None,
  key_value_seq_lengths: jax.Array | None = None,
  query_segment_ids: jax.Array | None = None,
  key_value_segment_ids: jax.Array | None = None,
  local_window_size: int | tuple[int, int] | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """dot_product_attention over a sequence that is split over devices.

  Call it inside jax.shard_map. The result and the gradients equal those of one
  device with the whole sequence of P T tokens. Arguments that are not listed
  here are those of attention.dot_product_attention.

    mesh = Mesh(np.array(jax.devices()), ("sequence",))
    split = PartitionSpec(None, "sequence")
    z = functools.partial(sigattn.zigzag, axis_name="sequence")

    def attend(q, k, v):
      out = sigattn.ring_attention(
        z(q), z(k), z(v), axis_name="sequence", is_causal=True, order="zigzag"
      )
      return z(out, inverse=True)

    ring = jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split)
    out = jax.jit(ring)(q, k, v)

  Without jax.jit, jax.shard_map of jax 0.11.2 raises NotImplementedError.

  Args:
    query: (B, T, N, H), this device's part of the tokens.
    key, value: (B, T, K, H), of the same tokens.
    axis_name: the axis of the mesh over which the sequence is split.
    exchange: ring passes keys and values on, one block a step, while the device
      computes with the block before; the memory for them does not grow with P.
      The backward pass sends them round again, with their gradients. all_gather
      fetches all keys and values first, and the backward pass adds their
      gradients up once.
    order: which tokens a device has. contiguous: device i has the tokens i T to
      (i + 1) T - 1. zigzag: the sequence is cut into 2 P chunks, and device i
      has the chunks i and 2 P - 1 - i, so that all devices have the same work
      under a causal mask. All arrays with tokens must then be in this order
      already: contiguous ones give a wrong result without an error. The
      function `zigzag` converts an array to this order and back.
    kind: one of attention.KINDS except softmax.
    query_logit_bias, key_logit_bias: (T,), (N, T) or (B, N, T), of this
      device's tokens.
    n: as in dot_product_attention, but None means P T.
    query_seq_lengths, key_value_seq_lengths: (B,), of the whole sequence.
    query_segment_ids, key_value_segment_ids: (B, T), of this device's tokens.

  Returns:
    (B, T, N, H), with the dtype of query, in the order of query.

  Raises:
    ValueError: for arguments that make no sense; for softmax, whose blocks do
      not add up; and for zigzag without is_causal or with a window, where it
      would balance nothing.
  """
  parts = lax.axis_size(axis_name)
  normalize, is_causal = attention.flags(
    normalize=normalize, is_causal=is_causal
  )
  _validate(query, key, kind, exchange, order, is_causal, local_window_size)
  if not (scale is None or isinstance(scale, (int, float, np.number))):
    raise ValueError(
      f"{scale=}; must be a number here: multiply the query by an array instead"
    )
  length = query.shape[1]
  window = local_window_size
  if isinstance(window, int):
    window = window, window
  options = dict(
    kind=kind,
    n=parts * length if n is None else n,
    normalize=normalize,
    scale=scale,
    implementation=implementation,
    paired_biases=paired_biases,
  )
  if logit_bias is None or isinstance(logit_bias, (int, float, np.number)):
    options["logit_bias"], logit_bias = logit_bias, None
  setup = _Setup(
    axis_name, parts, length, order, is_causal, window, (*options.items(),)
  )
  heads = query.shape[2]
  operands = _Operands(
    logit_bias=_array(logit_bias, heads),
    alibi_slopes=_array(alibi_slopes, heads),
    query_seq_lengths=query_seq_lengths,
    key_value_seq_lengths=key_value_seq_lengths,
    query_segment_ids=query_segment_ids,
    query_logit_bias=_with_axes(query_logit_bias),
  )
  keys = _Keys(key, value, key_value_segment_ids, _with_axes(key_logit_bias))
  if exchange == "all_gather":
    return _gathered(setup, query, keys, operands)
  return _ring(setup, query, keys, operands)


def zigzag(
  x: jax.Array, axis_name: str, *, axis: int = 1, inverse: bool = False
) -> jax.Array:
  """Converts a part of a sequence from contiguous order to zigzag, or back.

  Call it inside jax.shard_map. Each device sends two halves of its part.

  x: an array whose axis `axis` has T tokens, an even number. inverse: converts
  zigzag to contiguous. Returns x's shape. Raises ValueError for an odd T.
  """
  parts, i = lax.axis_size(axis_name), lax.axis_index(axis_name)
  if x.shape[axis] % 2:
    raise ValueError(f"x.shape={x.shape}; axis {axis} must be even")
  # Device i begins with the contiguous chunks 2 i and 2 i + 1. In zigzag order
  # chunk g is the front half of device g, or the back half of device
  # 2 P - 1 - g. Taken over all devices, the front halves go to each device
  # once, and so do the back halves, so that one ppermute moves each of them.
  homes = [
    [(d, min(2 * d + k, 2 * parts - 1 - 2 * d - k)) for d in range(parts)]
    for k in range(2)
  ]
  halves = jnp.split(x, 2, axis=axis)
  even = i % 2 == 0
  if inverse:
    halves = _swap_unless(even, *halves)
    homes = [[(home, d) for d, home in pairs] for pairs in homes]
  halves = [
    lax.ppermute(half, axis_name, pairs)
    for half, pairs in zip(halves, homes, strict=True)
  ]
  if not inverse:
    halves = _swap_unless(even, *halves)
  return jnp.concatenate(halves, axis=axis)


def _swap_unless(condition, a, b):
  return jnp.where(condition, a, b), jnp.where(condition, b, a)


def _validate(query, key, kind, exchange, order, is_causal, window):
  for name, value, choices in (
    ("kind", kind, [x for x in attention.KINDS if x != "softmax"]),
    ("exchange", exchange, EXCHANGES),
    ("order", order, ORDERS),
  ):
    if value not in choices:
      raise ValueError(f"{name}={value!r}; choose from {choices}")
  if query.ndim != 4 or key.ndim != 4 or query.shape[1] != key.shape[1]:
    raise ValueError(
      f"query.shape={query.shape}, key.shape={key.shape}; must be (B, T, N, H) "
      "and (B, T, K, H), of the same tokens"
    )
  if order == "zigzag":
    if not is_causal or window is not None:
      raise ValueError(
        f"{order=} with {is_causal=} and local_window_size={window}; it "
        "balances a causal mask without a window: give 'contiguous'"
      )
    if query.shape[1] % 2:
      raise ValueError(f"query.shape={query.shape}; T must be even in {order=}")


def _array(x, heads):
  """Broadcasts a number to (N,); (N,), (B, N) and None stay as they are."""
  if x is None:
    return None
  x = jnp.asarray(x)
  return jnp.broadcast_to(x, (heads,)) if x.ndim < 2 else x


def _with_axes(x):
  """Turns (T,) or (N, T) into (1, 1, T) or (1, N, T); None stays None."""
  return None if x is None else x.reshape((1,) * (3 - x.ndim) + x.shape)


class _Setup(NamedTuple):
  """What is known before anything runs."""

  axis_name: str
  parts: int  # P
  length: int  # T, of one device
  order: str
  is_causal: bool
  window: tuple[int, int] | None
  options: tuple[tuple[str, Any], ...]  # of dot_product_attention

  @property
  def normalize(self) -> bool:
    return dict(self.options)["normalize"]

  @property
  def steps(self) -> int:
    """How many blocks of other devices a device receives."""
    if self.window is None or not self.is_causal:
      return self.parts - 1
    # A window that ends at its query reaches this many blocks back.
    return min(self.parts - 1, -(-self.window[0] // self.length))


class _Operands(NamedTuple):
  """Arrays that stay with the queries. Lengths are of the whole sequence."""

  logit_bias: jax.Array | None  # (N,) or (B, N)
  alibi_slopes: jax.Array | None  # (N,) or (B, N)
  query_seq_lengths: jax.Array | None  # (B,)
  key_value_seq_lengths: jax.Array | None  # (B,)
  query_segment_ids: jax.Array | None  # (B, T)
  query_logit_bias: jax.Array | None  # (1 or B, 1 or N, T)


class _Keys(NamedTuple):
  """Arrays that pass from device to device."""

  key_BSKH: jax.Array
  value_BSKH: jax.Array
  segment_ids: jax.Array | None  # (B, S)
  logit_bias: jax.Array | None  # (1 or B, 1 or N, S)


class _Pair(NamedTuple):
  """A chunk of queries and a chunk of keys that meet on a device.

  The chunks begin at `query_start` and `key_start` in their arrays, and at
  `query_position` and `key_position` in the whole sequence. All may be traced.
  """

  size: int  # of the chunk of queries
  query_start: Any
  key_start: Any
  query_position: Any
  key_position: Any
  is_causal: bool  # False where the queries see all keys of the chunk
  hidden: Any = False  # True where they see none

  @property
  def offset(self) -> Any:
    """The position of the first query among the keys; None if they coincide."""
    same = self.query_position is self.key_position
    return None if same else self.query_position - self.key_position


def _pairs(setup: _Setup, step: Any) -> Sequence[_Pair]:
  """What device i computes with the keys of device i - step (mod P).

  step: 0 for its own keys, otherwise traced.
  """
  i = lax.axis_index(setup.axis_name)
  own = isinstance(step, int)
  j = i if own else (i - step) % setup.parts
  if setup.order == "contiguous":
    length = setup.length
    hidden, is_causal = False, setup.is_causal
    if not own:
      hidden = _hidden(setup, (i - j) * length)
      is_causal &= setup.window is not None
    position = i * length
    positions = position, position if own else j * length
    return [_Pair(length, 0, 0, *positions, is_causal, hidden)]
  size, last = setup.length // 2, 2 * setup.parts - 1
  front, back = i * size, (last - i) * size  # positions of the queries
  if own:
    return [
      _Pair(size, 0, 0, front, front, True),
      _Pair(size, size, 0, back, front, False),
      _Pair(size, size, size, back, back, True),
    ]
  # The back half of the queries sees the whole front half of the keys. If the
  # keys come from an earlier device, the front half of the queries sees that
  # half too. Otherwise the back half of the queries sees the back half of the
  # keys. So every device has the same work.
  earlier = j < i
  start = jnp.where(earlier, 0, size)
  return [
    _Pair(size, size, 0, back, j * size, False),
    _Pair(
      size, start, start, jnp.where(earlier, front, back),
      jnp.where(earlier, j, last - j) * size, False,
    ),
  ]  # fmt: skip


def _hidden(setup, offset):
  """Whether no query of a block sees a key of the block `offset` before it."""
  left, right = setup.window or (None, None)
  right = 0 if setup.is_causal else right
  hidden = False
  if right is not None:
    hidden |= offset + setup.length - 1 + right < 0
  if left is not None:
    hidden |= offset - left > setup.length - 1
  return hidden


def _part(x, start, size, axis=1):
  """x[:, start : start + size], or along another axis; start may be traced."""
  if x is None or x.shape[axis] == size:
    return x
  return lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _add(total, start, x, axis=1):
  """Adds x to total[:, start : start + size], or along another axis.

  If total is None, it stays None.
  """
  if total is None:
    return None
  x = x.astype(total.dtype)
  if total.shape == x.shape:
    return total + x
  x += _part(total, start, x.shape[axis], axis)
  return lax.dynamic_update_slice_in_dim(total, x, start, axis=axis)


def _block(setup, pair, query, keys, operands):
  """dot_product_attention of a pair's chunks: (out,), or (out, row sums)."""
  length, num_keys = query.shape[1], keys.key_BSKH.shape[1]
  options = dict(setup.options)
  if operands.logit_bias is not None:
    options["logit_bias"] = operands.logit_bias
  options["query_seq_lengths"] = _rest(
    operands.query_seq_lengths, pair.query_position, length
  )
  options["key_value_seq_lengths"] = _rest(
    operands.key_value_seq_lengths, pair.key_position, num_keys
  )
  if operands.query_segment_ids is not None:
    options["query_segment_ids"] = operands.query_segment_ids
    options["key_value_segment_ids"] = keys.segment_ids
  window, offset = setup.window, None
  anywhere = not pair.is_causal and window is None
  if not anywhere or operands.alibi_slopes is not None:
    offset = pair.offset  # Otherwise the chunks' positions do not matter.
  result = attention.dot_product_attention(
    query, keys.key_BSKH, keys.value_BSKH, alibi_slopes=operands.alibi_slopes,
    query_logit_bias=operands.query_logit_bias, key_logit_bias=keys.logit_bias,
    is_causal=pair.is_causal, local_window_size=window, query_offset=offset,
    return_residual=setup.normalize, **options,
  )  # fmt: skip
  return result if setup.normalize else (result,)


def _rest(lengths, position, size):
  """The lengths within a chunk, given those of the whole sequence."""
  return None if lengths is None else jnp.clip(lengths - position, 0, size)


def _chunks(pair, query, keys, operands):
  """The chunks of a pair: (query, keys, operands)."""
  size, start = pair.size, pair.key_start
  *keys, bias = keys
  return (
    _part(query, pair.query_start, size),
    _Keys(
      *(_part(x, start, size) for x in keys), _part(bias, start, size, axis=2)
    ),
    _of_queries(operands, pair.query_start, size),
  )


def _of_queries(operands, start, size):
  """The operands of a chunk of queries."""
  return operands._replace(
    query_segment_ids=_part(operands.query_segment_ids, start, size),
    query_logit_bias=_part(operands.query_logit_bias, start, size, axis=2),
  )


def _unless(hidden, compute, arrays):
  """compute(), a pytree of arrays; or zeros of its shapes if `hidden`."""

  def marked():
    return jax.tree.map(
      lambda x: batching_and_sharding.varying(x, arrays), compute()
    )

  if hidden is False:
    return marked()
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute)
  )
  return lax.cond(
    hidden,
    lambda: jax.tree.map(
      lambda x: batching_and_sharding.varying(x, arrays), zeros
    ),
    marked,
  )


# The ring.


def _pass_on(setup, tree, by=1):
  """Receives the tree of the device that is `by` places before this one."""
  homes = [(d, (d + by) % setup.parts) for d in range(setup.parts)]
  return jax.tree.map(lambda x: lax.ppermute(x, setup.axis_name, homes), tree)


def _around(setup, work, total, keys, travelling):
  """Calls work(step, total, keys) -> (total, contribution) for each block.

  The contributions travel with their block of keys, are added up on the way,
  and return to the device that the keys came from. A block is sent on before
  the work with it begins. The contributions so far are sent while the work goes
  on, so that neither waits for the other.

  travelling: the contribution of the work with the device's own keys.
  """
  if not setup.steps:
    return total, travelling
  arriving = _pass_on(setup, keys)

  def one(total, keys, travelling, number):
    travelling = _pass_on(setup, travelling)
    total, contribution = work(number, total, keys)
    return total, jax.tree.map(jnp.add, travelling, contribution)

  def step(carry, number):
    total, keys, travelling = carry
    following = _pass_on(setup, keys)
    total, travelling = one(total, keys, travelling, number)
    return (total, following, travelling), None

  (total, keys, travelling), _ = lax.scan(
    step, (total, arriving, travelling), jnp.arange(1, setup.steps)
  )
  total, travelling = one(total, keys, travelling, jnp.asarray(setup.steps))
  return total, _pass_on(setup, travelling, -setup.steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(setup, query, keys, operands):
  return _forward(setup, query, keys, operands)[0]


def _forward(setup, query, keys, operands):
  """(out, row sums); the sums are None if the rows are not normalised."""
  arrays = jax.tree.leaves((query, keys, operands))
  shapes = [query.shape, query.shape[:3]][: 1 + setup.normalize]
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  total = tuple(
    batching_and_sharding.varying(jnp.zeros(shape, dtype), arrays)
    for shape in shapes
  )
  keys = jax.tree.map(lambda x: batching_and_sharding.varying(x, arrays), keys)

  def work(step, total, keys):
    for pair in _pairs(setup, step):
      part = functools.partial(
        _block, setup, pair, *_chunks(pair, query, keys, operands)
      )
      out, *sums = _unless(pair.hidden, part, arrays)
      out = out.astype(dtype)
      if setup.normalize:
        out *= sums[0][..., None]
      total = tuple(
        _add(x, pair.query_start, y)
        for x, y in zip(total, (out, *sums), strict=True)
      )
    return total, ()

  total, _ = work(0, total, keys)
  (out, *sums), _ = _around(setup, work, total, keys, ())
  if not setup.normalize:
    return out.astype(query.dtype), None
  out *= numerics.inverse(sums[0])[..., None]
  return out.astype(query.dtype), sums[0]


@jax.tree_util.register_static
class _Trained(NamedTuple):
  """Whether a logit bias or alibi_slopes is differentiated."""

  operands: bool


def _save(setup, *inputs):
  # Each leaf has a value, and whether it is differentiated.
  _, keys, operands = inputs
  biases = keys.logit_bias, *_trainable(operands)
  trained = any(x.perturbed for x in jax.tree.leaves(biases))
  inputs = jax.tree.map(lambda x: x.value, inputs)
  out, sums = _forward(setup, *inputs)
  rows = (out, sums) if setup.normalize else None
  return out, (_Trained(trained), *inputs, rows)


def _pull_back(setup, saved, d_out):
  trained, query, keys, operands, rows = saved
  if isinstance(d_out, jax.custom_derivatives.SymbolicZero):
    d_out = jnp.zeros(d_out.shape, d_out.dtype)
  arrays = jax.tree.leaves((query, keys, operands, d_out))

  def marked(x):
    return batching_and_sharding.varying(x, arrays)

  def zeros(x):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return marked(jnp.zeros(x.shape, dtype))

  def work(step, total, keys):
    dq, d_bias, d_operands = total
    d_keys = jax.tree.map(zeros, _differentiable(keys, trained.operands))
    for pair in _pairs(setup, step):
      gradients = functools.partial(
        _gradients, setup, pair, trained.operands, query, keys, operands, rows,
        d_out,
      )  # fmt: skip
      part = _unless(pair.hidden, gradients, arrays)
      dq = _add(dq, pair.query_start, part[0])
      start = pair.key_start
      d_keys = tuple(
        _add(x, start, y, axis)
        for x, y, axis in zip(d_keys, part[1], (1, 1, 2), strict=True)
      )
      d_bias = _add(d_bias, pair.query_start, part[2][0], axis=2)
      d_operands = jax.tree.map(jnp.add, d_operands, part[2][1:])
    return (dq, d_bias, d_operands), d_keys

  given = _trainable(operands) if trained.operands else (None,) * 3
  d_bias, *d_operands = jax.tree.map(zeros, given)
  total = zeros(query), d_bias, (*d_operands,)
  travelling = jax.tree.map(marked, keys)
  total, d_keys = work(0, total, travelling)
  total, d_keys = _around(setup, work, total, travelling, d_keys)
  dq, d_bias, d_operands = total

  def cotangent(grad, x):
    if x is None:
      return None
    if grad is None:  # nothing needs it
      return jnp.zeros_like(x)
    return batching_and_sharding.cotangent(grad, x)

  dk, dv, d_key_bias = d_keys
  return (
    cotangent(dq, query),
    _Keys(
      cotangent(dk, keys.key_BSKH), cotangent(dv, keys.value_BSKH), None,
      cotangent(d_key_bias, keys.logit_bias),
    ),
    _Operands(None, None, None, None, None, None)._replace(
      query_logit_bias=cotangent(d_bias, operands.query_logit_bias),
      logit_bias=cotangent(d_operands[0], operands.logit_bias),
      alibi_slopes=cotangent(d_operands[1], operands.alibi_slopes),
    ),
  )  # fmt: skip


def _trainable(operands):
  return operands.query_logit_bias, operands.logit_bias, operands.alibi_slopes


def _differentiable(keys, is_trained):
  """(key, value, logit bias or None if nothing needs its gradient)."""
  return (*keys[:2], keys.logit_bias if is_trained else None)


def _gradients(
  setup, pair, is_trained, query, keys, operands, rows, d_out
):  # fmt: skip
  """Gradients of the chunks of a pair.

  Returns those of the query, of _differentiable and of _trainable.
  """
  query, keys, operands = _chunks(pair, query, keys, operands)
  d_out = _part(d_out, pair.query_start, pair.size)

  def block(query, of_keys, trainable):
    key, value, key_bias = of_keys
    changed, bias = operands, keys.logit_bias
    if is_trained:
      query_bias, logit_bias, alibi_slopes = trainable
      changed, bias = (
        operands._replace(
          query_logit_bias=query_bias,
          logit_bias=logit_bias,
          alibi_slopes=alibi_slopes,
        ),
        key_bias,
      )
    of_keys = _Keys(key, value, keys.segment_ids, bias)
    return _block(setup, pair, query, of_keys, changed)

  # Without `varying`, JAX would sum an operand's gradient over devices here.
  arrays = jax.tree.leaves((query, keys, operands))
  inputs = jax.tree.map(
    lambda x: batching_and_sharding.varying(x, arrays),
    (
      query,
      _differentiable(keys, is_trained),
      _trainable(operands) if is_trained else (None,) * 3,
    ),
  )
  result, pull_back = jax.vjp(block, *inputs)
  if not setup.normalize:
    return pull_back((d_out,))
  # out = sum_i s_i out_i / s with s = sum_i s_i. So the cotangent of out_i is
  # s_i / s d_out, and that of s_i is d_out (out_i - out) / s.
  part, sums = result
  out, inverse = (_part(x, pair.query_start, pair.size) for x in rows)
  inverse = numerics.inverse(inverse)
  d_part = (d_out * (sums * inverse)[..., None]).astype(part.dtype)
  difference = part.astype(sums.dtype) - out.astype(sums.dtype)
  d_sums = (d_out.astype(sums.dtype) * difference).sum(-1) * inverse
  return pull_back((d_part, d_sums))


_ring.defvjp(_save, _pull_back, symbolic_zeros=True)


# All keys at once.


def _gathered(setup, query, keys, operands):
  i = lax.axis_index(setup.axis_name)
  chunks = 2 if setup.order == "zigzag" else 1
  size = setup.length // chunks
  *keys, bias = keys

  def whole(x, axis):
    x = _in_order(lax.all_gather(x, setup.axis_name), setup.order, axis)
    shape = *x.shape[:axis], -1, *x.shape[axis + 2 :]
    return x.reshape(shape)

  keys = _Keys(
    *(None if x is None else whole(x, 1) for x in keys),
    None if bias is None else whole(bias, 2),
  )
  positions = [i * size, (2 * setup.parts - 1 - i) * size][:chunks]
  outs = []
  for number, position in enumerate(positions):
    start = number * size
    pair = _Pair(size, start, 0, position, 0, setup.is_causal)
    outs += _block(
      setup, pair, _part(query, start, size), keys,
      _of_queries(operands, start, size),
    )[:1]  # fmt: skip
  return jnp.concatenate(outs, axis=1)


def _in_order(x, order, axis):
  """Turns (P, ..., T, ...) into (..., P, T, ...), ordered as the sequence is.

  axis: the axis of P in the result.
  """
  if order == "zigzag":
    front, back = jnp.split(x, 2, axis=axis + 1)
    x = jnp.concatenate([front, back[::-1]])
  return jnp.moveaxis(x, 0, axis)
