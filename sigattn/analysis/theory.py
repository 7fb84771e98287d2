"""Bounds and measures how strongly attention's output changes with its input.

  python -m sigattn theory --out=benchmarks/results/theory

draws the figures and prints a table of the numbers. The functions can be used
in notebooks. Outputs and Jacobians are those of the operation that the models
use, sigattn.attention.dot_product_attention. docs/theory.md proves the
statements here about softmax and normalised sigmoid.

|x| is the Euclidean norm of a vector and the spectral norm of a matrix.
Shapes: T tokens of width D, N heads of width H; one example without a batch.
"""

import functools
import math
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table
from absl import flags
from flax import nnx

from sigattn import attention, layers
from sigattn.training import metrics


class Heads(NamedTuple):
  """The projections of an attention layer.

  The factor 1 / sqrt(H) of the logits is part of query_NDH.
  """

  query_NDH: jax.Array
  key_NDH: jax.Array
  value_NDH: jax.Array
  out_NHD: jax.Array


def identity(width: int) -> Heads:
  """A single head whose four projections are the identity."""
  eye = jnp.eye(width)[None]
  return Heads(eye, eye, eye, eye)


def random_heads(
  key: jax.Array, num_heads: int, width: int, head_width: int
) -> Heads:
  """Gaussian projections that preserve the variance of a unit Gaussian input.

  key: a JAX random key.
  """
  keys = jax.random.split(key, 4)
  shape = (num_heads, width, head_width)
  q, k, v = (jax.random.normal(x, shape) / math.sqrt(width) for x in keys[:3])
  out = jax.random.normal(keys[3], (num_heads, head_width, width))
  out = out / math.sqrt(num_heads * head_width)
  return Heads(q / math.sqrt(head_width), k, v, out)


def attend(
  heads: Heads,
  x_TD: jax.Array,
  kind: str = "sigmoid",
  logit_bias: float | None = None,
  mask_TT: jax.Array | None = None,
  normalize: bool = False,
) -> jax.Array:
  """An attention layer, (T, D) -> (T, D): the sum of the projected heads.

  kind, logit_bias, normalize: as in attention.dot_product_attention; for
  sigmoid the default bias is -log T.
  mask_TT: bool, True where the query (row) sees the key (column).
  """
  q_TNH, k_TNH, v_TNH = (
    jnp.einsum("TD,NDH->TNH", x_TD, weight) for weight in heads[:3]
  )
  out_TNH = attention.dot_product_attention(
    q_TNH, k_TNH, v_TNH, mask=mask_TT, kind=kind, logit_bias=logit_bias,
    normalize=normalize, scale=1,
  )  # fmt: skip
  return jnp.einsum("TNH,NHD->TD", out_TNH, heads.out_NHD)


def jacobian_norm(
  function: Callable[[jax.Array], jax.Array], x_TD: jax.Array
) -> jax.Array:
  """The exact spectral norm of the Jacobian of (T, D) -> (T, D) at x_TD.

  It is the local Lipschitz constant for the Euclidean norm over all tokens
  together, of the input and of the output.
  """
  jacobian = jax.jacrev(function)(x_TD).reshape(x_TD.size, x_TD.size)
  return jnp.linalg.norm(jacobian, 2)


def sigmoid_bound(
  heads: Heads,
  x_TD: jax.Array,
  logit_bias: float | None = None,
  mask_TT: jax.Array | None = None,
) -> jax.Array:
  """An upper bound of jacobian_norm for sigmoid (2409.04431, Theorem 2).

  For one head it is |W_v| (s + 2 s' |W_q W_k^T| mean_i |x_i|^2), where s is T
  times the largest weight and s' is T times the largest derivative sigmoid' of
  a visible pair. For several heads it is |W_out| times the square root of the
  sum of the squares of the heads' bounds.

  The differential of a row has three parts, from the values, the query and the
  keys. Each is bounded by Cauchy-Schwarz over the keys. The bound holds for any
  mask. With `identity` heads it is attained if all tokens are equal.

  The arguments are those of `attend`.
  """
  if logit_bias is None:
    logit_bias = attention.default_logit_bias("sigmoid", len(x_TD))
  weights_NTT = jax.nn.sigmoid(_logits(heads, x_TD) + logit_bias)
  derivative_NTT = weights_NTT * (1 - weights_NTT)
  if mask_TT is not None:
    weights_NTT, derivative_NTT = (
      jnp.where(mask_TT[None], x, 0) for x in (weights_NTT, derivative_NTT)
    )
  max_weight_N, max_derivative_N = (
    len(x_TD) * x.max((1, 2)) for x in (weights_NTT, derivative_NTT)
  )
  a_N, v_N = _norms(heads)
  square = (x_TD**2).sum(-1).mean()
  return _join(
    heads, v_N * (max_weight_N + 2 * max_derivative_N * a_N * square)
  )


def softmax_bound(
  heads: Heads, x_TD: jax.Array, mask_TT: jax.Array | None = None
) -> jax.Array:
  """An upper bound of jacobian_norm for softmax.

  It is the limit of normalized_bound as b falls, where all d_ij are 1 and B_i
  is the covariance of the tokens under row i. In a ball of radius R it is at
  most |W_v| (sqrt(T) + |A| R^2 (1 + sqrt(T))). 2312.14820 proves that this
  growth with the square root of the length is tight on compact sets.
  """
  logits_NTT = _logits(heads, x_TD)
  return _bound_of_rows(heads, x_TD, logits_NTT, 1.0, mask_TT)


def normalized_bound(
  heads: Heads,
  x_TD: jax.Array,
  logit_bias: float | None = None,
  mask_TT: jax.Array | None = None,
) -> jax.Array:
  """An upper bound of jacobian_norm for normalised sigmoid (docs/theory.md).

  Let u_ij be the logits, P the weights, m_i = sum_j P_ij x_j the mean token
  under row i, A = W_q W_k^T and d_ij = 1 - sigmoid(u_ij + b). The bound of one
  head is

    |W_v| (|P| + |A| max_i |B_i|
           + |A| sqrt(sum_i |x_i|^2 sum_j P_ij^2 d_ij^2 |x_j - m_i|^2)),
    B_i = sum_j P_ij d_ij (x_j - m_i) x_j^T,

  whose three terms come from the values, the query and the keys. Heads are
  combined as in sigmoid_bound. The bound is finite for every input, bias and
  mask. The arguments are those of `attend`.
  """
  if logit_bias is None:
    logit_bias = attention.default_logit_bias("sigmoid", len(x_TD))
  logits_NTT = _logits(heads, x_TD) + logit_bias
  # Softmax of log(sigmoid) gives the same weights.
  return _bound_of_rows(
    heads,
    x_TD,
    jax.nn.log_sigmoid(logits_NTT),
    jax.nn.sigmoid(-logits_NTT),
    mask_TT,
  )


def _bound_of_rows(heads, x_TD, logits_NTT, slope_NTT, mask_TT):
  """The bound for softmax of logits, whose derivatives by u are slope_NTT."""
  if mask_TT is not None:
    logits_NTT = jnp.where(mask_TT[None], logits_NTT, -jnp.inf)
  p_NTT = jax.nn.softmax(logits_NTT)
  m_NTD = jnp.einsum("NTS,SD->NTD", p_NTT, x_TD)
  gap_NTSD = x_TD[None, None] - m_NTD[:, :, None]
  change_NTS = p_NTT * slope_NTT
  query_NTDE = jnp.einsum("NTS,NTSD,SE->NTDE", change_NTS, gap_NTSD, x_TD)
  spread_NT = (change_NTS**2 * (gap_NTSD**2).sum(-1)).sum(-1)
  key_N = jnp.sqrt(((x_TD**2).sum(-1)[None] * spread_NT).sum(-1))
  query_N = _spectral(query_NTDE).max(-1)
  a_N, v_N = _norms(heads)
  return _join(heads, v_N * (_spectral(p_NTT) + a_N * (query_N + key_N)))


def ball_bound(
  kind: str,
  length: int,
  radius: float,
  logit_bias: float | None = None,
  normalize: bool = False,
) -> float:
  """An upper bound of jacobian_norm for all inputs with |x_i| <= radius.

  It holds without a mask and for `identity` heads, where |W_v| = |A| = 1 and
  the logits are between -radius^2 and radius^2. For sigmoid it is the maximum
  of sigmoid_bound. For rows with a sum of 1 it is

    sqrt(K) + d R^2 (1 + sqrt(K)),   K = min(length, r),

  where r is the largest ratio of two weights of a row and d the largest d_ij of
  normalized_bound. With softmax r = exp(2 R^2) and d = 1. With normalised
  sigmoid both are smaller, and fall as b grows (docs/theory.md).

  kind: "sigmoid" or "softmax". length: the number of tokens. logit_bias: of
  sigmoid; None for -log(length). normalize: as in `attend`.
  """
  square = radius**2
  if kind == "softmax":
    return _ball_bound_of_rows(length, square, 2 * square, 1.0)
  if logit_bias is None:
    logit_bias = attention.default_logit_bias(kind, length)
  if normalize:
    ends = square + logit_bias, -square + logit_bias
    log_ratio = np.logaddexp(0, -ends[1]) - np.logaddexp(0, -ends[0])
    slope = math.exp(-np.logaddexp(0, ends[1]))
    return _ball_bound_of_rows(length, square, log_ratio, slope)
  # sigmoid' is largest at 0, or at the possible logit that is closest to 0.
  nearest = max(abs(logit_bias) - square, 0)
  derivative = 1 / (2 + 2 * math.cosh(nearest))
  weight = 1 / (1 + math.exp(-(square + logit_bias)))
  return length * (weight + 2 * derivative * square)


def _ball_bound_of_rows(length, square, log_ratio, slope):
  root = math.exp(min(math.log(length), log_ratio) / 2)
  return root + slope * square * (1 + root)


def _logits(heads, x_TD):
  q_NTH = jnp.einsum("TD,NDH->NTH", x_TD, heads.query_NDH)
  k_NTH = jnp.einsum("TD,NDH->NTH", x_TD, heads.key_NDH)
  return jnp.einsum("NTH,NSH->NTS", q_NTH, k_NTH)


def _norms(heads):
  a_NDE = jnp.einsum("NDH,NEH->NDE", heads.query_NDH, heads.key_NDH)
  return _spectral(a_NDE), _spectral(heads.value_NDH)


def _spectral(x):
  return jnp.linalg.norm(x, 2, axis=(-2, -1))


def _join(heads, bound_N):
  """Combines the bounds of the heads: |W_out| sqrt(sum of their squares)."""
  width = heads.out_NHD.shape[-1]
  return _spectral(heads.out_NHD.reshape(-1, width)) * jnp.linalg.norm(bound_N)


@functools.partial(
  jax.jit, static_argnums=(0, 1, 2), static_argnames="normalize"
)
def worst_case(
  kind: str,
  length: int,
  width: int,
  radius: float,
  logit_bias: float | None,
  key: jax.Array,
  *,
  normalize: bool = False,
) -> jax.Array:
  """The largest jacobian_norm that gradient ascent reaches in a ball.

  The inputs have |x_i| <= radius for every token, and the heads are `identity`.
  The result is the best of 16 starts, each with 200 steps of decreasing length
  along the normalised gradient. It is a lower bound of the true supremum.

  logit_bias: None for the kind's default. key: a JAX random key. normalize: as
  in `attend`.
  """
  attend_x = functools.partial(
    attend, identity(width), kind=kind, logit_bias=logit_bias,
    normalize=normalize,
  )  # fmt: skip

  def norm(x_TD):
    return jacobian_norm(attend_x, x_TD)

  def project(x_TD):
    size_T1 = jnp.linalg.norm(x_TD, axis=-1, keepdims=True)
    return x_TD * jnp.minimum(1, radius / jnp.maximum(size_T1, 1e-6))

  def step(carry, rate):
    x_TD, best = carry
    value, grad = jax.value_and_grad(norm)(x_TD)
    grad = grad / (jnp.linalg.norm(grad) + 1e-12)
    scale = rate * radius * math.sqrt(length)
    return (project(x_TD + scale * grad), jnp.maximum(best, value)), None

  def ascend(start_TD):
    x_TD = project(radius * start_TD)
    rates = 0.3 * 0.97 ** jnp.arange(200)
    (x_TD, best), _ = jax.lax.scan(step, (x_TD, 0.0), rates)
    return jnp.maximum(best, norm(x_TD))

  spread, size, noise, one = jax.random.split(key, 4)
  starts = jax.random.normal(spread, (16, length, width))
  # In half of the starts all tokens except the first are nearly equal.
  alike = jax.random.normal(one, (8, 1, width))
  alike *= jax.random.uniform(size, (8, 1, 1)) / jnp.linalg.norm(
    alike, axis=-1, keepdims=True
  )
  alike += 0.05 * jax.random.normal(noise, (8, length - 1, width))
  starts = starts.at[:8, 1:].set(alike)
  return jax.vmap(ascend)(starts).max()


def scaled_sigmoid(u: np.ndarray | float, n: int) -> np.ndarray:
  """n sigmoid(u - log n) in float64; it converges to e^u as n grows."""
  u = np.asarray(u, np.float64)
  return n / (1 + n * np.exp(-u))


def scaled_sigmoid_gap(u: np.ndarray | float, n: int) -> np.ndarray:
  """e^u - n sigmoid(u - log n) = e^2u / (n + e^u) <= e^2u / n, in float64."""
  u = np.asarray(u, np.float64)
  return np.exp(2 * u) / (n + np.exp(u))


# Universal approximation.


class Universal(nnx.Module):
  """A transformer of sigmoid attention with 4 heads of width 1 and small MLPs.

  It computes x + attn(x), then x + mlp(x), `depth` times without norms. Tokens
  have width 4; the MLPs have hidden width 4 and GELU. This is the class
  T^(4,1,4), which approximates every continuous permutation-equivariant
  function on a compact domain arbitrarily well (2409.04431, Theorem 1).

  length: the number of tokens, sigmoid's n.
  """

  WIDTH = 4

  def __init__(self, length: int, depth: int, rngs: nnx.Rngs) -> None:
    self.attns = nnx.List([
      layers.SelfAttention(self.WIDTH, 4, max_length=length, rngs=rngs)
      for _ in range(depth)
    ])  # fmt: skip
    self.mlps = nnx.List([
      layers.Mlp(self.WIDTH, 4, rngs=rngs) for _ in range(depth)
    ])  # fmt: skip
    # Without norms a deep model would start with large outputs and would not
    # recover from them.
    for attn, mlp in zip(self.attns, self.mlps, strict=True):
      for kernel in (attn.out.kernel, mlp.down.kernel):
        kernel[...] = kernel[...] / depth

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    for attn, mlp in zip(self.attns, self.mlps, strict=True):
      x_BTD = x_BTD + attn(x_BTD)
      x_BTD = x_BTD + mlp(x_BTD)
    return x_BTD


def _softmax_target(x_BTD):
  x_BTND = x_BTD[:, :, None]
  return jax.nn.dot_product_attention(x_BTND, x_BTND, x_BTND, scale=8.0)[
    :, :, 0
  ]


# Permutation-equivariant functions of x_BTD in [0, 1].
TARGETS = {
  "x - mean": lambda x_BTD: x_BTD - x_BTD.mean(1, keepdims=True),
  "maximum": lambda x_BTD: jnp.broadcast_to(
    x_BTD.max(1, keepdims=True), x_BTD.shape
  ),
  "softmax attention": _softmax_target,
}


def fit(
  target: Callable[[jax.Array], jax.Array],
  *,
  depth: int,
  length: int = 6,
  steps: int = 3000,
  batch: int = 128,
  seed: int = 0,
) -> tuple[Universal, np.ndarray]:
  """Trains a Universal model with Adam on uniform inputs in [0, 1].

  Args:
    target: the function of x_BTD to learn, for example one of TARGETS.
    depth: the number of layers.
    length: the number of tokens.
    steps: the number of updates.
    batch: the number of fresh inputs per update.
    seed: of the initialisation and of the inputs.

  Returns:
    (model, errors (steps,)). The error of a step is the root-mean-square error
    on its inputs before the update, relative to the target's standard
    deviation.
  """
  graphdef, params = nnx.split(Universal(length, depth, nnx.Rngs(seed)))
  shape = (batch, length, Universal.WIDTH)
  tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

  def loss(params, x_BTD):
    y_BTD = target(x_BTD)
    prediction_BTD = nnx.merge(graphdef, params)(x_BTD)
    return ((prediction_BTD - y_BTD) ** 2).mean() / y_BTD.var()

  @jax.jit
  def run(params):
    def step(carry, i):
      params, opt_state = carry
      key = jax.random.fold_in(jax.random.key(seed), i)
      x_BTD = jax.random.uniform(key, shape)
      value, grads = jax.value_and_grad(loss)(params, x_BTD)
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return (params, opt_state), jnp.sqrt(value)

    carry = params, tx.init(params)
    return jax.lax.scan(step, carry, jnp.arange(steps))

  (params, _), errors = run(params)
  return nnx.merge(graphdef, params), np.asarray(errors)


# The figures.

_BIASES = {"-log n": lambda n: -math.log(n), "0": lambda n: 0.0}


class _Case(NamedTuple):
  """A kind of attention that the figures compare; bias is a function of n."""

  kind: str
  bias: Callable[[int], float | None]
  normalize: bool = False

  def attend(self, heads, n, mask_TT=None):
    return functools.partial(
      attend, heads, kind=self.kind, logit_bias=self.bias(n), mask_TT=mask_TT,
      normalize=self.normalize,
    )  # fmt: skip

  def bound(self, heads, x_TD, mask_TT=None):
    if self.kind == "softmax":
      return softmax_bound(heads, x_TD, mask_TT)
    bound = normalized_bound if self.normalize else sigmoid_bound
    return bound(heads, x_TD, self.bias(len(x_TD)), mask_TT)


_CASES = {
  f"{name}, b = {b}": _Case("sigmoid", bias, normalize)
  for name, normalize in (("sigmoid", False), ("normalised", True))
  for b, bias in _BIASES.items()
} | {"softmax": _Case("softmax", lambda n: None)}


def inputs(key: jax.Array, length: int, width: int) -> dict[str, jax.Array]:
  """Random inputs of several sizes and adversarial inputs, {name: x_TD}."""
  keys = jax.random.split(key, 2)
  x_TD = jax.random.normal(keys[0], (length, width))
  one_D = jax.random.normal(keys[1], (width,))
  return {
    "random": x_TD,
    "small": 0.1 * x_TD,
    "large": 3 * x_TD,
    "equal tokens": jnp.broadcast_to(one_D, x_TD.shape),
    "equal, large": jnp.broadcast_to(3 * one_D, x_TD.shape),
    "two opposite": jnp.where(jnp.arange(length)[:, None] % 2, one_D, -one_D),
    "one outlier": x_TD.at[0].multiply(10.0),
  }


def _tightness(axes, rows):
  """Draws exact norms against bounds for all inputs, masks and head counts."""
  length, width = 12, 6
  causal_TT = jnp.tril(jnp.ones((length, length), bool))
  kinds = {
    "sigmoid": _CASES["sigmoid, b = -log n"],
    "normalised": _CASES["normalised, b = -log n"],
    "softmax": _CASES["softmax"],
  }
  points = {name: [] for name in kinds}
  for seed, num_heads in enumerate((1, 1, 1, 3, 3, 3)):
    key = jax.random.key(seed)
    heads = random_heads(key, num_heads, width, width // num_heads)
    for x_TD in inputs(key, length, width).values():
      for mask_TT in (None, causal_TT):
        for name, case in kinds.items():
          exact = jacobian_norm(case.attend(heads, length, mask_TT), x_TD)
          limit = case.bound(heads, x_TD, mask_TT)
          points[name].append((float(limit), float(exact)))
  for name, pairs in points.items():
    limits, exacts = np.array(pairs).T
    axes.loglog(limits, exacts, "o", markersize=3, alpha=0.6, label=name)
    ratio = exacts / limits
    rows[f"Jacobian norm / bound, {name}, {len(pairs)} inputs"] = (
      f"{np.median(ratio):.2f} median, {ratio.max():.3f} largest"
    )
  ends = 0.5, 1e4
  axes.plot(ends, ends, color="black", linewidth=0.8)
  axes.set(
    xlim=ends, ylim=(0.05, 1e3), xlabel="bound", ylabel="|Jacobian|",
    title="never above the bound",
  )  # fmt: skip


def _over_lengths(axes, rows):
  """Draws norms and bounds by length, for random tokens of norm 1."""
  lengths, width = (8, 16, 32, 64, 128), 4
  heads = identity(width)
  for index, (label, case) in enumerate(_CASES.items()):
    exacts, bounds = [], []
    for n in lengths:
      x_TD = jax.random.normal(jax.random.key(n), (n, width))
      x_TD = x_TD / jnp.linalg.norm(x_TD, axis=1, keepdims=True)
      exacts.append(float(jacobian_norm(case.attend(heads, n), x_TD)))
      bounds.append(case.bound(heads, x_TD))
    axes.loglog(lengths, exacts, "o-", color=f"C{index}", label=label)
    axes.loglog(lengths, bounds, "--", color=f"C{index}", linewidth=0.8)
    rows[f"norm at n = 8 and 128, {label}"] = (
      f"{exacts[0]:.2f}, {exacts[-1]:.2f}"
    )
  axes.set(xlabel="n", ylabel="|Jacobian|", title="norm, and bound (dashed)")


def _over_radii(axes, rows):
  """Draws the largest norm that gradient ascent reaches in balls, by radius."""
  length, width, radii = 16, 2, np.array((0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0))
  for index, (label, (kind, bias, normalize)) in enumerate(_CASES.items()):
    b, key = bias(length), jax.random.key(0)
    worst = [
      float(worst_case(kind, length, width, r, b, key, normalize=normalize))
      for r in radii
    ]
    bounds = [ball_bound(kind, length, r, b, normalize) for r in radii]
    axes.loglog(radii, worst, "o-", color=f"C{index}", label=label)
    axes.loglog(radii, bounds, "--", color=f"C{index}", linewidth=0.8)
    exponents = np.diff(np.log(worst)) / np.diff(np.log(radii))
    rows[f"worst of |x| <= R, n = {length}, {label}"] = (
      f"R = 0.5: {worst[0]:.2f}, 4: {worst[-1]:.1f} (bound {bounds[-1]:.0f}); "
      f"R^{exponents.max():.1f} at its steepest, "
      f"R^{exponents[-1]:.1f} at the end"
    )
  axes.set(
    xlabel="R", ylabel="largest |Jacobian|",
    title=f"ball, n = {length}, and bound (dashed)",
  )  # fmt: skip
  axes.set_xticks(radii, radii)
  axes.minorticks_off()


def _over_biases(axes, rows):
  """Draws the worst case in a ball by the bias, between its two limits."""
  length, width, radius = 16, 2, 2.0
  biases, key = np.arange(-12.0, 9.0, 2.0), jax.random.key(0)
  for index, (label, normalize) in enumerate(
    {"sigmoid": False, "normalised": True}.items()
  ):
    color, size = f"C{index}", (length, width, radius)
    worst = [
      float(worst_case("sigmoid", *size, b, key, normalize=normalize))
      for b in biases
    ]
    bounds = [
      ball_bound("sigmoid", length, radius, b, normalize) for b in biases
    ]
    axes.semilogy(biases, worst, "o-", color=color, label=label)
    axes.semilogy(biases, bounds, "--", color=color, linewidth=0.8)
    rows[f"worst of |x| <= 2, n = {length}, b = -12, 0 and 8, {label}"] = (
      ", ".join(f"{worst[i]:.2f}" for i in (0, 6, 10))
    )
  softmax = float(worst_case("softmax", length, width, radius, None, key))
  rows[f"worst of |x| <= 2, n = {length}, softmax"] = f"{softmax:.2f}"
  axes.axhline(softmax, color="C2", linewidth=1, label="softmax")
  axes.axhline(1, color="black", linewidth=0.8, linestyle=":", label="mean")
  axes.set(
    xlabel="b", ylabel="largest |Jacobian|", ylim=(0.03, None),
    title=f"R = {radius:.0f}, and bound (dashed)", xticks=biases[::2],
  )  # fmt: skip


def _limit(axes, rows):
  """Draws n sigmoid(u - log n) for several n, and its limit e^u."""
  u = np.linspace(-3, 5, 200)
  for n in (4, 16, 64, 256, 1024):
    axes.semilogy(u, scaled_sigmoid(u, n), linewidth=1, label=f"n = {n}")
    rows[f"e^u - n sigmoid(u - log n), u = 2, n = {n}"] = (
      f"{scaled_sigmoid_gap(2.0, n):.3f} of {math.exp(2):.3f}"
    )
  axes.semilogy(u, np.exp(u), "--", color="black", label="$e^u$")
  axes.set(xlabel="u", ylabel="n sigmoid(u - log n)", title="the limit")


def _fits(axes, rows):
  """Draws the error of the Universal model by depth, for each target."""
  depths = (1, 2, 4, 8)
  for name, target in TARGETS.items():
    last = [fit(target, depth=depth)[1][-100:].mean() for depth in depths]
    axes.loglog(depths, last, "o-", label=name)
    rows[f"error of T(4,1,4) at depth {depths}, {name}"] = ", ".join(
      f"{100 * error:.1f} %" for error in last
    )
  axes.set(xlabel="depth", ylabel="relative error", title="what it learns")
  axes.set_xticks(depths, depths)
  axes.minorticks_off()


FIGURES = {
  "bound": _tightness,
  "length": _over_lengths,
  "radius": _over_radii,
  "bias": _over_biases,
  "limit": _limit,
  "universal": _fits,
}


def draw(folder: str | os.PathLike[str]) -> dict[str, str]:
  """Draws every figure into the folder as PNG.

  Returns the numbers of the table, {quantity: value as text}.
  """
  import matplotlib.figure  # The import takes 0.3 s; only this needs it.

  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  rows = {}
  for name, plot in FIGURES.items():
    figure = matplotlib.figure.Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    plot(axes, rows)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(folder / f"{name}.png", dpi=110)
  return rows


def define_flags() -> None:
  """Defines the flags of `python -m sigattn theory`."""
  flags.DEFINE_string("out", "runs/theory", "The folder for the figures.")


def run(flag_values: flags.FlagValues) -> None:
  """Draws the figures and prints the table."""
  table = rich.table.Table("quantity", "value")
  for row in draw(flag_values.out).items():
    table.add_row(*row)
  metrics.log(table)
  metrics.log(f"figures: {flag_values.out}")
