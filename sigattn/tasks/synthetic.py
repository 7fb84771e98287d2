"""Small tasks that only attention can solve, for a transformer of few layers.

sigattn/data/synthetic.py describes them.
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
# The tasks with causal attention.
CAUSAL = ("recall", "noisy_recall", "copy", "selective_copy")
NUMBERS = ("summation",)  # real numbers in and out; other tasks use symbols


class Solver(nnx.Module):
  """Embedding + positions -> stack -> norm -> linear head, for every token.

  A table embeds symbols, and a linear layer embeds numbers.

  vocab_size: the number of input symbols, or None if the input is numbers.
  num_outputs: the number of output symbols, or 1 if the output is a number.
  norm: the kind of the norm before the head, or None for no norm.
  add_sincos: whether sines of the positions are added to the embedding.
  has_positions: whether the stack takes `positions`.
  """

  def __init__(
    self,
    stack: layers.Stack,
    *,
    vocab_size: int | None,
    num_outputs: int,
    width: int,
    norm: str | None,
    norm_epsilon: float | None,
    add_sincos: bool,
    has_positions: bool,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.stack, self.width, self.dtype = stack, width, dtype
    self.add_sincos, self.has_positions = add_sincos, has_positions
    self.embed = (
      nnx.Linear(1, width, rngs=rngs)
      if vocab_size is None
      else nnx.Embed(vocab_size, width, rngs=rngs)
    )
    self.has_norm = norm is not None
    if self.has_norm:
      self.norm = layers.make_norm(norm, width, rngs, norm_epsilon)
    self.head = nnx.Linear(width, num_outputs, rngs=rngs)

  def __call__(
    self, input_BT: jax.Array, rng: jax.Array | None = None
  ) -> jax.Array:
    """Returns the output of each token, float32 (B, T, num_outputs).

    input_BT: int symbols or float numbers. rng: for dropout and drop path; None
    turns both off.
    """
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
    "model.max_length": whole(low=1, high=2**31 - 1, optional=True),
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
  """Returns the Solver of a config.

  Its max_length, the n of sigmoid's bias -log n, is config.model.max_length;
  None means the number of tokens of a training example.
  """
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
    norm_epsilon=model.norm_epsilon,
    add_sincos=model.positions == "sincos",
    # RoPE rotates by the positions, and the row scaling counts tokens by them.
    has_positions=model.positions == "rope" or config.attn.row_power > 0,
    dtype=jnp.dtype(config.dtype),
    rngs=rngs,
  )


def _loss_and_correct(config, model, batch, rng=None):
  """The loss of each token, and whether it is predicted correctly, (B, T)."""
  out_BTV, target_BT = model(batch["input"], rng), batch["target"]
  if config.data.name in NUMBERS:
    # The variance of the target is config.data.size. Divided by it, the loss of
    # always predicting 0 is 1.
    error_BT = (out_BTV[..., 0] - target_BT) ** 2 / config.data.size
    return error_BT, error_BT < 0.01
  loss_BT = optax.softmax_cross_entropy_with_integer_labels(out_BTV, target_BT)
  return loss_BT, out_BTV.argmax(-1) == target_BT


def tick_labels(config: ConfigDict, batch: loader.Batch) -> list[str]:
  """Returns the symbol or number of each token of a batch of one."""
  template = "{:.2f}" if config.data.name in NUMBERS else "{}"
  return [template.format(x) for x in batch["input"][0]]


def loss(
  config: ConfigDict,
  model: Solver,
  batch: dict[str, jax.Array],
  rng: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns (loss, {"loss", "accuracy"}), means over the scored tokens.

  For symbols, the loss is the cross-entropy in nats, and a token is correct if
  the target is the likeliest symbol. For numbers, the loss is the squared error
  divided by the target's variance, and a token is correct below 0.01.
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
  """Returns sums over the scored tokens of loss, accuracy and weight.

  batch: as in `loss`, with "weight" (B,), 0 for padding.
  """
  loss_BT, correct_BT = _loss_and_correct(config, model, batch)
  weight_BT = batch["weight"][:, None] * batch["scored"]
  return {
    "loss": jnp.vdot(weight_BT, loss_BT),
    "accuracy": jnp.vdot(weight_BT, correct_BT.astype(jnp.float32)),
    "weight": weight_BT.sum(),
  }


def evaluation_variants(config: ConfigDict) -> dict[str, ConfigDict]:
  """Returns {name: config}, the evaluations of eval.py at other lengths.

  The lengths are config.eval.length_factors times the training length, each
  with every max_length of config.eval.max_length_of. "training" keeps the n of
  the trained model's sigmoid; "test" takes the number of tokens evaluated.
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
