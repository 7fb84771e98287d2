"""Batches for training and evaluation, through grain.

A source module (image, text, speech, synthetic) says how to read; here are the
order, the batches, the shares of the processes and the worker processes. A
source module has

  FIELDS, RULES               its part of the config, see sigattn.validate
  open_source(config, split)  a split: an ExampleSource, or anything else with
                              its methods train_batches and eval_batches
"""

import bisect
import functools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator

import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from sigattn.validate import whole

# Batches of a source that decodes, at work at once where no worker
# processes are asked for. Pillow decodes and resizes without the GIL.
_THREADS = 4

_ENDLESS = 2**40  # more epochs, and more examples, than any run has

Batch = dict[str, np.ndarray]

FIELDS = {
  "seed": whole(low=0),
  "batch_size": whole(low=1),
  "data.num_workers": whole(low=0),
}
RULES = ()


class ExampleSource:
  """A split whose examples are asked for by their index.

  A subclass has `__len__`, and for arrays of indices (B,)
    train(indices_B, rng)  a batch, with randomness from a NumPy Generator
    evaluate(indices_B)    the same without randomness

  in_memory: whether reading is so cheap that whole batches are read at once;
    else examples are read and decoded one at a time.
  buckets: arrays of indices, one for each of config.data.bucket_seconds, whose
    examples make batches of one shape; None where all have one shape.
  """

  in_memory: bool
  buckets: list[np.ndarray] | None = None

  def train_batches(self, config: ConfigDict) -> Iterator[Batch]:
    """Endless batches, each a dict of NumPy arrays, as `train` makes them.

    They hold this process's share of the examples. All of it follows from
    config.seed, and each epoch has an order of its own. The iterator's state
    is saved and restored exactly by grain.checkpoint.
    """
    if self.buckets is None:
      order = _Shuffled(len(self), _chunk_size(config, self), config.seed)
    else:
      order = _ShuffledBuckets(self, config)
    chunks = grain.MapDataset.source(order).random_map(
      self.train, seed=config.seed
    )
    return iter(_batches(config, self, chunks, config.data.num_workers))

  def eval_batches(self, config: ConfigDict) -> Iterable[Batch]:
    """Batches and float32 `weight` (B,), as often as iterated.

    Every example of the split once, in order, with weight 1; the last batch is
    filled up with examples of weight 0.
    """
    if self.buckets is None:
      order = _InOrder(len(self), _chunk_size(config, self), config.batch_size)
    else:
      order = _BucketsInOrder(self, config)
    chunks = grain.MapDataset.source(order).map(
      functools.partial(_evaluate, self)
    )
    # To start workers takes longer than to copy a whole set in memory.
    num_workers = 0 if self.in_memory else config.data.num_workers
    return _batches(config, self, chunks, num_workers)


def _evaluate(source, indices_B):
  """An index beyond the end stands for padding with the example modulo it."""
  is_real = indices_B < len(source)
  batch = source.evaluate(indices_B % len(source))
  return batch | {"weight": is_real.astype(np.float32)}


def batch_size(config: ConfigDict) -> int:
  """Examples of a batch that are this process's."""
  return config.batch_size // jax.process_count()


def _chunk_size(config, source):
  """Examples read and augmented at once."""
  reads_whole_batches = source.in_memory or source.buckets is not None
  return batch_size(config) if reads_whole_batches else 1


def _batches(config, source, chunks, num_workers):
  """Whole batches, of which each process and then each worker takes its own.

  Each worker makes whole batches, so their number changes nothing but speed.
  """
  chunks_per_batch = batch_size(config) // _chunk_size(config, source)
  batches = chunks.batch(chunks_per_batch, batch_fn=_concatenate)
  share = batches
  if source.buckets is None:  # the processes share each batch of a bucket
    share = batches[jax.process_index() :: jax.process_count()]
  threads = 1 if num_workers or source.in_memory else _THREADS
  if num_workers and not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads flags: a notebook parses none
  return share.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  ).mp_prefetch(
    grain.MultiprocessingOptions(num_workers=num_workers), _start_worker
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
    return _ENDLESS // self._chunk

  def __getitem__(self, i):
    positions = np.arange(i * self._chunk, (i + 1) * self._chunk)
    epochs, positions = np.divmod(positions, self._length)
    parts = [
      _permutation(self._length, self._seed, int(epoch))[
        positions[epochs == epoch]
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


class _Buckets:
  """What the orders of a bucketed source have in common.

  source.buckets: arrays of indices, one for each of config.data.
  bucket_seconds. The longest's batch is config.batch_size examples, a shorter
  one's as many times that as its seconds fit in the longest's: a batch of each
  is about as much work.
  """

  def __init__(self, source, config):
    seconds = config.data.bucket_seconds
    pairs = [
      # 1e-9: 0.3 / 0.1 is a little less than 3.
      (indices, config.batch_size * int(seconds[-1] / max_seconds + 1e-9))
      for indices, max_seconds in zip(source.buckets, seconds, strict=True)
      if len(indices)
    ]
    if not pairs:
      raise ValueError(
        f"config.data.bucket_seconds={seconds!r}; every recording is longer"
      )
    self._buckets, self._sizes = zip(*pairs, strict=True)

  def _share(self, indices):
    """This process's part of a batch."""
    return indices[jax.process_index() :: jax.process_count()]


class _ShuffledBuckets(_Buckets):
  """Whole batches of indices, from each bucket in its turn.

  By the end of epoch e, bucket b has given floor((e + 1) len_b / size_b)
  batches: each example comes once an epoch, but for what does not fill a
  batch, which comes in the next. Within an epoch the batches are shuffled.
  """

  def __init__(self, source, config):
    super().__init__(source, config)
    self._seed = config.seed
    self._streams = [
      _Shuffled(len(indices), size, config.seed)
      for indices, size in zip(self._buckets, self._sizes, strict=True)
    ]

  def __len__(self):
    # At least one batch comes in so many epochs.
    return _ENDLESS // max(self._sizes)

  def __getitem__(self, i):
    epochs = range(_ENDLESS)
    epoch = bisect.bisect_right(epochs, i, key=self._first_batch) - 1
    position = i - self._first_batch(epoch)
    counts = np.subtract(
      self._batches_before(epoch + 1), self._batches_before(epoch)
    )
    order = _bucket_order((*counts.tolist(),), self._seed, epoch)
    bucket = order[position]
    batch = self._batches_before(epoch)[bucket] + int(
      (order[:position] == bucket).sum()
    )
    indices = self._streams[bucket][batch]
    return self._share(self._buckets[bucket][indices])

  def _batches_before(self, epoch):
    """What each bucket has given before the epoch."""
    return [
      epoch * len(indices) // size
      for indices, size in zip(self._buckets, self._sizes, strict=True)
    ]

  def _first_batch(self, epoch):
    return sum(self._batches_before(epoch))


@functools.lru_cache(maxsize=2)
def _bucket_order(counts, seed, epoch):
  """The bucket of each of an epoch's batches, counts[b] of bucket b."""
  order = np.repeat(np.arange(len(counts)), counts)
  # 1: not the numbers that shuffle the examples.
  return np.random.default_rng((seed, epoch, 1)).permutation(order)


class _BucketsInOrder(_Buckets):
  """Every example once, bucket by bucket, the last batch of each filled up.

  An example beyond the number of all stands for padding.
  """

  def __init__(self, source, config):
    super().__init__(source, config)
    if num_too_long := len(source) - sum(map(len, self._buckets)):
      raise ValueError(
        f"config.data.bucket_seconds={config.data.bucket_seconds!r}; "
        f"{num_too_long} of {len(source)} recordings to evaluate are longer"
      )
    self._batches = []
    for indices, size in zip(self._buckets, self._sizes, strict=True):
      padding = np.full(-len(indices) % size, indices[0] + len(source))
      batches = np.concatenate([indices, padding]).reshape(-1, size)
      self._batches += list(batches)

  def __len__(self):
    return len(self._batches)

  def __getitem__(self, i):
    return self._share(self._batches[i])
