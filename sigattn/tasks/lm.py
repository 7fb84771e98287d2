"""A decoder-only language model and its task, predicting the next token."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from sigattn import layers, positions, stack, token_step
from sigattn.data import kept_tokenizer, loader, text
from sigattn.tasks.cross_entropy import Scored, cap, linear_cross_entropy
from sigattn.validate import choice, divides, flag, real, whole

SOURCE = text
KEEPS = kept_tokenizer
UNIT = "rows"
METRICS = ("loss", "accuracy", "bits_per_byte", "perplexity")
POSITIONS = ("sincos", "rope", "none")


class LanguageModel(nnx.Module):
  """Tokens -> embedding -> causal stack -> norm -> logits.

  norm: the kind of the norm before the logits, or None for no norm.
  norm_epsilon: as in layers.make_norm.
  tied: whether input and output share the embedding (1608.05859); if not, the
    logits have a table of their own, `head`.
  logit_cap: c of c tanh(logits / c), as in Gemma 2 (2408.00118); None: no cap.
  add_sincos: whether sines of the positions are added to the embedding. Their
    weight relative to the embedding is that of 1706.03762, which multiplies an
    embedding of variance 1 / width by sqrt(width).
  has_positions: whether the stack takes `positions`.

  Initialisation, as in the models published with 2409.04431:
    embed, head  normal, variance 1 / width, so that the logits have variance 1
  """

  def __init__(
    self,
    stack: layers.Stack,
    *,
    vocab_size: int,
    width: int,
    norm: str | None,
    norm_epsilon: float | None,
    tied: bool,
    logit_cap: float | None,
    add_sincos: bool,
    has_positions: bool,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.stack, self.add_sincos = stack, add_sincos
    self.has_positions = has_positions
    self.dtype = dtype
    normal = nnx.initializers.normal(width**-0.5)
    self.embed = nnx.Param(normal(rngs.params(), (vocab_size, width)))
    self.tied, self.logit_cap = tied, logit_cap
    if not tied:
      self.head = nnx.Param(normal(rngs.params(), (vocab_size, width)))
    self.has_norm = norm is not None
    if self.has_norm:
      self.norm = layers.make_norm(norm, width, rngs, norm_epsilon)

  def __call__(
    self,
    token_BT: jax.Array,
    rng: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the float32 logits (B, T, V) of the token after each token.

    token_BT: integers; -1 is padding. rng: for dropout and drop path; None
    turns both off. segment_ids: int (B, T); tokens attend only to tokens of
    their own segment.
    """
    return self._logits(self._hidden(token_BT, rng, segment_ids))

  def score(
    self,
    token_BT: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    rng: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    chunks: int = 1,
  ) -> Scored:
    """Scores the logits of a call against the targets, chunk by chunk.

    target_BT: the tokens after token_BT. weight_BT, chunks: as in
    cross_entropy.linear_cross_entropy. The other arguments are those of
    __call__.
    """
    x_BTD = self._normalized(self._hidden(token_BT, rng, segment_ids))
    return linear_cross_entropy(
      x_BTD, self._table()[...], target_BT, weight_BT, chunks, self.logit_cap
    )

  def prepare_to_generate(self) -> None:
    """Changes the parameters to the form with which decoding is fastest.

    Each layer gets arrays of its own, products of the same input are merged,
    and matrices are cast to the dtype of the activations, so that calls need
    not cast them. The results stay the same. The model can no longer be trained
    or saved.
    """
    self.stack.split_layers()

    def cast(x):
      return x.astype(self.dtype) if x.ndim > 1 else x

    nnx.update(self, jax.tree.map(cast, nnx.state(self, nnx.Param)))

  def empty_cache(
    self, batch: int, slots: int, dtype: DTypeLike | None = None
  ) -> tuple[layers.Cache, ...]:
    """A cache of `slots` tokens for each of `batch` rows, or pages.

    dtype: None for that of the activations, or float8_e4m3fn.
    """
    return self.stack.empty_cache(batch, slots, dtype or self.dtype)

  def extend(
    self,
    token_BT: jax.Array,
    cache: tuple[layers.Cache, ...],
    place: jax.Array | None = None,
    last_B: jax.Array | None = None,
    page_table: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[layers.Cache, ...]]:
    """Adds T tokens to each row: (the logits (B, V) of the next, the cache).

    The tokens of a row see those before them. A row may have padding after its
    last token. What is written to the cache for padding is not seen, as long as
    the row's next token overwrites it.

    token_BT: integers; those of padding do not matter. cache: is written in
    place if it is donated. place: the number of tokens in the cache, an int32
    scalar, or (B,), one for each row; None: the cache is empty. last_B: the
    index of the token after which the logits are wanted; None: T - 1.
    page_table: for a paged cache, see layers.SelfAttention.
    """
    length = token_BT.shape[1]
    positions_BT = jnp.broadcast_to(jnp.arange(length), token_BT.shape)
    if place is not None:
      positions_BT = positions_BT + jnp.reshape(place, (-1, 1))
    x_BTD, cache = self.stack(
      self._embed(token_BT, positions_BT),
      cache=cache,
      place=place,
      page_table=page_table,
      **self._positions(positions_BT),
    )
    if last_B is None:
      x_B1D = x_BTD[:, -1:]
    else:
      x_B1D = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
    return self._logits(x_B1D)[:, 0], cache

  def decode(
    self,
    token_B: jax.Array,
    cache: tuple[layers.Cache, ...],
    place_B: jax.Array,
    page_table: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[layers.Cache, ...]]:
    """`extend` by one token for each row."""
    token_B1, where = token_B[:, None], (cache, place_B, page_table)
    positions_B1, norm = place_B[:, None], self.norm if self.has_norm else None
    x_BD = self._embed(token_B1, positions_B1)[:, 0]
    if token_step.unsupported(self.stack, norm, x_BD, *where):
      return self.extend(token_B1, cache, place_B, page_table=page_table)
    stream, cache = token_step.step(self.stack, x_BD, *where, positions_B1)
    table_VD = self._table()[...].astype(self.dtype)
    logits_BV = token_step.logits(stream, table_VD, norm)
    return cap(logits_BV, self.logit_cap), cache

  def _embed(self, token_BT, positions_BT):
    x_BTD = self.embed[...].at[token_BT].get(mode="clip")
    if self.add_sincos:
      width = x_BTD.shape[-1]
      x_BTD += width**-0.5 * positions.sincos(positions_BT, width)
    return x_BTD.astype(self.dtype)

  def _hidden(self, token_BT, rng, segment_ids):
    positions_BT = offsets(token_BT, segment_ids)
    x_BTD = self._embed(token_BT, positions_BT)
    return self.stack(
      x_BTD, rng, segment_ids=segment_ids, **self._positions(positions_BT)
    )

  def _positions(self, positions_BT):
    return {"positions": positions_BT} if self.has_positions else {}

  def _normalized(self, x_BTD):
    return layers.normalize(self.norm, x_BTD) if self.has_norm else x_BTD

  def _table(self):
    """The table (V, D) by which activations are multiplied for the logits."""
    return self.embed if self.tied else self.head

  def _logits(self, x_BTD):
    logits_BTV = jnp.einsum(
      "BTD,VD->BTV",
      self._normalized(x_BTD),
      self._table()[...].astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    return cap(logits_BTV, self.logit_cap)


def offsets(
  token_BT: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Returns the position of each token within its own segment, int (B, T)."""
  index_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1]), token_BT.shape)
  if segment_ids is None:
    return index_BT
  before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  first_BT = jnp.where(segment_ids != before, index_BT, 0)
  return index_BT - jax.lax.cummax(first_BT, axis=1)


FIELDS = (
  stack.FIELDS
  | stack.LENGTH_FIELDS
  | {
    "model.positions": choice(POSITIONS),
    "model.rope_base": real(low=1, high=1e12),
    "model.rope_share": real(above=0, high=1),
    "model.use_bias": flag(),
    "model.parallel": flag(),
    "model.tied": flag(),
    "model.logit_cap": real(low=1e-3, high=1e6, optional=True),
    "model.max_length": whole(low=1, high=2**31 - 1),
    "model.loss_chunks": whole(low=1, high=2**31 - 1),
    "eval.by_position": flag(),
  }
)


def _rope_turns_pairs(config):
  model = config.model
  width = model.rope_share * (model.width // model.num_heads)
  if model.positions == "rope" and (width < 1 or width % 2):
    raise ValueError(
      f"config.model.rope_share={model.rope_share!r}; must turn an even number "
      f"of the {model.width // model.num_heads} features of a head "
      "(config.model.width / config.model.num_heads)"
    )


def _parallel_branches_have_norms_before_them(config):
  if config.model.parallel and config.model.norm != "pre":
    raise ValueError(
      f"config.model.norm={config.model.norm!r}; must be 'pre' with "
      "config.model.parallel=True"
    )


RULES = (
  *stack.RULES,
  stack.multiple_for_positions({"sincos": 2, "rope": 2}),
  _rope_turns_pairs,
  _parallel_branches_have_norms_before_them,
  divides("model.loss_chunks", "data.length"),
  # Rows of other lengths would have to be padded.
  divides("mesh.sequence", "data.length"),
)


def build(config: ConfigDict, rngs: nnx.Rngs) -> LanguageModel:
  """Returns the LanguageModel of a config.

  Its max_length, the n of sigmoid's bias -log n, is config.model.max_length.
  """
  model = config.model
  blocks = stack.make(
    config,
    max_length=model.max_length,
    is_causal=True,
    use_bias=model.use_bias,
    kernel_init=layers.FAN_IN_INIT,
    rotate=_rotate(model),
    parallel=model.parallel,
    rngs=rngs,
  )
  return LanguageModel(
    blocks,
    vocab_size=text.vocab_size(config),
    width=model.width,
    norm=None if model.norm == "post" else model.norm_kind,
    norm_epsilon=model.norm_epsilon,
    tied=model.tied,
    logit_cap=model.logit_cap,
    add_sincos=model.positions == "sincos",
    # RoPE rotates by the positions, and the row scaling counts tokens by them.
    has_positions=model.positions == "rope" or config.attn.row_power > 0,
    dtype=jnp.dtype(config.dtype),
    rngs=rngs,
  )


def _rotate(model):
  if model.positions != "rope":
    return None
  return functools.partial(
    positions.rope, base=model.rope_base, share=model.rope_share
  )


def real_tokens(config: ConfigDict, batch: dict[str, jax.Array]) -> jax.Array:
  """Returns bool (B, T): False for input tokens that are padding."""
  del config
  return batch["token"][:, :-1] >= 0


def tick_labels(config: ConfigDict, batch: loader.Batch) -> list[str]:
  """Returns the text of each input token of a batch of one row.

  Padding tokens are left out.
  """
  token_T = batch["token"][0, :-1]
  decode = text.tokenizer(config).decode
  return [decode([int(x)]) for x in token_T[token_T >= 0]]


def loss(
  config: ConfigDict,
  model: LanguageModel,
  batch: dict[str, jax.Array],
  rng: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean cross-entropy, in nats, over the tokens that can be predicted.

  A token can be predicted if the token before it is of the same segment.
  batch: see sigattn/data/text.py. Returns (loss, {"loss", "accuracy"}).
  """
  scored, real_BT = _score(config, model, batch, rng)
  count = jnp.maximum(real_BT.sum(), 1)
  mean_nats = scored.total / count
  accuracy = (scored.correct_BT & real_BT).sum() / count
  return mean_nats, {"loss": mean_nats, "accuracy": accuracy}


def _score(config, model, batch, rng=None):
  """(Scored, is scored (B, T)) of the targets of a batch."""
  token, segment = batch["token"], batch.get("segment")
  target_BT, real_BT = token[:, 1:], token[:, 1:] >= 0
  if segment is not None:
    real_BT &= segment[:, 1:] == segment[:, :-1]
    segment = segment[:, :-1]
  scored = model.score(
    token[:, :-1], jnp.maximum(target_BT, 0), real_BT, rng,
    segment_ids=segment, chunks=config.model.loss_chunks,
  )  # fmt: skip
  return scored, real_BT


def evaluate(
  config: ConfigDict, model: LanguageModel, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns sums over the tokens to predict, from which `results` is computed.

  batch: as in `loss`, with "weight" (B,), 0 for padding rows.
  """
  (_, nats_BT, correct_BT), real_BT = _score(config, model, batch)
  weight_BT = batch["weight"][:, None] * real_BT
  size_V = jnp.asarray(text.tokenizer(config).num_bytes(), jnp.float32)
  bytes_BT = size_V.at[batch["token"][:, 1:]].get(mode="clip")
  sums = {
    "loss": jnp.vdot(weight_BT, nats_BT),
    "accuracy": jnp.vdot(weight_BT, correct_BT.astype(jnp.float32)),
    "bytes": jnp.vdot(weight_BT, bytes_BT),
    "weight": weight_BT.sum(),
  }
  if config.eval.by_position:
    sums["loss_T"] = (weight_BT * nats_BT).sum(0)
    sums["weight_T"] = weight_BT.sum(0)
  return sums


def results(
  config: ConfigDict, sums: dict[str, np.ndarray]
) -> dict[str, float]:
  """Returns the metrics, given the sums of `evaluate` over all batches.

  loss           mean cross-entropy in nats per token
  perplexity     e^loss
  accuracy       share of the targets that the model considers the likeliest
  bits_per_byte  cross-entropy in bits per byte of text, comparable between
                 tokenizers; equals bits per character for ASCII text
  loss@0:16      loss of the first 16 targets of a row, then loss@16:32,
                 loss@32:64 and so on; only with config.eval.by_position
  """
  count = sums["weight"]
  mean = sums["loss"] / count
  metrics = {
    "loss": mean,
    "perplexity": math.exp(mean),
    "accuracy": sums["accuracy"] / count,
    "bits_per_byte": sums["loss"] / sums["bytes"] / math.log(2),
  }
  if config.eval.by_position:
    metrics |= _by_position(sums["loss_T"], sums["weight_T"])
  return metrics


def _by_position(loss_T, weight_T):
  start, stop, losses = 0, 16, {}
  while start < len(loss_T):
    part = slice(start, stop)
    if weight_T[part].sum():
      name = f"loss@{start}:{min(stop, len(loss_T))}"
      losses[name] = loss_T[part].sum() / weight_T[part].sum()
    start, stop = stop, 2 * stop
  return losses


def evaluation_variants(config: ConfigDict) -> dict[str, ConfigDict]:
  """Returns {name: config}, the evaluations of eval.py at other lengths.

  The lengths are config.eval.length_factors times the training length, each
  with every max_length of config.eval.max_length_of. The loss is also given by
  position. All variants cut the same text into rows of another length, but the
  documents of a stream do not become longer.
  """
  variants = {}
  for name, factor, max_length_of in stack.eval_lengths(config):
    variant = config.copy_and_resolve_references().unlock()
    variant.data.length = factor * config.data.length
    if max_length_of == "test":
      variant.model.max_length = variant.data.length
    variant.batch_size = max(config.batch_size // factor, jax.device_count())
    variant.batch_size -= variant.batch_size % jax.device_count()
    variant.eval.by_position = True
    variants[name] = variant.lock()
  return variants
