"""MAE with sigmoid attention (2409.04431), the twin of mae.py.

  python train.py --config=configs/mae_sigmoid.py
  python train.py --config=configs/mae_sigmoid.py:gpu

Arguments and sweeps, attn, lr and seed, are those of mae.py.
"""

from configs import common, mae
from configs.mae import sweep_attn, sweep_lr, sweep_seed  # noqa: F401


def get_config(arg=None):
  return common.sigmoid(mae.get_config(arg))
