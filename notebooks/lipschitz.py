# %% [markdown]
# # How strongly attention's output changes with its input
#
# Theorem 2 of [2409.04431](https://arxiv.org/abs/2409.04431) bounds the
# Jacobian of sigmoid attention at the tokens x_1 .. x_n:
#
# $$\|J\| \le \|W_v\| \left(s + 2 s' \|W_q W_k^T\| \cdot
# \tfrac{1}{n}\sum_i |x_i|^2\right)$$
#
# where s is n times the largest weight and s' is n times the largest derivative
# of the sigmoid. The bound depends on the mean squared norm of the tokens, not
# on their largest norm.

# %%
import sys

sys.path.append("..")  # the root of the repository

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sigattn.analysis import theory

# %% [markdown]
# ## The bound holds
#
# `theory.jacobian_norm` computes the exact spectral norm of the Jacobian of the
# operation that the models use. The next cell compares it with the bound for
# random heads, on random and on adversarial tokens.

# %%
n, width = 8, 4


@jax.jit
@jax.vmap
def norm_and_bound(heads, x_TD):
  exact = theory.jacobian_norm(functools.partial(theory.attend, heads), x_TD)
  return exact, theory.sigmoid_bound(heads, x_TD)


inputs, heads = [], []
for seed in range(12):
  key = jax.random.key(seed)
  inputs += theory.inputs(key, n, width).items()
  heads += [theory.random_heads(key, 2, width, 2)] * 7
names, tokens = zip(*inputs, strict=True)
stacked = jax.tree.map(lambda *x: jnp.stack(x), *heads)
norms, bounds = norm_and_bound(stacked, jnp.stack(tokens))

figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
for name in dict.fromkeys(names):
  chosen = np.array([x == name for x in names])
  axes.loglog(bounds[chosen], norms[chosen], "o", markersize=4, label=name)
ends = [float(norms.min()), float(bounds.max())]
axes.plot(ends, ends, "k", linewidth=0.8)
axes.set(xlabel="bound", ylabel="norm of the Jacobian")
axes.legend(frameon=False, fontsize="small")
axes.grid(alpha=0.3)
plt.show()
print(f"largest ratio: {float((norms / bounds).max()):.3f}")

# %% [markdown]
# If all projections are the identity, equal tokens attain the bound:

# %%
x = jnp.full((n, width), 0.4)
attend = functools.partial(theory.attend, theory.identity(width))
exact = theory.jacobian_norm(attend, x)
bound = theory.sigmoid_bound(theory.identity(width), x)
print(f"norm {float(exact):.5f}, bound {float(bound):.5f}")

# %% [markdown]
# ## How the bound depends on the length
#
# With b = -log n the bound stays nearly constant. Without a bias it grows like
# n.

# %%
for n in (16, 64, 256, 1024):
  x = jnp.full((n, width), 0.3)
  values = [
    float(theory.sigmoid_bound(theory.identity(width), x, bias))
    for bias in (None, 0.0)
  ]
  print(f"n = {n:5}   b = -log n: {values[0]:5.2f}   b = 0: {values[1]:7.1f}")

# %% [markdown]
# ## How the norm depends on the radius
#
# For tokens in a ball |x_i| <= R, the norm of the Jacobian is at most of order
# R^2. The points are the largest norms that gradient ascent reaches, which are
# lower bounds of the true maximum. The dashed lines are upper bounds for the
# whole ball.

# %%
radii = np.array([0.5, 1.5, 4.0])
figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
for index, kind in enumerate(("sigmoid", "softmax")):
  worst = [
    theory.worst_case(kind, 6, 2, radius, None, jax.random.key(0))
    for radius in radii.tolist()
  ]
  limits = [theory.ball_bound(kind, 6, radius) for radius in radii]
  axes.loglog(radii, worst, "o-", color=f"C{index}", label=kind)
  axes.loglog(radii, limits, "--", color=f"C{index}", linewidth=0.8)
axes.set(xlabel="R", ylabel="largest norm found")
axes.set_xticks(radii, radii)
axes.minorticks_off()
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()
