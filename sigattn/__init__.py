"""Sigmoid attention: the operation, the blocks, the tasks.

Letters of the shapes, in names (x_BTD) and equations, all over the project:
  B batch   T queries   S keys   N heads   K key-value heads   H head width
  D model width   F MLP width   P patches   V classes or vocabulary
"""

from sigattn.attention import KINDS, dot_product_attention

__all__ = ["KINDS", "dot_product_attention"]
