"""SimCLR with sigmoid attention (2409.04431), the twin of simclr.py.

  python train.py --config=configs/simclr_sigmoid.py
  python train.py --config=configs/simclr_sigmoid.py:gpu

Arguments and sweeps, attn, lr and seed, are those of simclr.py.
"""

from configs import common, simclr
from configs.simclr import sweep_attn, sweep_lr, sweep_seed  # noqa: F401


def get_config(arg=None):
  return common.sigmoid(simclr.get_config(arg))
