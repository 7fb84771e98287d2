"""Forward and reverse mode, which all implementations share.

The forward pass saves only query, key, value and the operands. A weight depends
on its own logit alone, so the backward pass recomputes it without row
statistics. With problem.normalize the forward pass also saves the output and
the sum of each row; a policy of jax.checkpoint can keep both by the name
"attention".

jax.custom_vjp refuses forward mode, so there are three primitives:

  _Attention   the forward pass, whose derivative is _Tangent
  _Tangent     the derivative along tangents of its inputs, in the portable
               form; linear in them, and its transpose is _Pullback
  _Pullback    the backward pass, whose derivative is that of the portable form

jax.checkpoint, jax.linearize and scans differentiate _Attention forwards and
then transpose the tangent. They reach the fused backward pass because the
tangent is a primitive with a transpose of its own. The transpose of the
portable form would not reach it.

jax.experimental.hijax may change with a release of jax. Only this module uses
it.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import hijax

from sigattn.kernels import batching_and_sharding, numerics
from sigattn.kernels.batching_and_sharding import varying
from sigattn.kernels.problem import FLOATS, Operands, Problem

_GRADIENTS = ("BTNH", "BSKH", "BSKH")


@dataclasses.dataclass(frozen=True)
class Sums:
  """Which sums of dz, the gradient of the logits, the backward pass returns.

  Each is float32, and none is a sum over examples. With problem.normalize and
  sigmoid, `rows` is the sum of -p^2 (inverse do v^T - shift) instead of dz, see
  numerics.row_share. If `paired` is set, it is the sum of dz, see `paired`.
  """

  rows: bool = False  # over the keys, (B, N, T)
  keys: bool = False  # over the queries, (B, N, S)
  slopes: bool = False  # of -dz distance over both, (B, N)
  paired: bool = False  # `rows` is the sum of dz for every kind

  @property
  def axes(self) -> tuple[str, ...]:
    """The axes of the sums that are returned, in their order."""
    all_axes = {"BNT": self.rows, "BNS": self.keys, "BN": self.slopes}
    return tuple(axes for axes, wanted in all_axes.items() if wanted)


@dataclasses.dataclass(frozen=True)
class Passes:
  """How attention and its gradients are computed.

  forward: (problem, query, key, value, operands) -> (out,), and with
    problem.normalize (out, sums): out = p v / s, and s, (B, T, N) float32.
  backward: (trained, problem, query, key, value, operands, rows, cotangents)
    -> (dq, dk, dv, operands). trained: the names of the operands whose
    gradients are needed. rows: the results of forward with problem.normalize,
    else (). cotangents: those of all results. The gradients have the shapes and
    dtypes of the inputs. They are None for operands that are not in `trained`.
  """

  forward: Callable[..., tuple[jax.Array, ...]]
  backward: Callable[..., tuple]


def of_kernels(
  forward: Callable[..., tuple[jax.Array, ...]],
  backward: Callable[..., tuple[jax.Array, ...]],
) -> Passes:
  """Passes that are made of kernels, which JAX can neither batch nor split.

  Args:
    forward: as in Passes.
    backward: (Sums, problem, query, key, value, operands, d_out, *rows) ->
      (dq, dk, dv), followed by the sums of dz that Sums names. The gradients of
      operands are computed from these. rows: with problem.normalize the
      results of forward and the cotangent of the second, see
      numerics.inverse_and_shift. Then dz = phi'(z) (inverse do v^T - shift),
      dv = (inverse p)^T do.
  """
  return Passes(
    _Function(_split_forward, forward), _Function(_split_backward, backward)
  )


@dataclasses.dataclass(frozen=True)
class _Function:
  """functools.partial(function, argument) that can be compared and hashed."""

  function: Callable
  argument: Any

  def __call__(self, *args):
    return self.function(self.argument, *args)


def _split_forward(forward, problem, *inputs):
  outputs = ("BTNH", "BTN") if problem.normalize else ("BTNH",)
  return batching_and_sharding.over_devices(forward, outputs, problem, *inputs)


def _split_backward(
  backward, trained, problem, query, key, value, operands, rows, cotangents
):
  wanted = _wanted(problem, trained)
  d_out, share = cotangents[0], None
  if problem.normalize:
    (_, sums), d_sums = rows, cotangents[1]
    rows = *rows, d_sums
    share = numerics.row_share(problem, sums, d_sums)
  results = batching_and_sharding.over_devices(
    functools.partial(backward, wanted), (*_GRADIENTS, *wanted.axes),
    problem, query, key, value, operands, d_out, *rows,
  )  # fmt: skip
  d_inputs, d_operands = results[:3], results[3:]
  found = dict(zip(wanted.axes, d_operands, strict=True))
  if share is not None and wanted.rows and not wanted.paired:
    found["BNT"] += share
  inputs = query, key, value
  return (
    *map(batching_and_sharding.cotangent, d_inputs, inputs),
    _operand_gradients(trained, operands, found),
  )


def paired(problem: Problem, trained: Container[str]) -> bool:
  """Whether the sums of dz over rows and over columns must fit each other.

  The gradient of a forget gate is a sum of differences between both, over all
  later tokens. In 16 bits each row of dz has an error, because `out` is
  rounded. It cancels in the differences only if both sums are of the same dz.
  If the more exact sum of a row were taken, the errors of all later rows would
  add up: after 1,024 tokens the gradient of the gate's bias would be wrong by
  13 %, instead of 0.3 %. A logit_bias needs the more exact sum, and so does a
  query's bias alone.

  trained: the names of the operands that are differentiated.
  """
  is_needed = "query_logit_bias" in trained and "logit_bias" not in trained
  return problem.paired and is_needed


def _wanted(problem, trained):
  """The Sums from which the gradients of the operands are computed."""
  # The sum of dz over all pairs uses the sums that are exact: see xla.py.
  of_all = "logit_bias" in trained
  return Sums(
    rows="query_logit_bias" in trained or (of_all and problem.normalize),
    keys="key_logit_bias" in trained or (of_all and not problem.normalize),
    slopes="alibi_slopes" in trained,
    paired=paired(problem, trained),
  )


def _operand_gradients(trained, operands, found):
  """The cotangents of the operands, from the sums by their axes."""
  of_all = found.get("BNT", found.get("BNS"))
  gradients = dict(
    logit_bias=None if of_all is None else of_all.sum(-1),
    alibi_slopes=found.get("BN"),
    query_logit_bias=found.get("BNT"),
    key_logit_bias=found.get("BNS"),
  )
  return Operands(**{
    name: batching_and_sharding.operand_cotangent(
      gradients[name], getattr(operands, name)
    )
    for name in trained
  })  # fmt: skip


def attention(
  passes: Passes,
  portable: Passes,
  problem: Problem,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  operands: Operands,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """(B, T, N, H) by `passes`, differentiable any number of times in both modes.

  With problem.normalize it returns a pair of that and the row sums, (B, T, N)
  float32. It works under jit, vmap and shard_map and on meshes, see
  batching_and_sharding.

  Args:
    passes: compute the results and the first derivative in reverse mode.
    portable: the same in plain JAX. They compute tangents, and whatever is
      differentiated a second time.
    problem, query, key, value, operands: as in xla.attention.
  """
  arrays = query, key, value, *(x for x in operands if x is not None)
  # In a shard_map some arrays may be the same on all devices and others not.
  # The primitives need all arrays to be of one sort. The transpose of this step
  # adds up the gradients of arrays that devices share.
  arrays = [varying(x, arrays) for x in arrays]
  avals = tuple(map(jax.typeof, arrays))
  result = _Attention(passes, portable, problem, avals)(*arrays)
  return result if problem.normalize else result[0]


def _inputs(problem, arrays):
  """(query, key, value, operands), from the arrays that are present."""
  query, key, value, *rest = arrays
  rest = iter(rest)
  shapes = problem.shapes
  operands = Operands(*(None if x is None else next(rest) for x in shapes))
  return query, key, value, operands


def _names(problem):
  """The names of the arrays that are present."""
  shapes = problem.shapes._asdict().items()
  return ["query", "key", "value", *(k for k, x in shapes if x is not None)]


def _result_avals(problem, avals):
  query = avals[0]
  if not problem.normalize:
    return (query,)

  def row(x):
    return x[..., 0].astype(numerics.wide(x.dtype))

  return query, *jax.make_jaxpr(row)(query).out_avals


def _name(results):
  return tuple(checkpoint_name(x, "attention") for x in results)


def _is_zero(x):
  return isinstance(x, hijax.Zero)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
  value: Any


class _Primitive(hijax.HiPrim):
  """What the three primitives have in common.

  Their arguments begin with the arrays that are present: query, key, value and
  operands. given: which of these have tangents, or need cotangents.

  A subclass has these methods:
    names    the names of its arguments; after the arrays, their axes instead
    results  the types of what it returns
    expand   computes the results
    plain    computes the results so that JAX can differentiate them
  """

  def __init__(self, passes, portable, problem, avals, given=()):
    self.params = dict(
      passes=passes, portable=portable, problem=problem, avals=avals,
      given=given,
    )  # fmt: skip
    self.problem, self.given = problem, given
    self.arrays = 3 + sum(x is not None for x in problem.shapes)
    self.in_avals = avals
    self.out_aval = self.results(avals)
    super().__init__()

  lin, linearized = hijax.linearize_from_jvp
  vjp_fwd, vjp_bwd_retval = hijax.vjp_from_jvp

  def jvp(self, primals, tangents):
    return self(*primals), _along(self.plain, primals, tangents)

  def batch(self, axis, args, dims):
    """Folds the vmapped axis into the batch."""
    if all(dim is None for dim in dims):
      return self(*args), (None,) * len(self.out_aval)
    names = self.names()
    # Whether an operand needs a batch. A tangent has the shape of its operand,
    # so both need it if one of them does.
    whole = {}
    for name, dim in zip(names, dims, strict=True):
      whole[name] = whole.get(name, False) or dim is not None
    whole |= dict.fromkeys(self.apart(), True)
    size, batch = axis.size, self.problem.batch
    folded = [
      batching_and_sharding.fold(
        name, x, dim, size, batch, whole[name]
      )
      for name, x, dim in zip(names, args, dims, strict=True)
    ]  # fmt: skip
    problem = batching_and_sharding.resized(
      self.problem, *_inputs(self.problem, folded[: self.arrays])
    )
    same = type(self)(
      self.passes, self.portable, problem, tuple(map(jax.typeof, folded)),
      self.given,
    )  # fmt: skip
    results = [
      batching_and_sharding.unfold(x, size, batch, aval)
      for x, aval in zip(same(*folded), self.out_aval, strict=True)
    ]
    return tuple(results), (0,) * len(results)

  def apart(self):
    """The names of arrays that need one result for each vmapped example."""
    return ()


class _Attention(_Primitive):
  def names(self):
    return _names(self.problem)

  def results(self, avals):
    return _result_avals(self.problem, avals)

  def expand(self, *arrays):
    results = self.passes.forward(self.problem, *_inputs(self.problem, arrays))
    return _marked(results, arrays)

  def jvp(self, primals, tangents):
    results = _name(self(*primals))
    given = tuple(not _is_zero(x) for x in tangents)
    if not any(given):
      return results, tuple(hijax.Zero(x) for x in self.out_aval)
    rows = results if self.problem.normalize else ()
    arguments = *primals, *rows, *(x for x in tangents if not _is_zero(x))
    tangent = _Tangent(
      self.passes, self.portable, self.problem,
      tuple(map(jax.typeof, arguments)), given,
    )  # fmt: skip
    return results, tangent(*arguments)

  # jax.grad takes this path. The path through the tangent would compute the
  # results once more.
  def vjp_fwd(self, given, *arrays):
    results = _name(self(*arrays))
    rows = results if self.problem.normalize else ()
    return results, (_Static(tuple(given)), arrays, rows)

  def vjp_bwd_retval(self, saved, cotangents):
    given, arrays, rows = saved
    found = iter(_pull_back(self, given.value, arrays, rows, cotangents))
    return tuple(
      next(found) if wanted else hijax.Zero(aval.to_ct_aval())
      for wanted, aval in zip(given.value, self.in_avals, strict=True)
    )


class _Tangent(_Primitive):
  """The derivative. Arguments: arrays, rows if normalised, given tangents."""

  def names(self):
    names = _names(self.problem)
    rows = ("BTNH", "BTN") if self.problem.normalize else ()
    return [*names, *rows, *_chosen(names, self.given)]

  def results(self, avals):
    return _result_avals(self.problem, avals)

  def plain(self, *arguments):
    arrays = arguments[: self.arrays]
    tangents = arguments[len(arguments) - sum(self.given) :]

    def forward(*chosen):
      full = _with(arrays, self.given, chosen)
      return _marked(
        self.portable.forward(self.problem, *_inputs(self.problem, full)), full
      )

    return jax.jvp(forward, _chosen(arrays, self.given), tuple(tangents))[1]

  expand = plain

  def transpose(self, cotangents, *arguments):
    count = len(arguments) - sum(self.given)
    arrays, rows = arguments[: self.arrays], arguments[self.arrays : count]
    found = _pull_back(self, self.given, arrays, rows, cotangents)
    for total, x in zip(arguments[count:], found, strict=True):
      if isinstance(total, hijax.GradAccum):
        total.accum(x)


class _Pullback(_Primitive):
  """The backward pass. Arguments: arrays, rows if normalised, cotangents."""

  def names(self):
    results = ("BTNH", "BTN") if self.problem.normalize else ("BTNH",)
    twice = 1 + self.problem.normalize
    return [*_names(self.problem), *results * twice]

  def apart(self):
    return [x for x in _chosen(_names(self.problem), self.given) if x in FLOATS]

  def results(self, avals):
    return tuple(_chosen(avals[: self.arrays], self.given))

  def run(self, passes, *arguments):
    arrays, rest = arguments[: self.arrays], arguments[self.arrays :]
    rows, cotangents = (), rest
    if self.problem.normalize:
      rows, cotangents = rest[:2], rest[2:]
    names = _chosen(_names(self.problem), self.given)
    trained = tuple(x for x in names if x in FLOATS)
    *found, operands = passes.backward(
      trained, self.problem, *_inputs(self.problem, arrays), rows, cotangents
    )
    found = dict(zip(("query", "key", "value"), found, strict=True))
    found |= operands._asdict()
    return _marked([found[name] for name in names], arrays)

  def expand(self, *arguments):
    return self.run(self.passes, *arguments)

  def plain(self, *arguments):
    return self.run(self.portable, *arguments)


def _pull_back(primitive, given, arrays, rows, cotangents):
  """The cotangents of the arrays that are given."""
  cotangents = [hijax.instantiate_zeros(x) for x in cotangents]
  arguments = *arrays, *rows, *cotangents
  return _Pullback(
    primitive.passes, primitive.portable, primitive.problem,
    tuple(map(jax.typeof, arguments)), given,
  )(*arguments)  # fmt: skip


def _along(function, primals, tangents):
  """The derivative of a function along the tangents that are not zero."""
  given = [not _is_zero(x) for x in tangents]

  def of_given(*chosen):
    return function(*_with(primals, given, chosen))

  return jax.jvp(of_given, _chosen(primals, given), _chosen(tangents, given))[1]


def _chosen(items: Sequence, given: Sequence[bool]) -> tuple:
  return tuple(x for x, chosen in zip(items, given, strict=True) if chosen)


def _with(items, given, chosen):
  """The items; those that are given are replaced by `chosen`, in order."""
  chosen = iter(chosen)
  return [
    next(chosen) if x else y for x, y in zip(given, items, strict=True)
  ]  # fmt: skip


def _marked(results, arrays):
  return tuple(varying(x, arrays) for x in results)
