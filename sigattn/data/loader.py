"""Batches for training and evaluation, through grain.

A source (image.py, text.py) says how to read; here are the order, the batches,
the shares of the processes and the worker processes. A stream of texts has an
order of its own, and brings its batches.
"""

import functools
import math
import multiprocessing
import os
import signal
import sys
import threading

import grain
import jax
import numpy as np
from absl import flags

from sigattn import check as checks
from sigattn.data import image, synthetic, text

# Batches of a source that decodes, at work at once where no worker
# processes are asked for. Pillow decodes and resizes without the GIL.
_THREADS = 4


SOURCES = {"lm": text, "synthetic": synthetic, "vit": image}  # of each task


def check(config):
  """Refuses bad values of config.data and of its part of config.augment.

  Raises ValueError.
  """
  checks.number(config, "seed", low=0)
  checks.number(config, "data.num_workers", low=0)
  SOURCES[config.task].check(config)


def train_iterator(config):
  """Endless batches of what the source says, (B, ...) each.

  B is this process's share of config.batch_size. All of it follows from
  config.seed, and each epoch has an order of its own. The iterator's state is
  saved and restored exactly by grain.checkpoint.
  """
  source = SOURCES[config.task].open_source(config, config.data.train_split)
  if isinstance(source, text.Stream):
    return iter(source.train_batches(_batch_size(config)))
  order = _Shuffled(len(source), _chunk(config, source), config.seed)
  chunks = grain.MapDataset.source(order).random_map(
    source.train, seed=config.seed
  )
  return iter(_batches(config, source, chunks, config.data.num_workers))


def eval_batches(config, split):
  """Batches as in training and float32 `weight` (B,), as often as iterated.

  Every example of the split once, in order, with weight 1; the last batch is
  filled up with examples of weight 0. Raises ValueError for an unknown split.
  """
  source = SOURCES[config.task].open_source(config, split)
  if isinstance(source, text.Stream):
    return source.eval_batches(config.batch_size)
  order = _InOrder(len(source), _chunk(config, source), config.batch_size)
  chunks = grain.MapDataset.source(order).map(
    functools.partial(_evaluate, source)
  )
  # To start workers takes longer than to copy a whole set in memory.
  workers = 0 if source.in_memory else config.data.num_workers
  return _batches(config, source, chunks, workers)


def _evaluate(source, indices_B):
  real = indices_B < len(source)
  batch = source.evaluate(np.where(real, indices_B, 0))
  return batch | {"weight": real.astype(np.float32)}


def _batch_size(config):
  return config.batch_size // jax.process_count()


def _chunk(config, source):
  """Examples read and augmented at once."""
  return _batch_size(config) if source.in_memory else 1


def _batches(config, source, chunks, workers):
  """Whole batches, of which each process and then each worker takes its own.

  Each worker makes whole batches, so their number changes nothing but speed.
  """
  parts = _batch_size(config) // _chunk(config, source)
  batches = chunks.batch(parts, batch_fn=_concatenate)
  share = batches[jax.process_index() :: jax.process_count()]
  threads = 1 if workers or source.in_memory else _THREADS
  if workers and not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads flags: a notebook parses none
  return share.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  ).mp_prefetch(
    grain.MultiprocessingOptions(num_workers=workers), _start_worker
  )


def _start_worker(*_):
  """Lets a worker end with the main process, not before and not after."""
  # Ctrl-C reaches the workers too, while a last batch may be awaited.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # A main process that is killed cannot tell them.
  threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent():
  multiprocessing.parent_process().join()
  os._exit(1)


def _concatenate(chunks):
  return {
    name: np.concatenate([chunk[name] for chunk in chunks])
    for name in chunks[0]
  }


class _Shuffled:
  """Chunks of indices, int64 (chunk,): each epoch another permutation.

  grain's own shuffle costs 24 microseconds an index, more than all the rest
  of the work on a small image, and its seed s in epoch e is s + 1 in e - 1.
  """

  def __init__(self, length, chunk, seed):
    self._length, self._chunk, self._seed = length, chunk, seed

  def __len__(self):
    return sys.maxsize // self._chunk

  def __getitem__(self, i):
    places = np.arange(i * self._chunk, (i + 1) * self._chunk)
    epochs, places = np.divmod(places, self._length)
    parts = [
      _permutation(self._length, self._seed, int(epoch))[
        places[epochs == epoch]
      ]
      for epoch in np.unique(epochs)
    ]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=2)
def _permutation(length, seed, epoch):
  return np.random.default_rng((seed, epoch)).permutation(length)


class _InOrder:
  """Chunks of 0, 1, 2, ..., up to a multiple of `batch_size` past the end."""

  def __init__(self, length, chunk, batch_size):
    self._length = math.ceil(length / batch_size) * batch_size // chunk
    self._chunk = chunk

  def __len__(self):
    return self._length

  def __getitem__(self, i):
    return np.arange(i * self._chunk, (i + 1) * self._chunk)
