"""Small tasks that attention alone can solve, in a transformer of few layers.

sigattn/data/synthetic.py says what they are.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from sigattn import layers, positions, stack
from sigattn.data import loader
from sigattn.data import synthetic as sequences
from sigattn.validate import choice, whole

SOURCE = sequences
UNIT = "examples"
METRICS = ("loss", "accuracy")
POSITIONS = ("sincos", "rope", "none")
CAUSAL = ("recall", "copy")  # a token sees those before it alone
NUMBERS = ("summation",)  # real numbers in and out; the others: symbols


class Solver(nnx.Module):
  """Embedding + positions -> stack -> norm -> linear head, for every token.

  Symbols are embedded by a table, numbers by a linear layer. classes: of the
  output; 1 for a number.
  """

  def __init__(
    self,
    stack: layers.Stack,
    *,
    symbols: int | None,
    classes: int,
    width: int,
    norm: str | None,
    table: bool,
    has_positions: bool,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    """symbols: of the input, None for numbers. table: adds sines.

    has_positions: whether the stack takes `positions`.
    """
    self.stack, self.width, self.dtype = stack, width, dtype
    self.table, self.has_positions = table, has_positions
    self.embed = (
      nnx.Linear(1, width, rngs=rngs)
      if symbols is None
      else nnx.Embed(symbols, width, rngs=rngs)
    )
    self.has_norm = norm is not None
    if self.has_norm:
      self.norm = layers.make_norm(norm, width, rngs)
    self.head = nnx.Linear(width, classes, rngs=rngs)

  def __call__(
    self, input_BT: jax.Array, rng: jax.Array | None = None
  ) -> jax.Array:
    """(B, T, classes), float32; rng: of what drops at random."""
    is_number = jnp.issubdtype(input_BT.dtype, jnp.floating)
    x_BTD = self.embed(input_BT[..., None] if is_number else input_BT)
    length = input_BT.shape[1]
    if self.table:
      x_BTD = x_BTD + positions.sincos_1d(length, self.width)[None]
    where = {"positions": jnp.arange(length)} if self.has_positions else {}
    x_BTD = self.stack(x_BTD.astype(self.dtype), rng, **where)
    if self.has_norm:
      x_BTD = layers.normalize(self.norm, x_BTD)
    return self.head(x_BTD.astype(jnp.float32))


FIELDS = (
  stack.FIELDS
  | stack.LENGTH_FIELDS
  | {
    "model.positions": choice(POSITIONS),
    "model.max_length": whole(low=1, optional=True),
  }
)


def _not_causal(config):
  if config.data.name not in CAUSAL:
    stack.not_causal(config)


RULES = (
  *stack.RULES,
  _not_causal,
  stack.multiple_for_positions({"sincos": 2, "rope": 2}),
)


def build(config: ConfigDict, rngs: nnx.Rngs) -> Solver:
  """The Solver of a config, its sigmoid's n the training length."""
  model, name = config.model, config.data.name
  is_number = name in NUMBERS
  max_length = model.max_length or sequences.width(config.data)
  blocks = stack.make(
    config,
    max_length=max_length,
    is_causal=name in CAUSAL,
    rotate=positions.rope if model.positions == "rope" else None,
    rngs=rngs,
  )
  return Solver(
    blocks,
    symbols=None if is_number else config.data.vocab_size,
    classes=1 if is_number else config.data.vocab_size,
    width=model.width,
    norm=None if model.norm == "post" else model.norm_kind,
    table=model.positions == "sincos",
    # By which RoPE turns, and the row scaling counts.
    has_positions=model.positions == "rope" or config.attn.row_power > 0,
    dtype=jnp.dtype(config.dtype),
    rngs=rngs,
  )


def _score(config, model, batch, rng=None):
  """Loss and 1 where right of each token, (B, T)."""
  out_BTV, target_BT = model(batch["input"], rng), batch["target"]
  if config.data.name in NUMBERS:
    # Divided by the target's variance: 1 is what knowing nothing costs.
    gap_BT = (out_BTV[..., 0] - target_BT) ** 2 / config.data.size
    return gap_BT, gap_BT < 0.01
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(out_BTV, target_BT)
  return loss_BT, out_BTV.argmax(-1) == target_BT


def tick_labels(config: ConfigDict, batch: loader.Batch) -> list[str]:
  """The symbol or number of each token, of a batch of one."""
  form = "{:.2f}" if config.data.name in NUMBERS else "{}"
  return [form.format(x) for x in batch["input"][0]]


def loss(
  config: ConfigDict,
  model: Solver,
  batch: dict[str, jax.Array],
  rng: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The mean over the tokens that count: (loss, {"loss", "accuracy"}).

  Symbols: cross-entropy, and the share that was likeliest. Numbers: squared
  error over the target's variance, and the share with less than a hundredth.
  """
  loss_BT, right_BT = _score(config, model, batch, rng)
  scored_BT = batch["scored"]
  count = scored_BT.sum()
  value = jnp.where(scored_BT, loss_BT, 0).sum() / count
  accuracy = (right_BT & scored_BT).sum() / count
  return value, {"loss": value, "accuracy": accuracy}


def evaluate(
  config: ConfigDict, model: Solver, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Sums over the tokens that count, and their number."""
  loss_BT, right_BT = _score(config, model, batch)
  weight_BT = batch["weight"][:, None] * batch["scored"]
  return {
    "loss": jnp.vdot(weight_BT, loss_BT),
    "accuracy": jnp.vdot(weight_BT, right_BT.astype(jnp.float32)),
    "weight": weight_BT.sum(),
  }


def evaluation_variants(config: ConfigDict) -> dict[str, ConfigDict]:
  """What eval.py evaluates beside the run's own length: {name: config}.

  Each of config.eval.length_factors times the training length. The model stays
  that of the training length, its sigmoid's n too, unless
  config.eval.max_length_of or config.model.max_length says otherwise.
  """
  variants = {}
  for name, factor, max_length_of in stack.eval_lengths(config):
    other = config.copy_and_resolve_references().unlock()
    other.data.length = factor * config.data.length
    other.model.max_length = (
      sequences.width(other.data)
      if max_length_of == "test"
      else config.model.max_length or sequences.width(config.data)
    )
    variants[name] = other.lock()
  return variants
