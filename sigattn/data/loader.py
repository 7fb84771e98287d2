"""Makes batches for training and evaluation with grain.

The source modules (image, text, speech, synthetic) read examples. This module
orders the examples, groups them into batches, divides the batches among the
processes and runs the worker processes. A source module has

  FIELDS, RULES               its part of the config, see sigattn.validate
  open_source(config, split)  opens a split: returns an ExampleSource, or
                              another object with the methods train_batches and
                              eval_batches

and may have

  EMBEDDED                    the names of its embedded data sets
  files(source, key)          the files of a local source that it reads; by
                              default all of a folder, see hub.files. A run
                              keeps their checksum, see kept_data
"""

import ast
import bisect
import functools
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from sigattn.validate import whole

# How many batches are made at the same time if a source decodes and there are
# no worker processes. Threads help because Pillow decodes and resizes without
# holding Python's global lock.
_THREADS = 4

_ENDLESS = 2**40  # more epochs and more examples than any run needs

Batch = dict[str, np.ndarray]

FIELDS = {
  # JAX would make the same key of two seeds that differ by 2^32.
  "seed": whole(low=0, high=2**32 - 1),
  "batch_size": whole(low=1, high=2**20),
  "data.num_workers": whole(low=0, high=1024),
}
RULES = ()


def validate_batch_size(config: ConfigDict, count: int, of: str) -> None:
  """Raises ValueError if a training batch has more examples than the split.

  A batch would then contain examples twice. count: the split's number of
  examples. of: the name of the split, for the error.
  """
  if config.batch_size > count:
    raise ValueError(
      f"config.batch_size={config.batch_size!r}; must be at most {count}, the "
      f"number of examples in {of}"
    )


class CorruptExampleError(ValueError):
  """An example that cannot be read; the message names it and says why."""


def why_unreadable(
  origin: str, row: int, encoded: Mapping[str, Any] | None, error: Exception
) -> str:
  """Says which row of a source cannot be read, and why.

  origin: the name of the split. encoded: the value of the row, as hub.encoded
  returns it.
  """
  path = encoded and encoded["path"]
  named = f", path={str(path)!r}" if path else ""
  return f"{origin}, row {row}{named}: {str(error) or repr(error)}"


class ExampleSource:
  """A split whose examples are read by their index.

  A subclass defines `__len__` and two methods that take indices (B,):
    train(indices_B, rng)  a batch; rng is a NumPy Generator for augmentation
    evaluate(indices_B)    a batch without randomness

  in_memory: whether reading is so cheap that a whole batch is read in one call.
    Otherwise examples are read and decoded one at a time.
  buckets: one array of indices for each of config.data.bucket_seconds. A batch
    takes its examples from one bucket, and all batches of a bucket have one
    shape. None if all examples have one shape.
  max_corrupt: how many examples may be corrupt. If it is not 0, a batch also
    has int64 `corrupt` (B,): the index of the corrupt example that another one
    has replaced, or -1. `corrupt` does not leave the pipeline.
  unreadable: {index: why} of examples that are known to be corrupt before they
    are read. They are in no bucket.
  """

  in_memory: bool
  buckets: list[np.ndarray] | None = None
  max_corrupt: int = 0
  unreadable: Mapping[int, str] = types.MappingProxyType({})

  def first_readable(
    self, indices: Iterable[int], read: Callable[[int], Any]
  ) -> tuple[int, Any]:
    """Returns the first index that can be read, and read(index).

    It depends on the files alone, so that a resumed run and any number of
    workers read the same examples. Raises CorruptExampleError after more than
    max_corrupt corrupt examples in a row.
    """
    error = None
    for index in itertools.islice(indices, self.max_corrupt + 1):
      try:
        return index, read(index)
      except CorruptExampleError as this:
        error = error or this
    if self.max_corrupt:
      raise error
    raise CorruptExampleError(
      f"{error}; config.data.max_corrupt_share is the share of examples that "
      "may be unreadable, and are skipped: "
      "--config.data.max_corrupt_share=0.1"
    ) from error

  def marks(self, indices_B: np.ndarray, read_B: np.ndarray) -> Batch:
    """Returns {"corrupt": (B,)}, or nothing if no example may be corrupt.

    indices_B: the examples that a batch asked for. read_B: those that it got.
    """
    if not self.max_corrupt:
      return {}
    return {"corrupt": np.where(read_B == indices_B, -1, indices_B)}

  def why_corrupt(self, index: int) -> str:
    """Returns the name of a corrupt example and why it cannot be read."""
    raise NotImplementedError

  def train_batches(self, config: ConfigDict) -> Iterator[Batch]:
    """Yields batches without end, each a dict of NumPy arrays made by `train`.

    A batch holds this process's share of the examples. Order and augmentation
    depend only on config.seed, and the order changes with each epoch.
    grain.checkpoint saves and restores the iterator's state exactly. Raises
    ValueError if a batch has more examples than the split.
    """
    split = f"the split {config.data.train_split!r} of config.data.source"
    validate_batch_size(config, len(self), split)
    if self.buckets is None:
      order = _Shuffled(len(self), _chunk_size(config, self), config.seed)
    else:
      order = _ShuffledBuckets(self, config)
    chunks = grain.MapDataset.source(order).random_map(
      self.train, seed=config.seed
    )
    return iter(_batches(config, self, chunks, config.data.num_workers))

  def eval_batches(self, config: ConfigDict) -> Iterable[Batch]:
    """Batches made by `evaluate`, with float32 `weight` (B,).

    Each pass over the result yields every example of the split once, in order,
    with weight 1. Examples of weight 0 fill up the last batch.
    """
    if self.buckets is None:
      order = _InOrder(len(self), _chunk_size(config, self), config.batch_size)
    else:
      order = _BucketsInOrder(self, config)
    chunks = grain.MapDataset.source(order).map(
      functools.partial(_evaluate, self)
    )
    # Starting workers takes longer than copying a whole data set in memory.
    num_workers = 0 if self.in_memory else config.data.num_workers
    return _batches(config, self, chunks, num_workers)


def _evaluate(source, indices_B):
  """A batch with weights. An index i >= len(source) stands for padding.

  The example with the index i % len(source) is used as padding.
  """
  is_real = indices_B < len(source)
  batch = source.evaluate(indices_B % len(source))
  if "corrupt" in batch:  # The replacement is counted in its own place.
    is_real &= batch["corrupt"] < 0
  return batch | {"weight": is_real.astype(np.float32)}


def batch_size(config: ConfigDict) -> int:
  """Returns the number of examples of a batch that this process reads."""
  return config.batch_size // jax.process_count()


def _chunk_size(config, source):
  """The number of examples that one call of the source reads."""
  reads_whole_batches = source.in_memory or source.buckets is not None
  return config.batch_size if reads_whole_batches else 1


def _batches(config, source, chunks, num_workers):
  """Makes batches of chunks; each process has its own rows of them.

  Each worker makes whole batches, so that the number of workers changes only
  the speed.
  """
  # With buckets, the processes divide each batch before they read it.
  share = chunks
  if source.buckets is None and source.in_memory:
    # Every process makes whole batches, which is cheap, and keeps its own rows.
    # So the random numbers of an example do not depend on the number of
    # processes.
    share = chunks.map(functools.partial(_own_rows, *_process()))
  elif source.buckets is None:
    batches = chunks.batch(batch_size(config), batch_fn=_concatenate)
    index, count = _process()
    share = batches[index::count]
  threads = 1 if num_workers or source.in_memory else _THREADS
  if num_workers:
    _validate_main_guard(num_workers)
  if num_workers and not flags.FLAGS.is_parsed():
    # grain reads absl's flags, and a notebook has not parsed them.
    flags.FLAGS.mark_as_parsed()
  dataset = share.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  ).mp_prefetch(
    grain.MultiprocessingOptions(num_workers=num_workers), _start_worker
  )
  if num_workers:
    dataset = _NamingDeadWorkers(dataset, num_workers)
  if source.max_corrupt:
    dataset = dataset.map(_CountCorrupt(source))
  return dataset


def _validate_main_guard(num_workers):
  """Raises ValueError in a script that worker processes would run again.

  A worker first imports the script that was started, as __mp_main__. If this
  call is not below `if __name__ == "__main__"` there, each worker would start
  workers of its own.
  """
  main = sys.modules["__main__"]
  file, spec = getattr(main, "__file__", None), main.__spec__
  if file is None or not os.path.isfile(file):
    return  # a notebook, or code that no worker can import
  if spec is not None and spec.name.endswith("__main__"):
    return  # a package's __main__, which no worker imports
  line = None
  for frame, number in traceback.walk_stack(None):
    if frame.f_code.co_name == "<module>" and frame.f_code.co_filename == file:
      line = number
  if line is None:
    return
  with open(file, "rb") as script:
    statements = ast.parse(script.read()).body
  [*_, statement] = (x for x in statements if x.lineno <= line)
  if not isinstance(statement, ast.If) or "__name__" not in ast.unparse(
    statement.test
  ):
    raise ValueError(
      f"config.data.num_workers={num_workers}; each worker process imports "
      f"{file} again, so what is in line {line} must stand below "
      '`if __name__ == "__main__":`; or set 0 for no worker processes'
    )


class _NamingDeadWorkers(grain.IterDataset):
  """The same dataset, but a killed worker process raises an OSError.

  The system kills a worker if memory runs out. That is no bug, so the user
  should see one line and not a trace.
  """

  def __init__(self, parent, num_workers):
    super().__init__(parent)
    self._num_workers = num_workers

  def __iter__(self):
    return _NamingDeadWorkersIterator(iter(self._parent), self._num_workers)


class _NamingDeadWorkersIterator(grain.DatasetIterator):
  def __init__(self, parent, num_workers):
    super().__init__(parent)
    self._num_workers = num_workers

  def __next__(self):
    try:
      return next(self._parent)
    except RuntimeError as error:  # grain has no type of its own for it
      ended = re.search(
        r"terminated unexpectedly with exit code (\S+)\.", f"{error}"
      )
      if not ended:
        raise
      raise ChildProcessError(
        f"a worker process (config.data.num_workers={self._num_workers}) was "
        f"killed, with exit code {ended[1]}. The system does that if memory "
        "runs out; fewer workers need less memory"
      ) from error

  def get_state(self):
    return self._parent.get_state()

  def set_state(self, state):
    self._parent.set_state(state)


class _CountCorrupt:
  """Counts and names the corrupt examples, and ends a run with too many.

  It is the last step of the pipeline and runs in the main process, so it counts
  the examples that all worker processes skip. In a run of several processes,
  each process counts the examples in its own part of the batches, and compares
  their number with the share of the whole split. A resumed run counts from 0.
  """

  def __init__(self, source):
    self._source, self._why = source, {}
    for index in source.unreadable:
      self._add(index)

  def __call__(self, batch):
    corrupt_B = batch["corrupt"]
    for index in corrupt_B[corrupt_B >= 0].tolist():
      self._add(index)
    return {name: x for name, x in batch.items() if name != "corrupt"}

  def _add(self, index):
    if index in self._why:
      return
    self._why[index] = why = self._source.why_corrupt(index)
    count, most = len(self._why), self._source.max_corrupt
    if count > most:
      raise ValueError(
        f"{count} examples are corrupt, of {len(self._source)}; "
        f"config.data.max_corrupt_share allows {most}: "
        + "; ".join(self._why.values())
      )
    logging.warning("skipped (%d of at most %d): %s", count, most, why)


def _process():
  """(index, count) of this process. A worker process would not know them."""
  return jax.process_index(), jax.process_count()


def _own_rows(index, count, batch):
  """The rows of a batch that this process has."""
  share = len(next(iter(batch.values()))) // count
  rows = slice(index * share, (index + 1) * share)
  return {name: x[rows] for name, x in batch.items()}


def _start_worker(*_):
  """Makes a worker end when the main process ends, and not before."""
  # Ctrl-C reaches the workers too, but the main process may still need a batch.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  # A killed main process cannot stop its workers, so they watch it.
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
  """Chunks of indices, int64 (chunk,), with a new permutation in each epoch.

  grain's own shuffle is not used for two reasons. It costs 24 microseconds per
  index, more than all other work on a small image. And its order of seed s in
  epoch e is the order of seed s + 1 in epoch e - 1.
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
  """Chunks of 0, 1, 2, ...; `length` is rounded up to whole batches."""

  def __init__(self, length, chunk, batch_size):
    self._length = math.ceil(length / batch_size) * batch_size // chunk
    self._chunk = chunk

  def __len__(self):
    return self._length

  def __getitem__(self, i):
    return np.arange(i * self._chunk, (i + 1) * self._chunk)


class _Buckets:
  """The batch sizes of a source with buckets, which both orders share.

  A batch of the longest bucket has config.batch_size examples. A batch of a
  shorter bucket has floor(longest seconds / its seconds) times as many, so that
  every batch is about the same amount of work.
  """

  def __init__(self, source, config):
    seconds = config.data.bucket_seconds
    pairs = [
      # 1e-9 is for quotients like 0.3 / 0.1, which is a little less than 3.
      (indices, config.batch_size * int(seconds[-1] / max_seconds + 1e-9))
      for indices, max_seconds in zip(source.buckets, seconds, strict=True)
      if len(indices)
    ]
    if not pairs:
      corrupt = len(source.unreadable)
      raise ValueError(
        f"config.data.bucket_seconds={seconds!r}; no recording is left: of "
        f"{len(source)}, {corrupt} are corrupt and the others are longer"
      )
    self._buckets, self._sizes = zip(*pairs, strict=True)
    self._process = _process()

  def _share(self, indices):
    """The indices of a batch that this process reads."""
    index, count = self._process
    return indices[index::count]


class _ShuffledBuckets(_Buckets):
  """Whole batches of indices; the batches of all buckets are shuffled together.

  By the end of epoch e, bucket b has yielded floor((e + 1) len_b / size_b)
  batches. So each example comes once per epoch, except that examples which do
  not fill a batch move to the next epoch.
  """

  def __init__(self, source, config):
    super().__init__(source, config)
    self._seed = config.seed
    self._streams = [
      _Shuffled(len(indices), size, config.seed)
      for indices, size in zip(self._buckets, self._sizes, strict=True)
    ]

  def __len__(self):
    # max(self._sizes) epochs hold at least one batch.
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
    """The number of batches of each bucket before the epoch."""
    return [
      epoch * len(indices) // size
      for indices, size in zip(self._buckets, self._sizes, strict=True)
    ]

  def _first_batch(self, epoch):
    return sum(self._batches_before(epoch))


@functools.lru_cache(maxsize=2)
def _bucket_order(counts, seed, epoch):
  """The bucket of each batch of an epoch; bucket b has counts[b] batches."""
  order = np.repeat(np.arange(len(counts)), counts)
  # The 1 makes these random numbers differ from those that shuffle examples.
  return np.random.default_rng((seed, epoch, 1)).permutation(order)


class _BucketsInOrder(_Buckets):
  """Every example once, bucket by bucket; padding fills up each last batch.

  Padding is an index >= len(source), as in _evaluate.
  """

  def __init__(self, source, config):
    super().__init__(source, config)
    num_readable = len(source) - len(source.unreadable)
    if num_too_long := num_readable - sum(map(len, self._buckets)):
      raise ValueError(
        f"config.data.bucket_seconds={config.data.bucket_seconds!r}; "
        f"{num_too_long} of {len(source)} recordings to evaluate are longer: "
        "append a larger number"
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
