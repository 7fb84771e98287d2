"""Compares our CTC loss with optax's: python -m benchmarks.ctc

It times the loss alone and the loss with its gradient, for 8 utterances of 588
tokens and 168 characters, as in 15 seconds of speech, on the device that JAX
finds. It prints a table. On a GPU it also writes
benchmarks/results/ctc_<device>.json.
"""

import datetime
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import milliseconds
from sigattn.tasks import ctc_loss

BATCH, TOKENS, CHARACTERS, SYMBOLS = 8, 588, 168, 29
_FOLDER = pathlib.Path(__file__).parent / "results"


def _arguments():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (BATCH, TOKENS, SYMBOLS)).astype("float32")
  targets = rng.integers(1, SYMBOLS, (BATCH, CHARACTERS), np.int32)
  tokens = rng.integers(TOKENS // 2, TOKENS + 1, BATCH).astype("int32")
  characters = rng.integers(1, CHARACTERS + 1, BATCH).astype("int32")
  return [jnp.asarray(x) for x in (logits, tokens, targets, characters)]


def _optax(logits_BTV, tokens_B, targets_BU, characters_B):
  def padding(lengths_B, length):
    return (jnp.arange(length)[None] >= lengths_B[:, None]).astype(jnp.float32)

  return optax.ctc_loss(
    logits_BTV,
    padding(tokens_B, TOKENS),
    targets_BU,
    padding(characters_B, CHARACTERS),
  )


def rows():
  """A row for each implementation."""
  ours = {
    f"sigattn, blocks of {block}": functools.partial(
      ctc_loss.ctc_loss, block=block
    )
    for block in (1, 8, ctc_loss.BLOCK, 32)
  }
  arguments = _arguments()
  for name, loss in ({"optax": _optax} | ours).items():
    forward = jax.jit(loss)
    both = jax.jit(jax.value_and_grad(lambda *x, f=loss: f(*x).sum()))
    yield {
      "implementation": name,
      "forward_milliseconds": milliseconds(lambda: forward(*arguments)),  # noqa: B023
      "both_milliseconds": milliseconds(lambda: both(*arguments)),  # noqa: B023
      "loss": float(both(*arguments)[0]),
    }


def main():
  device = jax.devices()[0].device_kind
  found = []
  for row in rows():
    found.append(row)
    print(
      f"{row['implementation']:24} forward {row['forward_milliseconds']:8.3f} "
      f"ms, with gradient {row['both_milliseconds']:8.3f} ms",
      flush=True,
    )
  if jax.default_backend() != "cpu":
    path = _FOLDER / f"ctc_{device.replace(' ', '_').lower()}.json"
    result = {
      "device": device,
      "date": datetime.date.today().isoformat(),
      "jax": jax.__version__,
      "rows": found,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
  main()
