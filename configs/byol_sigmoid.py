"""BYOL with sigmoid attention (2409.04431), the twin of byol.py.

  python train.py --config=configs/byol_sigmoid.py
  python train.py --config=configs/byol_sigmoid.py:gpu

Arguments and sweeps, attn, lr and seed, are those of byol.py.
"""

from configs import byol, common
from configs.byol import sweep_attn, sweep_lr, sweep_seed  # noqa: F401


def get_config(arg=None):
  return common.sigmoid(byol.get_config(arg))
