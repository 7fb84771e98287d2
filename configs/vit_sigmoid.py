"""A vision transformer with sigmoid attention (2409.04431), the twin of vit.py.

  python train.py --config=configs/vit_sigmoid.py
  python train.py --config=configs/vit_sigmoid.py:imagenet
  python -m sigattn.sweep --config=configs/vit_sigmoid.py --sweep=attn,seed

Arguments, sizes and sweeps are those of vit.py.
"""

from configs import common, vit
from configs.vit import sweep_attn, sweep_lr, sweep_seed  # noqa: F401


def get_config(arg=None):
  return common.sigmoid(vit.get_config(arg))
