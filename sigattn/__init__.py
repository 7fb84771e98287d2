"""Sigmoid attention in JAX: the operation, layers, and training.

  out = sigattn.dot_product_attention(query, key, value, is_causal=True)

`import sigattn` needs jax and numpy alone. The layers load when they are asked
for and need flax (the extra `layers`); sigattn.tasks, .training, .inference and
.analysis need the extra `train`.

Letters of the shapes, in names (x_BTD) and equations, in the whole project:
  B batch   T queries   S keys   N heads   K key-value heads   H head width
  D model width   F MLP width   P patches   V classes or vocabulary
"""

import importlib
import importlib.util
from typing import Any

from sigattn.attention import (
  KINDS,
  Weights,
  attention_weights,
  dot_product_attention,
  flax_attention_fn,
)
from sigattn.paged import paged_attention
from sigattn.ring import ring_attention, zigzag

__version__ = "0.1.0"

_LAYERS = ("Block", "Cache", "LayerScale", "Mlp", "SelfAttention", "Stack")

__all__ = [
  "KINDS",
  "Weights",
  "attention_weights",
  "dot_product_attention",
  "flax_attention_fn",
  "paged_attention",
  "ring_attention",
  "zigzag",
]


def __getattr__(name: str) -> Any:
  if name in _LAYERS:
    return getattr(importlib.import_module("sigattn.layers"), name)
  raise AttributeError(f"module 'sigattn' has no attribute {name!r}")


def __dir__() -> list[str]:
  # Without flax there are no layers, and help(sigattn) asks for all names.
  layers = _LAYERS if importlib.util.find_spec("flax") else ()
  return sorted([*__all__, *layers])
