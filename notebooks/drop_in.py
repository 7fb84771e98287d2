# %% [markdown]
# # Sigmoid attention as a drop-in
#
# `sigattn.dot_product_attention` has the arguments of
# `jax.nn.dot_product_attention`; `kind` chooses what becomes of the logits.

# %%
import sys

sys.path.append("..")  # the root of the repository, from here

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
# Softmax goes to `jax.nn` itself:

# %%
softmax = sigattn.dot_product_attention(q, k, v, kind="softmax", is_causal=True)
expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
bool((softmax == expected).all())

# %% [markdown]
# ## In a layer of Flax

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
# ## What is different
#
# A pair's weight depends on that pair alone: `sigmoid(q k / sqrt(d) + b)`. So
# blocks of keys simply add up, if both use the bias of the whole, `n = 128`.
# Softmax would need the sums of both rows.


# %%
def gap(kind):
  def attend(keys, values):
    return sigattn.dot_product_attention(q, keys, values, kind=kind, n=128)

  parts = attend(k[:, :64], v[:, :64]) + attend(k[:, 64:], v[:, 64:])
  whole = attend(k, v)
  return float(jnp.linalg.norm(parts - whole) / jnp.linalg.norm(whole))


{kind: round(gap(kind), 5) for kind in ("sigmoid", "relu", "softmax")}

# %% [markdown]
# A row that sees no key is zero, where softmax has no answer:

# %%
lengths = jnp.array([128, 0])  # the second example is all padding
out = sigattn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
[float(jnp.abs(example).max()) for example in out]

# %% [markdown]
# ## Which code computes it
#
# The fastest implementation that can. One that is named and cannot says why.

# %%
try:
  sigattn.dot_product_attention(q, k, v, implementation="mosaic")
except NotImplementedError as error:
  print(error)
