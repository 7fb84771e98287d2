"""Synthetic tasks with sigmoid attention (2409.04431).

They are the twins of synthetic.py.

  python train.py --config=configs/synthetic_sigmoid.py:recall

Arguments and sweeps are those of synthetic.py.
"""

from configs import common, synthetic
from configs.synthetic import sweep_attn, sweep_lr, sweep_seed  # noqa: F401


def get_config(arg="recall"):
  return common.sigmoid(synthetic.get_config(arg))
