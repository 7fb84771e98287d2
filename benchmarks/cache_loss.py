"""Measures what a cache in 8 bits costs: python -m benchmarks.cache_loss RUN

Rows of held-out tokens go through a trained language model token by token, as
in generation: each query attends to the keys and values in the cache. It prints
the mean loss in nats a token for each dtype of the cache, and how far it is
from that of the first one. No document of a row is hidden from another one.
"""

import argparse
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sigattn import tasks
from sigattn.inference import engine, generate
from sigattn.training import checkpoint


@functools.partial(jax.jit, static_argnums=(0, 3))
def losses(graphdef, params, token_BT, dtype):
  """The nats of each target, (B, T - 1), and 0 for padding (tokens below 0).

  graphdef, params: what engine.prepared returns. dtype: of the cache, see
  lm.LanguageModel.empty_cache.
  """
  model = nnx.merge(graphdef, params)
  batch, length = token_BT.shape
  score = optax.softmax_cross_entropy_with_integer_labels

  def step(cache, column):
    place, token_B, target_B = column
    place_B = jnp.full((batch,), place)
    logits_BV, cache = model.decode(jnp.maximum(token_B, 0), cache, place_B)
    nats_B = score(logits_BV, jnp.maximum(target_B, 0))
    return cache, jnp.where(target_B < 0, 0.0, nats_B)

  columns = jnp.arange(length - 1), token_BT.T[:-1], token_BT.T[1:]
  cache = model.empty_cache(batch, length, dtype)
  return jax.lax.scan(step, cache, columns)[1].T


def _rows(config, split, most):
  """The first `most` rows of a split, and whole batches of them."""
  size = config.batch_size
  batches = itertools.islice(
    tasks.eval_batches(config, split), -(-most // size)
  )
  return np.concatenate([x["token"][x["weight"] > 0] for x in batches])


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("run", type=pathlib.Path, help="the folder of a run")
  parser.add_argument("--split", default="test")
  parser.add_argument("--rows", type=int, default=256)
  arguments = parser.parse_args()
  config, params, _ = checkpoint.load(arguments.run)
  token_BT = _rows(config, arguments.split, arguments.rows)
  count = (token_BT[:, 1:] >= 0).sum()
  model = engine.prepared(config, params)
  first = None
  for dtype in generate.CACHE_DTYPES:
    mean = float(losses(*model, token_BT, dtype).sum() / count)
    first = mean if first is None else first
    print(
      f"{dtype or config.dtype:14} {mean:.5f} nats a token, {mean - first:+.5f}"
      f" ({count} tokens)",
      flush=True,
    )


if __name__ == "__main__":
  main()
