# %% [markdown]
# # Sigmoid attention as a drop-in replacement
#
# `sigattn.dot_product_attention` takes the arguments of
# `jax.nn.dot_product_attention`. The argument `kind` selects the function that
# turns logits into weights; its default is sigmoid.

# %%
import sys

sys.path.append("..")  # the root of the repository

# %% [markdown]
# ## In five lines

# %%
import jax
import jax.numpy as jnp

import sigattn

q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 128, 8, 64))
out = sigattn.dot_product_attention(q, k, v, is_causal=True)
out.shape, out.dtype

# %% [markdown]
# With `kind="softmax"` it calls `jax.nn.dot_product_attention`:

# %%
softmax = sigattn.dot_product_attention(q, k, v, kind="softmax", is_causal=True)
expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
bool((softmax == expected).all())

# %% [markdown]
# ## In a Flax layer

# %%
from flax import nnx

layer = nnx.MultiHeadAttention(
  8,
  512,
  attention_fn=sigattn.flax_attention_fn,
  decode=False,
  rngs=nnx.Rngs(0),
)
x = jax.random.normal(jax.random.key(1), (2, 128, 512))
layer(x).shape

# %% [markdown]
# ## How it differs from softmax
#
# The weight of a query-key pair, `sigmoid(q k / sqrt(d) + b)`, depends on that
# pair alone. The outputs for two blocks of keys can therefore be added, if both
# use the bias of the whole sequence, `n = 128`. With softmax this is wrong,
# because each block is normalised by its own sum. The relative error of the
# added outputs:


# %%
def gap(kind):
  def attend(keys, values):
    return sigattn.dot_product_attention(q, keys, values, kind=kind, n=128)

  parts = attend(k[:, :64], v[:, :64]) + attend(k[:, 64:], v[:, 64:])
  whole = attend(k, v)
  return float(jnp.linalg.norm(parts - whole) / jnp.linalg.norm(whole))


{kind: round(gap(kind), 5) for kind in ("sigmoid", "relu", "softmax")}

# %% [markdown]
# A query that sees no key gets the output zero. Softmax is undefined there.

# %%
lengths = jnp.array([128, 0])  # the second example is all padding
out = sigattn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
[float(jnp.abs(example).max()) for example in out]

# %% [markdown]
# ## Which implementation computes it
#
# By default the fastest implementation that supports the problem is used. If
# you name an implementation that does not support it, the error says why.

# %%
try:
  sigattn.dot_product_attention(q, k, v, implementation="mosaic")
except NotImplementedError as error:
  print(error)
