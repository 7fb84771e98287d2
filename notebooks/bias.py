# %% [markdown]
# # Why the bias
#
# Sigmoid attention gives every pair a weight between 0 and 1, and nothing
# divides by the length: without a bias a row of n keys weighs n / 2 in all when
# training starts. With b = -log n it weighs about 1, as softmax's does exactly
# (Ramapuram et al., [2409.04431](https://arxiv.org/abs/2409.04431)).

# %%
import sys

sys.path.append("..")  # the root of the repository, from here

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
# With values of 1, attention returns the sum of each row's weights. The logits
# u of random queries and keys are about N(0, 1), so that with b = -log n the
# sum goes to the mean of e^u, which is e^(1/2) = 1.65: the same for every n.


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
# Values have a part in common and a part of their own. The one adds up to the
# row's sum, the other to its square root; with b = -log n neither grows.


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
# A bias of -10 is right for n = e^10 = 22,026 and too low for all of these.
#
# ## The limit
#
# n sigmoid(u - log n) goes to e^u: with this bias sigmoid attention becomes
# attention by the exponential, divided by n instead of by its sum. The gap is
# e^2u / (n + e^u).

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
# ## Which n
#
# One constant, the longest that the model is built for, in training and
# evaluation alike. `n` says it where the keys at hand are fewer:

# %%
q, k, v = tokens(64)
ones = jnp.ones_like(v)
for n in (64, 4096):
  total = sigattn.dot_product_attention(q, k, ones, n=n).mean()
  print(f"64 keys, n = {n}: a row's sum is {total:.3f}")
