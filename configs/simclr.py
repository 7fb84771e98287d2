"""SimCLR (2002.05709) with softmax attention, the twin of simclr_sigmoid.py.

  python train.py --config=configs/simclr.py               Fashion-MNIST, CPU
  python train.py --config=configs/simclr.py:gpu           all of it, a GPU
  python train.py --config=configs/simclr.py:imagenet      ViT-B/16, 300 epochs
  python train.py --config=configs/simclr.py:runlocal      two tiny steps

`python -m sigattn sweep` knows the sweeps attn, lr and seed.
"""

from configs import common, selfsup
from configs.common import sweep_lr, sweep_seed  # noqa: F401
from configs.selfsup import sweep_attn  # noqa: F401


def get_config(arg=None):
  """arg: comma-separated words of selfsup.ARGUMENTS."""
  words = common.words("simclr.py", arg, selfsup.ARGUMENTS)
  config = selfsup.base("simclr")
  selfsup.two_views(config)
  config.total_steps = 1500
  common.log_lines(config, 30)
  config.batch_size = 128
  config.model.temperature = 0.2  # of the similarities
  if "gpu" in words:
    selfsup.gpu(config)
  if "imagenet" in words:
    selfsup.imagenet(config, "B/16", epochs=300)
    config.augment.update(
      min_area=0.08, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2
    )
    config.model.update(
      projection_hidden=4096, projection_dim=256, temperature=0.1
    )
  return selfsup.finish(config, words)
