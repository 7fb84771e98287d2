"""BYOL (2006.07733) with softmax attention, the twin of byol_sigmoid.py.

  python train.py --config=configs/byol.py                 Fashion-MNIST, CPU
  python train.py --config=configs/byol.py:gpu             all of it, a GPU
  python train.py --config=configs/byol.py:imagenet        ViT-B/16, 600 epochs
  python train.py --config=configs/byol.py:runlocal        two tiny steps

`python -m sigattn sweep` knows the sweeps attn, lr and seed.
"""

from configs import common, selfsup
from configs.common import sweep_lr, sweep_seed  # noqa: F401
from configs.selfsup import sweep_attn  # noqa: F401


def get_config(arg=None):
  """arg: comma-separated words of selfsup.ARGUMENTS."""
  words = common.words("byol.py", arg, selfsup.ARGUMENTS)
  config = selfsup.base("byol")
  selfsup.two_views(config)
  config.total_steps = 1200
  common.log_lines(config, 24)
  config.batch_size = 128
  # The share of the target that a step keeps. It rises to 1 along a cosine.
  # Short runs need a smaller share than the paper's 0.996.
  config.model.target_momentum = 0.98
  if "gpu" in words:
    selfsup.gpu(config)
  if "imagenet" in words:
    selfsup.imagenet(config, "B/16", epochs=600)
    config.augment.update(
      min_area=0.08, saturation=0.2, blur_shares=(1.0, 0.1),
      solarize_shares=(0.0, 0.2),
    )  # fmt: skip
    config.model.update(
      projection_hidden=4096, projection_dim=256, target_momentum=0.996
    )
  return selfsup.finish(config, words)
