"""Sigmoid attention in JAX: the operation, layers, and training.

  out = sigattn.dot_product_attention(query, key, value, is_causal=True)

`import sigattn` needs only jax and numpy. The layers are imported when they are
first used, and need flax (the extra `layers`). sigattn.tasks, .training,
.inference and .analysis need the extra `train`.

The whole project uses these letters for shapes, in names (x_BTD) and equations:
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
  # help(sigattn) reads every name, and without flax there are no layers.
  layers = _LAYERS if importlib.util.find_spec("flax") else ()
  return sorted([*__all__, *layers])
