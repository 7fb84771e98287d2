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

  Symbols are embedded by a table, numbers by a linear layer. num_outputs:
  classes of the output; 1 for a number.
  """

  def __init__(
    self,
    stack: layers.Stack,
    *,
    vocab_size: int | None,
    num_outputs: int,
    width: int,
    norm: str | None,
    add_sincos: bool,
    has_positions: bool,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    """vocab_size: of the input, None for numbers. add_sincos: adds sines.

    has_positions: whether the stack takes `positions`.
    """
    self.stack, self.width, self.dtype = stack, width, dtype
    self.add_sincos, self.has_positions = add_sincos, has_positions
    self.embed = (
      nnx.Linear(1, width, rngs=rngs)
      if vocab_size is None
      else nnx.Embed(vocab_size, width, rngs=rngs)
    )
    self.has_norm = norm is not None
    if self.has_norm:
      self.norm = layers.make_norm(norm, width, rngs)
    self.head = nnx.Linear(width, num_outputs, rngs=rngs)

  def __call__(
    self, input_BT: jax.Array, rng: jax.Array | None = None
  ) -> jax.Array:
    """(B, T, classes), float32; rng: of what drops at random."""
    is_number = jnp.issubdtype(input_BT.dtype, jnp.floating)
    x_BTD = self.embed(input_BT[..., None] if is_number else input_BT)
    length = input_BT.shape[1]
    if self.add_sincos:
      x_BTD = x_BTD + positions.sincos_1d(length, self.width)[None]
    stack_args = {"positions": jnp.arange(length)} if self.has_positions else {}
    x_BTD = self.stack(x_BTD.astype(self.dtype), rng, **stack_args)
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
  max_length = model.max_length or sequences.num_tokens(config.data)
  blocks = stack.make(
    config,
    max_length=max_length,
    is_causal=name in CAUSAL,
    rotate=positions.rope if model.positions == "rope" else None,
    rngs=rngs,
  )
  return Solver(
    blocks,
    vocab_size=None if is_number else config.data.vocab_size,
    num_outputs=1 if is_number else config.data.vocab_size,
    width=model.width,
    norm=None if model.norm == "post" else model.norm_kind,
    add_sincos=model.positions == "sincos",
    # By which RoPE turns, and the row scaling counts.
    has_positions=model.positions == "rope" or config.attn.row_power > 0,
    dtype=jnp.dtype(config.dtype),
    rngs=rngs,
  )


def _loss_and_correct(config, model, batch, rng=None):
  """Loss and 1 where right of each token, (B, T)."""
  out_BTV, target_BT = model(batch["input"], rng), batch["target"]
  if config.data.name in NUMBERS:
    # Divided by the target's variance: 1 is what knowing nothing costs.
    error_BT = (out_BTV[..., 0] - target_BT) ** 2 / config.data.size
    return error_BT, error_BT < 0.01
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(out_BTV, target_BT)
  return loss_BT, out_BTV.argmax(-1) == target_BT


def tick_labels(config: ConfigDict, batch: loader.Batch) -> list[str]:
  """The symbol or number of each token, of a batch of one."""
  template = "{:.2f}" if config.data.name in NUMBERS else "{}"
  return [template.format(x) for x in batch["input"][0]]


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
  loss_BT, correct_BT = _loss_and_correct(config, model, batch, rng)
  scored_BT = batch["scored"]
  count = scored_BT.sum()
  mean_loss = jnp.where(scored_BT, loss_BT, 0).sum() / count
  accuracy = (correct_BT & scored_BT).sum() / count
  return mean_loss, {"loss": mean_loss, "accuracy": accuracy}


def evaluate(
  config: ConfigDict, model: Solver, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Sums over the tokens that count, and their number."""
  loss_BT, correct_BT = _loss_and_correct(config, model, batch)
  weight_BT = batch["weight"][:, None] * batch["scored"]
  return {
    "loss": jnp.vdot(weight_BT, loss_BT),
    "accuracy": jnp.vdot(weight_BT, correct_BT.astype(jnp.float32)),
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
    variant = config.copy_and_resolve_references().unlock()
    variant.data.length = factor * config.data.length
    variant.model.max_length = (
      sequences.num_tokens(variant.data)
      if max_length_of == "test"
      else config.model.max_length or sequences.num_tokens(config.data)
    )
    variants[name] = variant.lock()
  return variants
