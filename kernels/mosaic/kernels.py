"""The Hopper kernels of mosaic, in Pallas Mosaic GPU.

Two kernels, each of which keeps one side in shared memory and streams the
other past it:

  by_queries  a tile of queries stays, blocks of keys pass: out, or dq
  by_keys     a tile of keys stays, blocks of queries pass: dk and dv, and dq
              too where its parts may be added in any order

A program is a few compute warpgroups and one memory warpgroup, and works off
many tiles (a persistent grid: while one warpgroup stores its result, the others
compute, and the next tile's blocks are on their way).

  memory warpgroup:   wait free[slot] -> start the copy engine -> full[slot]
  compute warpgroup:  wait full[slot] -> products -> arrive free[slot]

Where dq is added, dz goes from each compute warpgroup to all by shared memory,
and the memory warpgroup fences it in between.

A tile sees a range of blocks. Those at its edges, where only part is visible,
come first and are masked; all others follow in a loop without a mask, and those
that nothing sees are neither loaded nor computed. Where dq is added one loop
takes all, one after the other. Sigmoid needs no order: the shares of blocks are
added.

Rows beyond a sequence's end are read as zeros, and zeros add nothing: to out
and dk, dq because v or k is zero there; to dv because do is.

Shapes: as in problem.py. rows: of a tile, what stays. block: what passes.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sigattn.kernels.mosaic import reduce, registers, tanh
from sigattn.kernels.mosaic.schedule import div, rem

_WGMMA = plgpu.Layout.WGMMA
_ROW, _COLUMN = _WGMMA.reduce(1), _WGMMA.reduce(0)  # one number a row, a column
_LOG2_E = math.log2(math.e)
_PART = 64  # keys whose values are started at once
_SHARE = reduce.SIDE  # queries and columns of dq that a warpgroup adds


@dataclasses.dataclass(frozen=True)
class Form:
  """What the kernels need to know of the mathematics."""

  kind: str
  exact: bool  # sigmoid by exp2 and a division; else by the hardware's tanh
  scale: float
  logit_bias: float | None  # None: in scalars
  alibi: bool
  left: int | None  # query i sees the keys i - left .. i + right
  right: int | None
  segments: bool
  offset: int  # S - T, by which ALiBi's distances are shifted
  weight_scale: float  # of weights rounded to 16 bits
  slope_scale: float  # of gradients of logits rounded to 16 bits

  @property
  def tanh(self):
    """Whether the weights are (1 + tanh(z / 2)) / 2, by the hardware's tanh."""
    return self.kind == "sigmoid" and not self.exact

  @property
  def output_unit(self):
    """How many times the weights the output is summed with: 1 + tanh is twice.

    Halving it would read more registers than adding 1 (tanh).
    """
    return 2.0 if self.tanh else 1.0

  @property
  def masked(self):
    return self.segments or self.left is not None or self.right is not None


def _int(x):
  return jnp.asarray(x, jnp.int32)


def visible_blocks(first, last, before, after, block, length):
  """(low, full_low, full_high, high): blocks that rows first..last see.

  A row i sees others from i - before to i + after (None: no bound), below
  length. Rows see some of the blocks low..high and all of full_low..full_high.
  At least one block, so that there is something to run.
  """
  count = pl.cdiv(length, block)
  low, full_low = _int(0), _int(0)
  high, full_high = _int(count), _int(count)
  if before is not None:
    low = jnp.minimum(div(jnp.maximum(first - before, 0), block), count - 1)
    full_low = div(jnp.maximum(last - before, 0) + block - 1, block)
  if after is not None:
    high = jnp.minimum(div(jnp.maximum(last + after, 0), block) + 1, count)
    full_high = jnp.where(
      first + after >= length - 1,
      count,
      div(jnp.maximum(first + after + 1, 0), block),
    )
  high = jnp.maximum(high, low + 1)
  full_low = jnp.clip(full_low, low, high)
  return low, full_low, jnp.clip(full_high, full_low, high), high


class _Steps:
  """The blocks of a tile in the order in which they pass.

  Masked ones come first: from the last one backwards, and then those at the
  lower edge.
  """

  def __init__(self, low, full_low, full_high, high):
    self._low, self._full_low, self._high = low, full_low, high
    self._upper = high - full_high
    self._edges = self._upper + full_low - low
    self.skipped = _int(0)  # of the first, which only other warpgroups need
    self.masked = self._edges
    self.count = high - low

  def skip_from(self, high):
    """Skips the blocks from `high` on, which pass first, and no others."""
    self.skipped = jnp.clip(self._high - high, 0, self._upper)

  def mask_from(self, full_high):
    """Masks no blocks below `full_high`, unless there is a lower edge."""
    upper = jnp.clip(self._high - full_high, 0, self._upper)
    one_edge = self._edges == self._upper
    self.masked = jnp.where(one_edge, upper, self._edges)

  def block(self, step):
    edge = jnp.where(
      step < self._upper, self._high - 1 - step, self._low + step - self._upper
    )
    return jnp.where(
      step < self._edges, edge, self._full_low + step - self._edges
    )


class _StepsInOrder:
  """The blocks of a tile one after the other, masked ones where they come."""

  def __init__(self, low, full_low, full_high, high):
    self._low, self._full_low, self._full_high = low, full_low, full_high
    self.count = high - low

  def block(self, step):
    return self._low + step

  def masked(self, step):
    block = self.block(step)
    return (block < self._full_low) | (block >= self._full_high)


def _visible_blocks(plan_ref, batch, tile, rows, before, after, block, length):
  """visible_blocks of a tile, from the plan where they depend on data."""
  if plan_ref is not None:
    return [plan_ref[batch, tile, i] for i in range(4)]
  first = tile * rows
  return visible_blocks(first, first + rows - 1, before, after, block, length)


# The mathematics of a block.


def _scalars(form, ref, batch, head):
  """(b, slope): numbers that a head shares."""
  bias, slope = form.logit_bias, None
  if bias is None:
    bias = ref[batch, head, 0]
  if form.alibi:
    slope = ref[batch, head, 1]
  return bias, slope


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a tile's rows and a block's columns stand in their sequences."""

  rows: jax.Array  # the first
  columns: jax.Array  # the first
  of_queries: bool  # the rows; else of keys

  def bounds(self, left, right):
    """(low, high): row + low <= column <= row + high is what a row sees.

    Where query - left <= key <= query + right; None: no bound.
    """
    if not self.of_queries:
      left, right = right, left  # Key - right <= query <= key + left.
    shift = self.rows - self.columns
    return (
      None if left is None else shift - left,
      None if right is None else shift + right,
    )

  def apart(self, offset):
    """|query + offset - key| is |row + apart - column|."""
    if not self.of_queries:
      offset = -offset
    return self.rows - self.columns + offset

  def side(self, form):
    """s where all that is visible has a distance of s (row + apart - column).

    None: not the same everywhere.
    """
    if form.right is None or form.right > form.offset:
      return None
    return 1.0 if self.of_queries else -1.0

  def sides(self, offset, shape):
    """(whether a block has both signs, the sign if it has one)."""
    apart = self.apart(offset)
    above, below = apart >= shape[1] - 1, apart <= 1 - shape[0]
    return ~(above | below), jnp.where(above, 1.0, -1.0)

  def distance(self, x, offset):
    """|query + offset - key|, float32, of the shape of x."""
    return registers.distance(x, self.apart(offset))


def _weights(
  form, s, bias, slope, place, load_ids, masked, paced=False, twice=False
):
  """The weights phi(z) of logits z = scale s + bias - slope distance, and phi'.

  phi' is a function, to be called only where it is needed. load_ids(): those of
  the rows and of the columns. masked: whether some may be hidden; a bool, or a
  traced one, on which the kernel branches. paced: tanh by tanh. twice:
  weights in Form.output_unit.
  """
  unit = 1.0
  if form.kind == "sigmoid":
    unit = -_LOG2_E if form.exact else 0.5

  def hide(x, hidden):
    if not form.masked or masked is False:
      return x

    # Before the activation: hiding the weights themselves lets the compiler
    # move work between the products, which then wait for each other.
    def cover(x):
      if form.left is not None or form.right is not None:
        low, high = place.bounds(form.left, form.right)
        x = registers.hide(x, low, high, hidden)
      if form.segments:
        row, column = load_ids()
        same = lax.broadcast_in_dim(row, x.shape, [0]) == lax.broadcast_in_dim(
          column, x.shape, [1]
        )
        x = jnp.where(same, x, hidden)
      return x

    return (
      cover(x) if masked is True else lax.cond(masked, cover, lambda x: x, x)
    )

  paced = paced and form.tanh and form.scale > 0
  scale, bias = unit * form.scale, unit * bias
  x = hide(s, -math.inf) if paced else s

  def activation(z):
    z = hide(z, -math.inf * unit)
    return jnp.tanh(z) if form.tanh else z

  def straight(_=None, sign=1.0):
    """With distances that are sign (row + apart - column), or no slope."""
    plane = ()
    if form.alibi:
      plane = -unit * sign * slope, place.apart(form.offset)
    if paced:
      return tanh.tanh(x, scale, bias, *plane)
    if form.alibi:
      return activation(x * scale + registers.plane(x, bias, *plane))
    return activation(x * scale + bias)

  def bent(_=None):
    far = place.distance(x, form.offset)
    z = x * scale + bias - (unit * slope) * far
    return jnp.tanh(z) if paced else activation(z)

  sign = place.side(form)
  if not form.alibi or sign is not None:
    z = straight(sign=sign)
  elif place.of_queries:
    both, sign = place.sides(form.offset, x.shape)
    z = lax.cond(both, bent, functools.partial(straight, sign=sign), None)
  else:
    z = bent()  # by_keys has no registers for a branch.
  if form.kind == "relu":
    return jnp.maximum(z, 0.0), lambda: jnp.where(z > 0, 1.0, 0.0)
  if form.kind == "relu2":
    p = jnp.maximum(z, 0.0)
    return p * p, lambda: 2 * p
  if form.tanh and twice:
    return 1 + z, None
  p = 0.5 * z + 0.5 if form.tanh else 1 / (1 + jnp.exp2(z))
  return p, lambda: p - p * p


def _at_step(index, step):
  """The index, in a form that no compiler computes before the loop of steps.

  It would compute the addresses of every slice that the products take, keep
  them in registers, and spill those.
  """
  return index + jnp.minimum(lax.optimization_barrier(step), 0)


def _round(x, factor, dtype):
  return (x if factor == 1 else x * factor).astype(dtype)


def _load_ids(form, ref, batch, start, count, layout):
  if not form.segments:
    return None
  rows = ref.at[batch, pl.ds(start, count)]
  return plgpu.load(rows, layout=layout, optimized=False)


class _Ring:
  """Room in shared memory for the blocks that pass, counted by steps."""

  def __init__(self, room, full, free, stages):
    self._room, self._full, self._free = room, full, free
    self._stages = stages

  def _slot(self, step):
    return rem(step, self._stages)

  def fill(self, step, source):
    """Memory warpgroup: starts to copy a block in, once its room is free."""
    slot = self._slot(step)

    @pl.when(step >= self._stages)
    def _():
      plgpu.barrier_wait(self._free.at[slot])

    plgpu.copy_gmem_to_smem(source, self._room.at[slot], self._full.at[slot])

  def drain(self, count):
    """Memory warpgroup: waits until the last blocks were used."""

    def last(step, _):
      plgpu.barrier_wait(self._free.at[self._slot(step)])

    lax.fori_loop(jnp.maximum(count - self._stages, 0), count, last, None)

  def wait(self, step):
    plgpu.barrier_wait(self._full.at[self._slot(step)])

  def block(self, step):
    return self._room.at[self._slot(step)]

  def release(self, step):
    plgpu.barrier_arrive(self._free.at[self._slot(step)])


def _accumulator(*shape):
  return plgpu.ACC(shape, jnp.float32)


def _read(accumulator, in_flight):
  """An accumulator, once at most `in_flight` later products are running."""
  value = plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)
  # Else what follows may move ahead of the wait.
  return lax.optimization_barrier(value)


def _store(value, room, destination):
  """Writes a tile through shared memory; the copy runs on."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # The copy before this.
  room[...] = value
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(room, destination)


# The queries stay.


def by_queries(
  form,
  tile,
  schedule,
  query,
  key,
  value,
  d_out=None,
  *,
  scale,
  scalars=None,
  plan=None,
  query_ids=None,
  key_ids=None,
  query_lengths=None,
):
  """scale p v, or with d_out scale dz k: the output, or the queries' gradient.

  query, d_out: (B, T, N, H). key, value: (B, S, K, H). scalars: (B, N, 2)
  float32. plan: (B, tiles, 4) int32, as visible_blocks gives, where that
  depends on data. query_ids, key_ids: (B, T or S, and the rest of a tile).
  query_lengths: (B,) int32; rows from there on are 0.
  """
  heads, width = query.shape[2:]
  group = heads // key.shape[2]
  rows = tile.rows * tile.warpgroups
  dtype = query.dtype
  given = dict(
    query=query, key=key, value=value, d_out=d_out, scalars=scalars, plan=plan,
    query_ids=query_ids, key_ids=key_ids, query_lengths=query_lengths,
    table=schedule.array(),
  )  # fmt: skip
  given = {name: x for name, x in given.items() if x is not None}

  def kernel(*refs):
    gmem = dict.fromkeys(_QUERY_ARRAYS)
    gmem |= zip(given, refs, strict=False)
    out_gmem, q_smem, do_smem, k_smem, v_smem, *barriers = refs[len(given) :]
    q_full, k_full, v_full, k_free, v_free = barriers
    ring_k = _Ring(k_smem, k_full, k_free, tile.stages)
    ring_v = _Ring(v_smem, v_full, v_free, tile.stages)
    warpgroup = lax.axis_index("warpgroup")
    tiles = schedule.count(gmem["table"])

    def locate(i):
      """(batch, head, first row, steps) of this program's i-th tile."""
      head, index = schedule.tile(gmem["table"], i)
      batch, head = div(head, heads), rem(head, heads)
      blocks = _visible_blocks(
        gmem["plan"], batch, index, rows, form.left, form.right, tile.block,
        key.shape[1],
      )  # fmt: skip
      return batch, head, index * rows, _Steps(*blocks)

    @pl.when(warpgroup < tile.warpgroups)
    def _():
      plgpu.set_max_registers(tile.registers, action="increase")

      def place(i):
        """Of a tile's queries, and of its output after them."""
        return rem(i, 2) * tile.warpgroups + warpgroup

      def load(i, name, room):
        """Of the i-th tile, if there is one."""

        @pl.when(i < tiles)
        def _():
          batch, head, first, _ = locate(i)
          at = batch, pl.ds(first + warpgroup * tile.rows, tile.rows), head
          plgpu.copy_gmem_to_smem(gmem[name].at[at], room, q_full.at[place(i)])

      def load_queries(i):
        load(i, "query", q_smem.at[place(i)])

      def load_d_out(i):
        if do_smem is not None:
          load(i, "d_out", do_smem.at[warpgroup])

      def one(i, count):
        batch, head, first, steps = locate(i)
        first += warpgroup * tile.rows
        *_, full_high, high = visible_blocks(
          first, first + tile.rows - 1, form.left, form.right, tile.block,
          key.shape[1],
        )  # fmt: skip
        steps.skip_from(high)
        if gmem["plan"] is None:  # Else more than positions may be masked.
          steps.mask_from(full_high)
        bias, slope = _scalars(form, gmem["scalars"], batch, head)
        row_ids = _load_ids(
          form, gmem["query_ids"], batch, first, tile.rows, _ROW
        )

        def weigh(s, step, masked, column=0):
          start = steps.block(step) * tile.block + column
          place = _Place(first, start, of_queries=True)

          def load_ids():
            return row_ids, _load_ids(
              form, gmem["key_ids"], batch, start, s.shape[1], _COLUMN
            )

          return _weights(
            form, s, bias, slope, place, load_ids, masked,
            paced=tile.paced, twice=d_out is None,
          )  # fmt: skip

        room = q_smem.at[place(i)]

        def body(accumulator):
          plgpu.barrier_wait(q_full.at[place(i)])
          # The last tile's output lies where the next one's queries will.
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          load_queries(i + 1)
          common = form, tile, dtype, ring_k, ring_v, count, steps, weigh, room
          if d_out is None:
            _output(*common, accumulator)
          else:
            _query_gradient(*common, do_smem.at[warpgroup], accumulator)
          load_d_out(i + 1)
          return accumulator[...]

        out = pl.run_scoped(body, _accumulator(tile.rows, width))
        out = out if scale == 1 else out * scale
        if query_lengths is not None:
          row = plgpu.broadcasted_iota(jnp.int32, out.shape, 0, layout=_WGMMA)
          left = gmem["query_lengths"][batch] - first
          out = jnp.where(row < left, out, 0.0)
        _store(
          out.astype(dtype),
          room,
          out_gmem.at[batch, pl.ds(first, tile.rows), head],
        )
        return count + steps.count

      load_queries(_int(0))
      load_d_out(_int(0))
      lax.fori_loop(0, tiles, one, _int(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tile.warpgroups)
    def _():
      plgpu.set_max_registers(24, action="decrease")

      def one(i, count):
        batch, head, _, steps = locate(i)

        def step(e, _):
          at = batch, pl.ds(steps.block(e) * tile.block, tile.block)
          at = *at, div(head, group)
          ring_k.fill(count + e, gmem["key"].at[at])
          ring_v.fill(count + e, gmem["value"].at[at])

        lax.fori_loop(0, steps.count, step, None)
        return count + steps.count

      count = lax.fori_loop(0, tiles, one, _int(0))
      ring_k.drain(count)
      ring_v.drain(count)

  stay, stay_twice = (
    _tiles_in_smem(tile, count * tile.warpgroups, tile.rows, width, dtype)
    for count in (1, 2)
  )
  pass_by = _tiles_in_smem(tile, tile.stages, tile.block, width, dtype)
  return _launch(
    kernel, schedule, tile, [query.shape], dtype,
    [
      stay_twice, None if d_out is None else stay, pass_by, pass_by,
      plgpu.Barrier(
        num_barriers=2 * tile.warpgroups,
        num_arrivals=1 if d_out is None else 2,
      ),
      *[plgpu.Barrier(num_barriers=tile.stages)] * 2,
      *[plgpu.Barrier(
        num_barriers=tile.stages, num_arrivals=tile.warpgroups
      )] * 2,
    ],
  )(*given.values())  # fmt: skip


_QUERY_ARRAYS = (
  "query", "key", "value", "d_out", "scalars", "plan", "query_ids", "key_ids",
  "query_lengths", "table",
)  # fmt: skip


def _output(
  form, tile, dtype, ring_k, ring_v, count, steps, weigh, queries, accumulator
):
  """Adds p v of all blocks.

  With tile.overlap the scores of step e and the values of step e - 1 are
  started together, and only the scores are waited for before the weights of
  step e. In the machine code the other wait comes ahead of the weights too
  (benchmarks/NOTES.md): what is left is one round of products a step.
  """
  shape = tile.rows, tile.block
  part = _PART if tile.block % _PART == 0 else tile.block

  def scores(e, ref):
    plgpu.wgmma(ref, queries, ring_k.block(count + e).transpose((1, 0)))

  def read(e, ref, in_flight):
    s = _read(ref, in_flight)
    ring_k.release(count + e)
    return s

  def weights(e, s, masked, column=0):
    p, _ = weigh(s, e, masked, column)
    return _round(p, form.weight_scale, dtype)

  def values(e, p):
    plgpu.wgmma(accumulator, p, ring_v.block(count + e))

  def finish(e):
    plgpu.wgmma_wait(0)
    ring_v.release(count + e)

  def alone(e):
    """The scores of a step, with nothing else running."""

    def run(ref):
      scores(e, ref)
      return read(e, ref, 0)

    ring_k.wait(count + e)
    return pl.run_scoped(run, _accumulator(*shape))

  def step(e, _, masked):
    """The products of the first keys run during the activation of the next."""
    s = alone(e)
    ring_v.wait(count + e)
    for start in range(0, tile.block, part):
      p = weights(e, s[:, start : start + part], masked, start)
      block = ring_v.block(count + e).at[pl.ds(start, part)]
      plgpu.wgmma(accumulator, p, block)
    finish(e)

  def overlapping(e, p):
    def run(ref):
      scores(e, ref)
      values(e - 1, p)
      next_p = weights(e, read(e, ref, 1), False)
      finish(e - 1)
      return next_p

    ring_k.wait(count + e)
    ring_v.wait(count + e - 1)
    return pl.run_scoped(run, _accumulator(*shape))

  if not tile.overlap:
    _loops(form, steps, step, skip=_skip(ring_k, ring_v, count))
    return
  first = _int(0)
  if form.masked:  # All masked steps but one, which opens the chain.
    first = jnp.maximum(steps.masked - 1, 0)
    lax.fori_loop(0, first, functools.partial(step, masked=True), None)
  p = weights(first, alone(first), True)
  p = lax.fori_loop(first + 1, steps.count, overlapping, p)
  last = steps.count - 1
  ring_v.wait(count + last)
  values(last, p)
  finish(last)


def _query_gradient(
  form, tile, dtype, ring_k, ring_v, count, steps, weigh, queries, d_out,
  accumulator,
):  # fmt: skip
  """Adds dz k of all blocks, dz = phi'(z) (do v^T)."""

  def step(e, _, masked):
    c = count + e

    def run(s_ref, dp_ref):
      plgpu.wgmma(s_ref, queries, ring_k.block(c).transpose((1, 0)))
      plgpu.wgmma(dp_ref, d_out, ring_v.block(c).transpose((1, 0)))
      _, slope = weigh(_read(s_ref, 1), e, masked)
      dz = slope() * _read(dp_ref, 0)
      ring_v.release(c)
      return _round(dz, form.slope_scale, dtype)

    ring_k.wait(c)
    ring_v.wait(c)
    shape = _accumulator(tile.rows, tile.block)
    dz = pl.run_scoped(run, shape, shape)
    plgpu.wgmma(accumulator, dz, ring_k.block(c))
    plgpu.wgmma_wait(0)
    ring_k.release(c)

  _loops(form, steps, step, skip=_skip(ring_k, ring_v, count))


def _skip(ring_k, ring_v, count):
  """A step in which the blocks only pass."""

  def skip(e, _):
    for ring in (ring_k, ring_v):
      ring.wait(count + e)
      ring.release(count + e)

  return skip


def _loops(form, steps, step, carry=None, skip=None):
  """carry = step(e, carry, masked) of all steps: with a mask, then without.

  skip(e, None): for the first steps.skipped, which another warpgroup needs.
  """
  begin = full = _int(0)
  if form.masked:
    full = steps.masked
    if skip is not None:
      lax.fori_loop(begin, steps.skipped, skip, None)
      begin = steps.skipped
    carry = lax.fori_loop(
      begin, full, functools.partial(step, masked=True), carry
    )
  return lax.fori_loop(
    full, steps.count, functools.partial(step, masked=False), carry
  )


def _tiles_in_smem(tile, count, rows, width, dtype):
  """Room for `count` tiles, laid out for the tensor cores and copy engine."""
  bits = jnp.finfo(dtype).bits
  # Products take as many rows of a block at once as the swizzle is wide.
  swizzle = plgpu.find_swizzle(math.gcd(width, tile.block) * bits)
  return plgpu.SMEM(
    (count, rows, width),
    dtype,
    transforms=(
      plgpu.TilingTransform((8, 8 * swizzle // bits)),
      plgpu.SwizzleTransform(swizzle),
    ),
  )


def _launch(
  kernel, schedule, tile, shapes, dtype, scratch, *floats, barriers=True
):
  """The kernel as a function; outputs of dtype, and `floats` float32."""
  out = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  out += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in floats]
  return plgpu.kernel(
    kernel,
    out_type=out,
    grid=(schedule.programs,),
    grid_names=("program",),
    num_threads=tile.warpgroups + 1,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      unsafe_no_auto_barriers=not barriers,
      reduction_scratch_bytes=0,  # Sums over rows stay in a warp.
    ),
  )


# The keys stay.


def by_keys(
  form,
  tile,
  schedule,
  query,
  key,
  value,
  d_out,
  *,
  scales,
  adds_dq=False,
  sums=False,
  scalars=None,
  plan=None,
  query_ids=None,
  key_ids=None,
  key_lengths=None,
):
  """[dq, dk, dv, and with `sums` those of dz]: dz^T q and p^T do by `scales`.

  scales: of those of dk ("key") and dv ("value") that are wanted.

  adds_dq: whether dz k is added to sums of reduce, in the order in which
  programs come to them. Without it the result has no dq.
  sums: of dz over the queries, and of -dz distance with ALiBi: float32 (1 or 2,
  B, N, S and the rest of a tile).
  key_lengths: (B,) int32; rows of dv from there on are 0.
  The rest is as in by_queries.
  """
  heads, width = query.shape[2:]
  kv_heads = key.shape[2]
  group = heads // kv_heads
  rows = tile.rows * tile.warpgroups
  dtype = query.dtype
  given = dict(
    query=query, key=key, value=value, d_out=d_out,
    d_query=_zeros_of_dq(query, tile) if adds_dq else None,
    scalars=scalars, plan=plan, query_ids=query_ids, key_ids=key_ids,
    key_lengths=key_lengths, table=schedule.array(),
  )  # fmt: skip
  given = {name: x for name, x in given.items() if x is not None}
  num_sums = (1 + form.alibi) if sums else 0
  fused = adds_dq
  behind = tile.stages - 1

  def kernel(*refs):
    gmem = dict.fromkeys(_KEY_ARRAYS)
    gmem |= zip(given, refs, strict=False)
    refs = refs[len(given) :]
    found_gmem = refs[: len(scales)]
    sums_gmem = refs[len(scales)] if sums else None
    (
      k_smem, v_smem, q_smem, do_smem, dz_smem, out_smem, sums_smem,
      kv_full, kv_free, q_full, do_full, q_free, do_free, dz_written, dz_ready,
    ) = refs[len(scales) + sums :]  # fmt: skip
    ring_q = _Ring(q_smem, q_full, q_free, tile.stages)
    ring_do = _Ring(do_smem, do_full, do_free, tile.stages)
    warpgroup = lax.axis_index("warpgroup")
    tiles = schedule.count(gmem["table"])

    def locate(i):
      """(batch, key head, first row, steps) of this program's i-th tile."""
      head, index = schedule.tile(gmem["table"], i)
      batch, head = div(head, kv_heads), rem(head, kv_heads)
      blocks = _visible_blocks(
        gmem["plan"], batch, index, rows, form.right, form.left, tile.block,
        query.shape[1],
      )  # fmt: skip
      steps = _StepsInOrder(*blocks) if fused else _Steps(*blocks)
      return batch, head, index * rows, steps

    @pl.when(warpgroup < tile.warpgroups)
    def _():
      plgpu.set_max_registers(tile.registers, action="increase")
      keys, values = k_smem.at[warpgroup], v_smem.at[warpgroup]
      # This warpgroup's share of a block's dq, one of `tile.warpgroups`: which
      # 64 of its rows, and which of its columns.
      share_row, share_column = _int(0), warpgroup
      if tile.block > _SHARE:
        share_row, share_column = share_column, share_row

      def one(i, count):
        batch, kv_head, first, steps = locate(i)
        first += warpgroup * tile.rows
        row_ids = _load_ids(
          form, gmem["key_ids"], batch, first, tile.rows, _ROW
        )

        def one_head(g, dk, dv):
          head = kv_head * group + g
          bias, slope = _scalars(form, gmem["scalars"], batch, head)

          def weigh(s, e, masked):
            start = steps.block(e) * tile.block
            place = _Place(first, start, of_queries=False)

            def load_ids():
              return row_ids, _load_ids(
                form, gmem["query_ids"], batch, start, tile.block, _COLUMN
              )

            found = _weights(form, s, bias, slope, place, load_ids, masked)
            return *found, place

          def gradient_of_logits(e, totals, masked):
            """(dz of a step or None, totals), with dv's product running."""
            c = count + g * steps.count + e
            q, do = ring_q.block(c), ring_do.block(c)
            here = _at_step(warpgroup, c)
            keys, values = k_smem.at[here], v_smem.at[here]

            def start(s_ref):
              plgpu.wgmma(s_ref, keys, q.transpose((1, 0)))
              return pl.run_scoped(
                functools.partial(finish, s_ref), None if dk is None else logits
              )

            def finish(s_ref, dp_ref):
              if dp_ref is not None:
                plgpu.wgmma(dp_ref, values, do.transpose((1, 0)))
              s = _read(s_ref, int(dk is not None))
              p, derivative, place = weigh(s, e, masked)
              if dv is not None:
                plgpu.wgmma(dv, _round(p, form.weight_scale, dtype), do)
              if dp_ref is None:
                return None, totals
              dz = derivative() * _read(dp_ref, int(dv is not None))
              if not sums:
                return dz, totals
              found = [dz.sum(1)]
              if form.alibi:
                found.append(-(dz * place.distance(dz, form.offset)).sum(1))
              return dz, [t + x for t, x in zip(totals, found, strict=True)]

            ring_q.wait(c)
            ring_do.wait(c)
            logits = _accumulator(tile.rows, tile.block)
            return pl.run_scoped(start, logits)

          def step(e, totals, masked):
            c = count + g * steps.count + e
            dz, totals = gradient_of_logits(e, totals, masked)
            if dz is not None:
              dz = _round(dz, form.slope_scale, dtype)
              plgpu.wgmma(dk, dz, ring_q.block(c))
            plgpu.wgmma_wait(0)
            ring_do.release(c)
            ring_q.release(c)
            return totals

          def sharing_step(e, totals, opens=False):
            """A step that also adds the dq of the step before, if there is one.

            So none waits for dz of the step itself: the warpgroups keep half a
            step apart, and one's products run while the other computes weights.

            One loop, with and without masks: between two the compiler moves dk
            and dv to other registers, and runs out of them. Positions are
            compared in every block, mostly hidden behind the products; ids are
            loaded only where they are needed.
            """
            masked = steps.masked(e) if form.segments else form.masked
            c = count + g * steps.count + e
            dz, totals = gradient_of_logits(e, totals, masked)
            hand_over = functools.partial(end_step, c, dz)
            if opens:
              hand_over(None)
            else:
              plgpu.barrier_wait(dz_ready)
              dq = pl.run_scoped(hand_over, _accumulator(_SHARE, _SHARE))
              add_share(dq, e - 1)
            plgpu.wgmma_wait(0)
            ring_q.release(c)
            return totals

          def end_step(c, dz, share_ref):
            """Starts dk's product and hands dz to the other warpgroups.

            Returns this one's share of dq of the step before, with dk's product
            running.
            """
            dz = _round(dz, form.slope_scale, dtype)
            if share_ref is not None:
              start_share(share_ref, c - 1)
            # Two rooms for dz: that of the step before is being read.
            dz_smem.at[rem(c, 2) * tile.warpgroups + warpgroup][...] = dz
            plgpu.wgmma(dk, dz, ring_q.block(c))
            dq = None
            if share_ref is None:
              plgpu.wgmma_wait(1)
            else:
              dq = _read(share_ref, 1)
            ring_do.release(c)
            plgpu.barrier_arrive(dz_written)
            return dq

          def start_share(ref, c):
            """Starts the products of this warpgroup's share of dq."""
            room = rem(c, 2) * tile.warpgroups
            of_block = pl.ds(share_row * _SHARE, _SHARE)
            of_width = pl.ds(share_column * _SHARE, _SHARE)
            for other in range(tile.warpgroups):
              plgpu.wgmma(
                ref,
                dz_smem.at[room + other, :, of_block].transpose((1, 0)),
                k_smem.at[_at_step(other, c), :, of_width],
              )

          def add_share(dq, e):
            row = steps.block(e) * (tile.block // _SHARE) + share_row
            reduce.add(dq, gmem["d_query"].at[batch, head, row, share_column])

          def last_share():
            def run(ref):
              start_share(ref, count + (g + 1) * steps.count - 1)
              return _read(ref, 0)

            plgpu.barrier_wait(dz_ready)
            dq = pl.run_scoped(run, _accumulator(_SHARE, _SHARE))
            add_share(dq, steps.count - 1)

          zeros = plgpu.layout_cast(jnp.zeros((tile.rows,), jnp.float32), _ROW)
          totals = [zeros] * num_sums
          if not fused:
            totals = _loops(form, steps, step, totals)
          else:
            totals = sharing_step(_int(0), totals, opens=True)
            totals = lax.fori_loop(1, steps.count, sharing_step, totals)
            last_share()
          for index, total in enumerate(totals):
            _store(
              total,
              sums_smem.at[warpgroup, index],
              sums_gmem.at[index, batch, head, pl.ds(first, tile.rows)],
            )

        def body(dk, dv):
          plgpu.barrier_wait(kv_full.at[warpgroup])
          if group == 1:
            one_head(_int(0), dk, dv)
          else:
            pl.loop(0, group)(lambda g: one_head(g, dk, dv))
          return [None if x is None else x[...] for x in (dk, dv)]

        shape = _accumulator(tile.rows, width)
        dk, dv = pl.run_scoped(
          body, *(shape if x in scales else None for x in ("key", "value"))
        )
        if key_lengths is not None and dv is not None:
          row = plgpu.broadcasted_iota(jnp.int32, dv.shape, 0, layout=_WGMMA)
          left = gmem["key_lengths"][batch] - first
          dv = jnp.where(row < left, dv, 0.0)
        if fused:
          plgpu.barrier_arrive(kv_free)
        at = batch, pl.ds(first, tile.rows), kv_head
        found = {"key": (dk, keys), "value": (dv, values)}
        for out, (name, scale) in zip(found_gmem, scales.items(), strict=True):
          value, room = found[name]
          if fused:
            room = out_smem.at[warpgroup]
          _store((value * scale).astype(dtype), room, out.at[at])
        if not fused:
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          plgpu.barrier_arrive(kv_free)
        return count + group * steps.count

      lax.fori_loop(0, tiles, one, _int(0))
      plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tile.warpgroups)
    def _():
      plgpu.set_max_registers(24, action="decrease")

      def publish_dz(*_):
        """Makes dz of a step visible to the tensor cores.

        Not by those who wrote it: they would wait at the fence until what they
        added to dq has arrived in memory.
        """
        plgpu.barrier_wait(dz_written)
        plgpu.commit_smem()
        plgpu.barrier_arrive(dz_ready)

      def one(i, count):
        batch, kv_head, first, steps = locate(i)

        def fill(x):
          g, e = lax.div(x, steps.count), lax.rem(x, steps.count)
          at = batch, pl.ds(steps.block(e) * tile.block, tile.block)
          at = *at, kv_head * group + g
          ring_q.fill(count + x, gmem["query"].at[at])
          ring_do.fill(count + x, gmem["d_out"].at[at])

        def step(x, _):
          fill(x)
          if fused:  # The step whose end the next copies wait for.
            pl.when(x >= behind)(publish_dz)

        fill(_int(0))  # While the tile before ends.

        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(kv_free)

        for n in range(tile.warpgroups):
          at = batch, pl.ds(first + n * tile.rows, tile.rows), kv_head
          for name, room in (("key", k_smem), ("value", v_smem)):
            plgpu.copy_gmem_to_smem(
              gmem[name].at[at], room.at[n], kv_full.at[n]
            )
        lax.fori_loop(1, group * steps.count, step, None)
        if fused:
          rest = jnp.minimum(behind, group * steps.count)
          lax.fori_loop(0, rest, publish_dz, None)
        return count + group * steps.count

      count = lax.fori_loop(0, tiles, one, _int(0))
      plgpu.barrier_wait(kv_free)
      ring_q.drain(count)
      ring_do.drain(count)

  stay = _tiles_in_smem(tile, tile.warpgroups, tile.rows, width, dtype)
  pass_by = _tiles_in_smem(tile, tile.stages, tile.block, width, dtype)
  free = plgpu.Barrier(num_barriers=tile.stages, num_arrivals=tile.warpgroups)
  full = plgpu.Barrier(num_barriers=tile.stages)
  by_all = plgpu.Barrier(num_arrivals=tile.warpgroups)
  padded = pl.cdiv(key.shape[1], rows) * rows
  dz_room = _tiles_in_smem(
    tile, 2 * tile.warpgroups, tile.rows, tile.block, dtype
  )
  floats = [(num_sums, query.shape[0], heads, padded)] * sums
  run = _launch(
    kernel, schedule, tile, [key.shape] * len(scales), dtype,
    [
      stay, stay, pass_by, pass_by,
      dz_room if fused else None,
      stay if fused else None,
      plgpu.SMEM((tile.warpgroups, num_sums, tile.rows), jnp.float32)
      if sums else None,
      plgpu.Barrier(num_barriers=tile.warpgroups, num_arrivals=2),
      by_all, full, full, free, free, by_all, plgpu.Barrier(),
    ],
    *floats,
    barriers=not fused,  # dz is written and awaited by barriers of its own.
  )  # fmt: skip
  if not fused:
    return run(*given.values())
  outs = [lax.empty(key.shape, dtype)] * len(scales)
  outs += [lax.empty(shape, jnp.float32) for shape in floats]
  return _with_state(run, given, "d_query", outs)


def _zeros_of_dq(query, tile):
  # Blocks may reach beyond the sequence.
  batch, length, heads, width = query.shape
  length = pl.cdiv(length, tile.block) * tile.block
  return reduce.zeros(batch, length, heads, width)


def _with_state(run, given, name, outs):
  """[given[name] after run(*given.values()) has changed it, *its results].

  outs: arrays of the results' shapes and dtypes. XLA sees one call that returns
  all of them, with given[name] in the place of its first value. A mutable array
  (jax.new_ref) would do the same, but custom_partitioning refuses the effects
  of one, so that no mesh of several devices could run it.
  """

  def body(refs):
    state_ref, out_refs = refs
    found = run(*(given | {name: state_ref}).values())
    for ref, x in zip(out_refs, found, strict=True):
      ref[...] = x

  state, outs = pl.run_state(body)((given[name], outs))
  return [state, *outs]


_KEY_ARRAYS = (
  "query", "key", "value", "d_out", "d_query", "scalars", "plan", "query_ids",
  "key_ids", "key_lengths", "table",
)  # fmt: skip
