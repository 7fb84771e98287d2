# %% [markdown]
# # Why sigmoid attention needs a bias
#
# Sigmoid attention gives every query-key pair its own weight between 0 and 1
# and does not normalise the rows. Without a bias, the weights of a row of n
# keys therefore add up to about n / 2 at the start of training. With
# b = -log n they add up to about 1. With softmax they add up to exactly 1
# (Ramapuram et al., [2409.04431](https://arxiv.org/abs/2409.04431)).

# %%
import sys

sys.path.append("..")  # the root of the repository

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import sigattn
from sigattn.analysis import theory

lengths = np.array([16, 64, 256, 1024, 4096])
biases = {
  "0": lambda n: 0.0,
  "-10": lambda n: -10.0,
  "-log n": lambda n: -float(np.log(n)),
}

# %% [markdown]
# ## The sum of a row
#
# If all values are 1, attention returns the sum of the weights of each row. The
# logits u of random queries and keys are approximately N(0, 1). With
# b = -log n the sum therefore converges to the mean of e^u, which is
# e^(1/2) = 1.65, independent of n.


# %%
def tokens(n, width=64, seed=0):
  return jax.random.normal(jax.random.key(seed), (3, 1, n, 1, width))


def attend(n, bias, values=None):
  q, k, v = tokens(n)
  v = v if values is None else values
  return sigattn.dot_product_attention(q[:, :16], k, v, logit_bias=bias)


for name, bias in biases.items():
  sums = [attend(n, bias(n), jnp.ones((1, n, 1, 64))).mean() for n in lengths]
  print(f"b = {name:7}", "  ".join(f"{x:8.3f}" for x in sums))

# %% [markdown]
# ## The norm of the output
#
# In the next cell each value is a random vector plus a vector that is common to
# all tokens. The common part of the output grows like the sum of a row's
# weights, and the random part grows more slowly, because random vectors partly
# cancel. With b = -log n the norm of the output does not grow with n.


# %%
def output_norm(n, bias, common=0.5):
  _, _, v = tokens(n)
  return float(jnp.linalg.norm(attend(n, bias, v + common), axis=-1).mean())


figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
for name, bias in biases.items():
  norms = [output_norm(n, bias(n)) for n in lengths]
  axes.loglog(lengths, norms, "o-", label=f"sigmoid, b = {name}")
q, k, v = tokens(4096)
softmax = [
  float(
    jnp.linalg.norm(
      sigattn.dot_product_attention(
        q[:, :16], k[:, :n], v[:, :n] + 0.5, kind="softmax"
      ),
      axis=-1,
    ).mean()
  )
  for n in lengths
]
axes.loglog(lengths, softmax, "k--", label="softmax")
axes.set(xlabel="n", ylabel="norm of an output token")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# A bias of -10 is right for n = e^10 = 22,026 and too low for these lengths.
#
# ## The limit of long sequences
#
# n sigmoid(u - log n) converges to e^u as n grows. With this bias, sigmoid
# attention approaches attention with exponential weights that are divided by n
# instead of by their sum. The difference is e^2u / (n + e^u).

# %%
u = np.linspace(-3, 4, 200)
figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
for n in (4, 32, 256):
  axes.semilogy(u, theory.scaled_sigmoid(u, n), label=f"n = {n}")
axes.semilogy(u, np.exp(u), "k--", label="$e^u$")
axes.set(xlabel="u", ylabel="n sigmoid(u - log n)")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Which n to use
#
# n is a constant of the model: the maximum length that it is built for, in
# training and in evaluation. The argument `n` sets it, for example when fewer
# keys are given:

# %%
q, k, v = tokens(64)
ones = jnp.ones_like(v)
for n in (64, 4096):
  total = sigattn.dot_product_attention(q, k, ones, n=n).mean()
  print(f"64 keys, n = {n}: a row's sum is {total:.3f}")
