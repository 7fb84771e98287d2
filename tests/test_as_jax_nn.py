"""Compares random calls of kind="softmax" with jax.nn.

Results, gradients and errors must be the same. docs/jax_nn.md lists where the
two differ, and why. LISTED has the same cases.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn.attention import dot_product_attention

# (B, T, S, N, K, H). There are few, because each needs its own programs.
SHAPES = [(2, 3, 5, 4, 2, 4), (1, 4, 4, 2, 2, 4)]
EMPTY = [(0, 3, 3, 2, 2, 4), (2, 0, 3, 2, 1, 4), (2, 3, 0, 2, 2, 4)]
DRAWS, BATCHES = 60, 6

# Arguments that one of the two refuses: (arguments, whether ours accepts them).
LISTED = [
  (dict(local_window_size=(None, 1)), True),
  (dict(local_window_size=np.int64(1)), True),
  (dict(local_window_size=2**31), True),
  (dict(local_window_size=(1.5, 1)), False),
  (dict(local_window_size=(-1, 2)), False),
  (dict(local_window_size=True), False),
  (dict(scale=float("nan")), False),
  (dict(scale=float("inf")), False),
  (dict(scale="1"), False),
  (dict(is_causal="no"), False),
  (dict(return_residual=1), False),
  (dict(bias=np.ones((2, 1, 3, 5), bool)), False),
  (dict(bias=np.ones((2, 1, 3, 5), complex)), False),
  (dict(query=np.ones((2, 3, 4, 4), int), key=np.ones((2, 5, 2, 4), int),
        value=np.ones((2, 5, 2, 4), int)), False),
  (dict(query=np.ones((2, 3, 4, 0)), key=np.ones((2, 5, 2, 0)),
        value=np.ones((2, 5, 2, 0))), False),
  (dict(key_value_seq_lengths=np.array([3, 4], np.uint8)), True),
  (dict(key_value_seq_lengths=np.array([3, 2**32 + 4])), False),
  (dict(key_value_seq_lengths=np.array([3, 6])), False),
  (dict(query_seq_lengths=np.array([3, -1])), False),
]  # fmt: skip


def draw_arrays(rng, shape, dtype):
  b, t, s, n, k, h = shape
  sizes = dict(query=(b, t, n, h), key=(b, s, k, h), value=(b, s, k, h))
  return {
    name: jnp.asarray(rng.standard_normal(size), dtype)
    for name, size in sizes.items()
  }


def draw_broadcast(rng, full):
  """A shape that broadcasts to `full`, sometimes without its first axes."""
  kept = [(1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 1, 1)][rng.integers(3)]
  shape = tuple(n if keep else 1 for n, keep in zip(full, kept, strict=True))
  return shape[1:] if shape[0] == 1 and rng.random() < 0.5 else shape


def draw_options(rng, shape):
  b, t, s, n, _, _ = shape
  logits = b, n, t, s
  options = {}
  if rng.random() < 0.5:
    dtype = rng.choice(["float32", "float32", "bfloat16", "int32"])
    bias = 3 * rng.standard_normal(draw_broadcast(rng, logits))
    options["bias"] = jnp.asarray(bias).astype(dtype)
  if rng.random() < 0.5:
    options["mask"] = jnp.asarray(rng.random(draw_broadcast(rng, logits)) < 0.7)
  if rng.random() < 0.5:
    number = float(rng.uniform(-1, 2))
    kind = rng.choice(["float", "numpy", "array", "traced", "zero", "int"])
    options["scale"] = {
      "float": number, "numpy": np.float32(number), "int": 2, "zero": 0.0,
      "array": jnp.float32(number), "traced": jnp.float32(number),
    }[kind]  # fmt: skip
    options["traced"] = kind == "traced"
  if rng.random() < 0.4:
    options["is_causal"] = True
  for name, length in (
    ("query_seq_lengths", t), ("key_value_seq_lengths", s),
  ):  # fmt: skip
    if rng.random() < 0.3:
      lengths = rng.integers(0, length + 1, b)
      options[name] = lengths if rng.random() < 0.5 else jnp.asarray(lengths)
  if rng.random() < 0.4:
    pair = int(rng.integers(0, 4)), int(rng.integers(0, 4))
    options["local_window_size"] = pair if rng.random() < 0.7 else pair[0]
  if rng.random() < 0.2:
    options["return_residual"] = True
  return options


def spoil(rng, arguments, shape):
  """Arguments that both refuse."""
  b, t, s, n, k, h = shape
  value, query = arguments["value"], arguments["query"]
  wrong = [
    dict(mask=jnp.ones((b, 1, t, s))),
    dict(mask=jnp.ones((b, n + 1, t, s), bool)),
    dict(bias=jnp.ones((b, n + 1, t, s))),
    dict(bias=jnp.ones((b, n, t + 1, s + 2))),
    dict(bias=jnp.ones((b + 1, n, t, s))),
    dict(bias=jnp.ones((1, b, n, t, s))),
    dict(query_seq_lengths=jnp.ones(b + 1, jnp.int32)),
    dict(key_value_seq_lengths=jnp.ones(b)),
    dict(query_seq_lengths=jnp.ones((b, 1), jnp.int32)),
    dict(value=value[:, :-1]),
    dict(value=value[..., :-1]),
    dict(value=value.astype("float64" if value.dtype != "float32" else "int8")),
    dict(query=query[..., :-1]),
    dict(query=query[0, 0]) if b * t else {},
    dict(query=jnp.concatenate([query, query[:, :, :1]], 2)) if k > 1 else {},
    dict(query=jnp.concatenate([query, query])),
    dict(query=query[None]),
    dict(local_window_size=(1, 2, 3)),
    dict(local_window_size=1.5),
    dict(local_window_size="1"),
    dict(implementation="mosaic"),
  ]
  del h
  return arguments | wrong[rng.integers(len(wrong))]


def draw_call(rng):
  shape = EMPTY[rng.integers(3)]
  if rng.random() < 0.95:
    shape = SHAPES[rng.integers(2)]
  dtype = "float32"
  if shape == SHAPES[0]:  # Each dtype needs its own programs.
    dtype = rng.choice(["float32", "bfloat16", "float16"])
  call = draw_arrays(rng, shape, dtype) | draw_options(rng, shape)
  if rng.random() < 0.25:
    return spoil(rng, call, shape)
  if shape[0] == 1 and rng.random() < 0.5:  # without a batch axis
    call |= {name: call[name][0] for name in ("query", "key", "value")}
  return call


def run(attend, call):
  """The results and gradients, or the error that is raised."""
  call = dict(call)
  traced = call.pop("traced", False)
  given = {
    name: x
    for name, x in call.items()
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
  }
  if not traced:
    given.pop("scale", None)
  rest = {name: x for name, x in call.items() if name not in given}
  try:
    out, pull_back = jax.vjp(lambda given: attend(**given, **rest), given)
  except Exception as error:  # jax.nn raises many kinds of errors.
    return error
  out = jax.tree.leaves(out)
  cotangents = [jnp.cos(x) for x in out]
  (grads,) = pull_back(
    tuple(cotangents) if len(cotangents) > 1 else cotangents[0]
  )
  return out, grads


def ours(**arguments):
  return dot_product_attention(kind="softmax", **arguments)


def describe(call):
  return {
    k: (x.shape, x.dtype) if hasattr(x, "shape") else x for k, x in call.items()
  }


@pytest.mark.filterwarnings("ignore:.*truncated|.*invalid value")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_drawn_call_is_that_of_jax_nn(batch):
  rng = np.random.default_rng(batch)
  raised = 0
  with jax.numpy_rank_promotion("allow"):
    for _ in range(DRAWS):
      call = draw_call(rng)
      theirs = run(jax.nn.dot_product_attention, call)
      found = run(ours, call)
      if isinstance(theirs, Exception):
        assert isinstance(found, ValueError), (describe(call), theirs, found)
        raised += 1
        continue
      assert not isinstance(found, Exception), (describe(call), found)
      jax.tree.map(np.testing.assert_array_equal, found, theirs)
  assert DRAWS / 10 < raised < DRAWS / 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  ("change", "taken"), LISTED, ids=[str(list(x) + [y]) for x, y in LISTED]
)
def test_what_differs_is_listed(change, taken):
  rng = np.random.default_rng(0)
  call = draw_arrays(rng, SHAPES[0], "float32") | change
  theirs = run(jax.nn.dot_product_attention, call)
  found = run(ours, call)
  assert isinstance(theirs, Exception) == taken
  if taken:
    assert not isinstance(found, Exception)
  else:
    assert isinstance(found, ValueError)
    assert [*change][0] in str(found)
