"""A language model with sigmoid attention (2409.04431), the twin of lm.py.

  python train.py --config=configs/lm_sigmoid.py
  python train.py --config=configs/lm_sigmoid.py:85m
  python -m sigattn.sweep --config=configs/lm_sigmoid.py --sweep=attn,seed

Arguments, sizes and sweeps are those of lm.py.
"""

from configs import common, lm
from configs.lm import sweep_attn, sweep_lr, sweep_seed  # noqa: F401


def get_config(arg=None):
  return common.sigmoid(lm.get_config(arg))
