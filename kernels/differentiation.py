"""Forward and reverse mode, which all implementations share.

The forward pass saves only query, key, value and the operands. A weight depends
on its own logit alone, so the backward pass recomputes it without row
statistics. With problem.normalize the forward pass also saves the output and
the sum of each row; a policy of jax.checkpoint can keep both by the name
"attention".

jax.custom_vjp refuses forward mode, so there are three primitives:

  attention   the forward pass, whose derivative is the tangent
  tangent     the derivative along tangents of its inputs, in the portable
              form; linear in them, and its transpose is the pullback
  pullback    the backward pass, whose derivative is that of the portable form

JAX differentiates `attention` forwards and then transposes the tangent. It
reaches the fused backward pass because the tangent is a primitive with a
transpose of its own. The transpose of the portable form would not reach it.

The primitives of jax.experimental.hijax would take less code. But a program
that contains one is expanded again in Python at every call: a training step
with 300 arrays took 6 ms longer on a CPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from sigattn.kernels import batching_and_sharding, device, numerics
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
  result = _attention(_Call(passes, portable, problem), *arrays)
  return tuple(result) if problem.normalize else result[0]


@dataclasses.dataclass(frozen=True)
class _Call:
  """The parameters of a primitive.

  The arguments of all three begin with the arrays that are present: query, key,
  value and operands. If rows are normalised, the results of the forward pass
  follow in those of the tangent and the pullback.

  given: which of the arrays have tangents, or need cotangents.
  """

  passes: Passes
  portable: Passes
  problem: Problem
  given: tuple[bool, ...] = ()

  @property
  def names(self) -> list[str]:
    """The names of the arrays that are present."""
    shapes = self.problem.shapes._asdict().items()
    present = (name for name, shape in shapes if shape is not None)
    return ["query", "key", "value", *present]

  @property
  def results(self) -> tuple[str, ...]:
    """The axes of the results of the forward pass."""
    return ("BTNH", "BTN") if self.problem.normalize else ("BTNH",)

  @property
  def rows(self) -> tuple[str, ...]:
    """The axes of the results that the backward pass needs."""
    return self.results if self.problem.normalize else ()

  @property
  def wanted(self) -> list[str]:
    """The names of the arrays that are given."""
    return _chosen(self.names, self.given)

  def split(self, arguments: Sequence) -> tuple[Sequence, Sequence, Sequence]:
    """(arrays, rows, the rest)."""
    end = len(self.names)
    last = end + len(self.rows)
    return arguments[:end], arguments[end:last], arguments[last:]

  def inputs(self, arrays: Sequence) -> tuple:
    """(query, key, value, operands)."""
    query, key, value, *rest = arrays
    rest = iter(rest)
    shapes = self.problem.shapes
    operands = Operands(*(None if x is None else next(rest) for x in shapes))
    return query, key, value, operands


# What the primitives compute. `plain` is what JAX can differentiate.


def _forward(passes, call, arrays):
  results = passes.forward(call.problem, *call.inputs(arrays))
  return _marked(results, arrays)


def _compute_attention(call, *arrays):
  return _forward(call.passes, call, arrays)


def _compute_tangent(call, *arguments):
  arrays, _, tangents = call.split(arguments)

  def forward(*chosen):
    full = _with(arrays, call.given, chosen)
    return _forward(call.portable, call, full)

  return jax.jvp(forward, tuple(_chosen(arrays, call.given)), tangents)[1]


def _types_of_tangents(call, avals):
  query = avals[0]
  if not call.problem.normalize:
    return [query]

  def row(x):
    return x[..., 0].astype(numerics.wide(x.dtype))

  return [query, *jax.make_jaxpr(row)(query).out_avals]


def _backward(passes, call, arguments):
  arrays, rows, cotangents = call.split(arguments)
  trained = tuple(x for x in call.wanted if x in FLOATS)
  *found, operands = passes.backward(
    trained, call.problem, *call.inputs(arrays), rows, cotangents
  )
  found = dict(zip(("query", "key", "value"), found, strict=True))
  found |= operands._asdict()
  return _marked([found[name] for name in call.wanted], arrays)


def _compute_pullback(call, *arguments):
  return _backward(call.passes, call, arguments)


def _plain_pullback(call, *arguments):
  return _backward(call.portable, call, arguments)


# Their derivatives.


def _differentiate_attention(primals, tangents, call, body):
  del body
  results = _attention(call, *primals)
  results = [checkpoint_name(x, "attention") for x in results]
  given = tuple(not _is_zero(x) for x in tangents)
  if not any(given):
    zeros = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    return results, zeros
  rows = results if call.rows else ()
  call = dataclasses.replace(call, given=given)
  tangents = _chosen(tangents, given)
  return results, _tangent(call, *primals, *rows, *tangents)


def _transpose_tangent(cotangents, *arguments, call, body):
  del body
  arrays, rows, tangents = call.split(arguments)
  cotangents = map(ad.instantiate_zeros, cotangents)
  found = _pullback(call, *arrays, *rows, *cotangents)
  of_tangents = [
    gradient if ad.is_undefined_primal(x) else None
    for gradient, x in zip(found, tangents, strict=True)
  ]
  return [None] * (len(arrays) + len(rows)) + of_tangents


def _differentiate_plainly(function, plain, primals, tangents, call, body):
  """Differentiates what `plain` computes, along the tangents that are not 0."""
  del body
  given = [not _is_zero(x) for x in tangents]

  def of_given(*chosen):
    return plain(call, *_with(primals, given, chosen))

  along = jax.jvp(
    of_given, tuple(_chosen(primals, given)), tuple(_chosen(tangents, given))
  )[1]
  return function(call, *primals), along


def _is_zero(x):
  return isinstance(x, ad.Zero)


# The primitives.


@functools.lru_cache(maxsize=4096)
def _jit(compute, name, call, _):
  """compute(call, ...). The layers of a model share it: it is lowered once."""

  def run(*arguments):
    return compute(call, *arguments)

  run.__name__ = name
  return jax.jit(run)


class _Operation:
  """A primitive, called with a _Call and its arguments.

  The primitive has a jaxpr of what it computes, `body`, in which JAX looks for
  operations that it has to treat specially, such as those of kernels.

  Args:
    name: of the primitive.
    compute: (call, *arguments) -> the results.
    names: of the arguments of a call; after the arrays, their axes instead.
    types: (call, types of the arguments) -> types of the results. If it is
      given, there is no body, and `compute` runs only when it is compiled.
    apart: the names of arrays that need one result for each vmapped example.
    batches: (call, batches of the arguments) -> batches of the results. That of
      the gradient of an array that examples share is 1.
  """

  def __init__(
    self,
    name: str,
    compute: Callable[..., Sequence[jax.Array]],
    names: Callable[[_Call], list[str]],
    types: Callable[[_Call, Sequence], list] | None = None,
    apart: Callable[[_Call], Iterable[str]] = lambda call: (),
    batches: Callable[[_Call, list[int]], list[int]] = lambda call, _: (
      [call.problem.batch] * len(call.results)
    ),
  ):
    self.compute, self.names, self.types = compute, names, types
    self.apart, self.batches = apart, batches
    self.primitive = Primitive(f"sigattn_{name}")
    self.primitive.multiple_results = True
    self.primitive.def_impl(
      lambda *arguments, call, body: self._jitted(call)(*arguments)
    )
    self.primitive.def_abstract_eval(
      lambda *avals, call, body: body.out_avals if body else types(call, avals)
    )
    mlir.register_lowering(self.primitive, mlir.lower_fun(self._run))
    batching.primitive_batchers[self.primitive] = self._fold

  def __call__(self, call: _Call, *arguments: jax.Array) -> list[jax.Array]:
    """The results."""
    body = None
    if self.types is None:
      body = jax.make_jaxpr(self._jitted(call))(*map(jax.typeof, arguments))
    return self.primitive.bind(*arguments, call=call, body=body)

  def _run(self, *arguments, call, body):
    run = jaxpr_as_fun(body) if body else self._jitted(call)
    return run(*arguments)

  def _jitted(self, call):
    # A trace depends on the device, because each has kernels of its own.
    return _jit(self.compute, self.primitive.name, call, device.current())

  def _fold(self, arguments, dims, call, body):
    """The rule of vmap: folds the vmapped axis into the batch."""
    del body
    names = self.names(call)
    # Whether an operand needs a batch. A tangent has the shape of its operand,
    # so both need it if one of them does.
    whole = {}
    for name, dim in zip(names, dims, strict=True):
      whole[name] = whole.get(name, False) or dim is not None
    whole |= dict.fromkeys(self.apart(call), True)
    mapped = list(zip(arguments, dims, strict=True))
    size = next(x.shape[dim] for x, dim in mapped if dim is not None)
    batch = call.problem.batch
    folded = [
      batching_and_sharding.fold(name, x, dim, size, batch, whole[name])
      for name, (x, dim) in zip(names, mapped, strict=True)
    ]
    arrays, *_ = call.split(folded)
    problem = batching_and_sharding.resized(call.problem, *call.inputs(arrays))
    results = self(dataclasses.replace(call, problem=problem), *folded)
    own = self.batches(call, [x.shape[dim == 0] for x, dim in mapped])
    results = [
      batching_and_sharding.unfold(x, size, batch, of_one)
      for x, of_one in zip(results, own, strict=True)
    ]
    return results, [0] * len(results)


_attention = _Operation(
  "attention", _compute_attention, names=lambda call: call.names
)
_tangent = _Operation(
  "tangent",
  _compute_tangent,
  names=lambda call: [*call.names, *call.rows, *call.wanted],
  # The portable form is not even traced if the tangent is only transposed.
  types=_types_of_tangents,
)
_pullback = _Operation(
  "pullback",
  _compute_pullback,
  names=lambda call: [*call.names, *call.rows, *call.results],
  apart=lambda call: [x for x in call.wanted if x in FLOATS],
  batches=lambda call, found: _chosen(found[: len(call.names)], call.given),
)
ad.primitive_jvps[_attention.primitive] = _differentiate_attention
ad.primitive_jvps[_tangent.primitive] = functools.partial(
  _differentiate_plainly, _tangent, _compute_tangent
)
ad.primitive_jvps[_pullback.primitive] = functools.partial(
  _differentiate_plainly, _pullback, _plain_pullback
)
ad.primitive_transposes[_tangent.primitive] = _transpose_tangent


def _chosen(items: Iterable, given: Sequence[bool]) -> list:
  return [x for x, chosen in zip(items, given, strict=True) if chosen]


def _with(items, given, chosen):
  """The items; those that are given are replaced by `chosen`, in order."""
  chosen = iter(chosen)
  return [
    next(chosen) if x else y for x, y in zip(given, items, strict=True)
  ]  # fmt: skip


def _marked(results, arrays):
  return tuple(varying(x, arrays) for x in results)
