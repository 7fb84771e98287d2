"""A language model with sigmoid attention (2409.04431), the twin of lm.py.

  python train.py --config=configs/lm_sigmoid.py
  python train.py --config=configs/lm_sigmoid.py --config.attn.normalize=False
  python train.py --config=configs/lm_sigmoid.py:85m
  python -m sigattn.sweep --config=configs/lm_sigmoid.py --sweep=attn,seed

The rows of attention are divided by their sums. Without this the default model
is 0.015 nats a character worse. With ALiBi alone and rows of 8,192 characters
the difference is 0.27 (docs/science.md). The published sizes :85m, :1b and :7b
have plain sigmoid attention, as published.
Arguments, sizes and the other sweeps are those of lm.py.
"""

from configs import common, lm
from configs.lm import sweep_lr, sweep_seed  # noqa: F401


def get_config(arg=None):
  config = common.sigmoid(lm.get_config(arg))
  is_published = set(lm.SIZES) & set((arg or "").split(","))
  config.attn.normalize = not is_published
  return config


def sweep_attn():
  yield {"attn.kind": "softmax", "attn.normalize": False}
  yield {"attn.kind": "sigmoid", "attn.normalize": False}
  yield {"attn.kind": "sigmoid", "attn.normalize": True}
