"""One token of each row through a stack of layers, in few kernels.

With few rows, a token takes the time to read all weights and to start the
kernels. So this module computes the same as Stack with a cache, in as few
kernels as possible:

  query, key, value   the product with the normalised residual stream
  attention           norms of query and key, and writing the cache
  out                 the product
  gate, up            adding `out` to the stream, the product, and silu
  down                the product, which the next layer adds to the stream

These are five kernels a layer. On Hopper GPUs one kernel computes all products
between two calls of attention (kernels/products.py), and a layer takes two.

It needs an NVIDIA GPU, and layers that `unsupported` accepts. Stack computes
all other layers.
"""

import logging
import math

import jax
import jax.numpy as jnp

from sigattn import attention, extras, layers, positions

extras.require("layers")

from flax import nnx

from sigattn.kernels import decoding, products, triton
from sigattn.kernels.products import Norm
from sigattn.kernels.triton import decode, product
from sigattn.kernels.triton.product import Stream

_logger = logging.getLogger(__name__)


def unsupported(
  stack: layers.Stack,
  last_norm: nnx.Module | None,
  x_BD: jax.Array,
  cache: tuple[layers.Cache, ...],
  place_B: jax.Array,
  page_table: jax.Array | None = None,
) -> str:
  """The reason why `step` cannot take these arguments; "" if it can.

  last_norm: the norm after the last layer; None for no norm.
  """
  if not stack.is_split:
    return "the layers have no arrays of their own"
  block = stack.blocks[0]
  attn = block.attn
  reason = _unsupported_block(block)
  if not reason and not isinstance(last_norm, (nnx.RMSNorm, type(None))):
    reason = "another norm than rmsnorm"
  if not reason:
    problem, _ = _problem(attn, x_BD.dtype, cache[0], place_B, page_table)
    if not decoding.takes(problem, attn.implementation, otherwise="Stack"):
      reason = "attention takes another form"
  how = f"Stack; not token_step: {reason}" if reason else "token_step"
  _logger.info("a step of %d rows by %s", len(x_BD), how)
  return reason


def _unsupported_block(block):
  attn, mlp = block.attn, block.mlp
  residuals = block.attn_residual, block.mlp_residual
  if block.parallel:
    return "parallel branches"
  if not all(x.norm in ("pre", "hybrid") for x in residuals):
    return "norms behind the sum"
  norms = [x.norm_in for x in residuals]
  norms += [attn.query_norm, attn.key_norm] if attn.has_qk_norm else []
  if not all(isinstance(x, nnx.RMSNorm) for x in norms):
    return "another norm than rmsnorm"
  if any(x.has_layer_scale for x in residuals):
    return "a factor on the branches"
  if any(x.bias is not None for x in (attn.out, mlp.down)):
    return "linear layers with a bias"
  if attn.row_power:
    return "row_power"
  if attn.has_forget_gate:
    return "a forget gate"
  if (
    attn.rotate is not None
    and getattr(attn.rotate, "func", None) is not positions.rope
  ):
    return "another rotation than RoPE"
  if attn.attention_fn is not attention.dot_product_attention:
    return "another function of attention"
  return ""


def step(
  stack: layers.Stack,
  x_BD: jax.Array,
  cache: tuple[layers.Cache, ...],
  place_B: jax.Array,
  page_table: jax.Array | None = None,
  positions_B1: jax.Array | None = None,
) -> tuple[Stream, tuple[layers.Cache, ...]]:
  """(the residual stream after the last layer, the filled cache).

  The stream equals stack(x_BD[:, None], cache=cache, place=place_B,
  positions=positions_B1, page_table=page_table)[:, 0].
  """
  where = place_B, page_table, positions_B1
  problem, _ = _problem(
    stack.blocks[0].attn, x_BD.dtype, cache[0], place_B, page_table
  )
  arrived = triton.counters(problem, page_table is not None)
  stream, filled, blocks = Stream(x_BD), [], stack.blocks
  if _joins_products(x_BD, blocks):
    return _by_joined_products(blocks, x_BD, cache, arrived, *where)
  for block, one in zip(blocks, cache, strict=True):
    stream, one, arrived = _block(block, stream, one, arrived, *where)
    filled.append(one)
  return stream, tuple(filled)


def _joins_products(x_BD, blocks):
  """Whether one kernel computes all products between two calls of attention."""
  reason = products.unsupported(x_BD, _weights(*[*blocks, None][:2]))
  how = f"several kernels: {reason}" if reason else "one kernel"
  _logger.info("products between two calls of attention by %s", how)
  return not reason


def _by_joined_products(blocks, x_BD, cache, arrived, *where):
  """`step` by products.run."""
  first, filled = blocks[0], []
  heads_BF, _, _ = _times(
    first.attn.query_key_value, Stream(x_BD), _norm(first.attn_residual.norm_in)
  )
  counts = jnp.zeros((1,), jnp.int32)
  layers = zip(blocks, [*blocks[1:], None], cache, strict=True)
  for i, (block, following, one) in enumerate(layers):
    out_BF, one, arrived = _attend(block.attn, heads_BF, one, arrived, *where)
    weights = _weights(block, following)
    x_BD, heads_BF, counts = products.run(x_BD, out_BF, weights, counts, i)
    filled.append(one)
  return Stream(x_BD), tuple(filled)


def _weights(block, following):
  """What a token passes from the attention of a block to that of the next."""
  mlp, next_FD, norm = block.mlp, None, None
  if following is not None:
    next_FD = _matrix(following.attn.query_key_value)
    norm = _norm(following.attn_residual.norm_in)
  return products.Weights(
    _branch(
      block.attn.out, block.attn_residual, _norm(block.mlp_residual.norm_in)
    ),
    _matrix(mlp.gate_up if mlp.kind == "swiglu" else mlp.up),
    mlp.kind,
    _branch(mlp.down, block.mlp_residual, norm),
    next_FD,
  )


def _branch(linear, residual, norm_in):
  norm_out = _norm(residual.norm_out) if residual.norm == "hybrid" else None
  return products.Branch(_matrix(linear), norm_out, norm_in)


def _block(block, stream, cache, arrived, *where):
  attn, mlp = block.attn, block.mlp
  before, behind = block.attn_residual, block.mlp_residual
  heads, _, x_BD = _times(attn.query_key_value, stream, _norm(before.norm_in))
  out_BF, cache, arrived = _attend(attn, heads, cache, arrived, *where)
  stream = _added(x_BD, attn.out, out_BF, before)
  up = mlp.gate_up if mlp.kind == "swiglu" else mlp.up
  up_BF, _, x_BD = _times(up, stream, _norm(behind.norm_in), mlp.kind)
  return _added(x_BD, mlp.down, up_BF, behind), cache, arrived


def _added(x_BD, linear, y, residual):
  """The stream after a branch: its last product is added to it."""
  y_BD, squares, _ = _times(linear, Stream(y))
  if residual.norm == "pre":
    return Stream(x_BD, y_BD)
  return Stream(x_BD, y_BD, _norm(residual.norm_out), squares)


def logits(
  stream: Stream, table_VD: jax.Array, last_norm: nnx.RMSNorm | None
) -> jax.Array:
  """float32 (B, V), the products of the normalised stream with a table."""
  norm = None if last_norm is None else _norm(last_norm)
  return product.product(stream, table_VD, norm, dtype=jnp.float32).out_BF


def _times(linear, stream, norm=None, activation="none"):
  """product.product with the matrix of a layers.Product."""
  return product.product(stream, _matrix(linear), norm, activation)


def _matrix(linear):
  """The matrix of a layers.Product, (outputs, inputs)."""
  kernel = linear.kernel[...].astype(linear.dtype)
  return kernel.reshape(-1, math.prod(kernel.shape[-linear.num_inputs :]))


def _norm(module):
  return Norm(module.scale[...], module.epsilon)


def _attend(attn, heads_BF, cache, arrived, place_B, page_table, positions_B1):
  """(out (B, N H), cache, arrived).

  heads_BF: the products that give query, key and value.
  """
  heads = attn.num_heads + 2 * attn.num_kv_heads
  problem, operands = _problem(attn, heads_BF.dtype, cache, place_B, page_table)
  out_B1NH, key, value, arrived = triton.extended(
    problem,
    _new(attn, arrived, positions_B1),
    heads_BF.reshape(len(heads_BF), 1, heads, attn.head_width),
    *cache[:2],
    operands,
    page_table,
  )
  cache = layers.Cache(key, value)
  return out_B1NH.reshape(len(heads_BF), -1), cache, arrived


def _new(attn, arrived, positions_B1):
  new = decode.New(arrived)
  if attn.has_qk_norm:
    q_norm, k_norm = _norm(attn.query_norm), _norm(attn.key_norm)
    new = decode.New(arrived, q_norm.scale_D, k_norm.scale_D, q_norm.epsilon)
  if attn.rotate is not None:
    share, base = (attn.rotate.keywords[x] for x in ("share", "base"))
    width = round(share * attn.head_width)
    angles_BH = positions.rope_angles(positions_B1, width, base)[:, 0]
    new = new._replace(cos=jnp.cos(angles_BH), sin=jnp.sin(angles_BH))
  return new


def _problem(attn, dtype, cache, place_B, page_table):
  """The Problem and Operands of `attn` for one query in each row."""
  batch, slots = place_B.shape[0], cache.key_BSKH.shape[1]
  lengths = {}
  if page_table is not None:
    slots *= page_table.shape[1]
    lengths["key_value_seq_lengths"] = jnp.minimum(place_B + 1, slots)
  query, key = (
    jax.ShapeDtypeStruct((batch, *heads, attn.head_width), dtype)
    for dtype, *heads in (
      (dtype, 1, attn.num_heads),
      (cache.key_BSKH.dtype, slots, attn.num_kv_heads),
    )
  )
  options = attn.options()
  del options["implementation"]
  masks = {x: options.pop(x) for x in ("normalize", "is_causal")}
  window = options.pop("local_window_size")
  query, operands, numbers = attention.prepare(
    query, key, scale=None, query_offset=place_B, **options, **lengths
  )
  problem = attention.problem_of(
    query, key, key, operands, kind=attn.kind, window=window, **masks,
    **numbers,
  )  # fmt: skip
  return problem, operands
