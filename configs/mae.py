"""MAE (2111.06377) with softmax attention, the twin of mae_sigmoid.py.

  python train.py --config=configs/mae.py                  Fashion-MNIST, CPU
  python train.py --config=configs/mae.py:gpu              all of it, a GPU
  python train.py --config=configs/mae.py:imagenet         ViT-L/16, 400 epochs
  python train.py --config=configs/mae.py:runlocal         two tiny steps

`python -m sigattn sweep` knows the sweeps attn, lr and seed.
"""

from configs import common, selfsup
from configs.common import sweep_lr, sweep_seed  # noqa: F401
from configs.selfsup import sweep_attn  # noqa: F401


def get_config(arg=None):
  """arg: comma-separated words of selfsup.ARGUMENTS."""
  words = common.words("mae.py", arg, selfsup.ARGUMENTS)
  config = selfsup.base("mae")
  config.total_steps = 3000
  common.log_lines(config, 60)
  config.batch_size = 128
  config.model.update(
    patch_size=4,
    mask_share=0.75,  # of the patches; the encoder does not get them
    decoder_width=64,
    decoder_depth=1,
    decoder_heads=4,
  )
  if "gpu" in words:
    selfsup.gpu(config)
    config.model.update(decoder_depth=2, decoder_width=128)
  if "imagenet" in words:
    selfsup.imagenet(config, "L/16", epochs=400)
    config.model.update(
      positions="sincos2d",
      decoder_width=512, decoder_depth=8, decoder_heads=16,
    )  # fmt: skip
    # As in the published code of 2111.06377.
    config.optim.update(weight_decay=0.05, b2=0.95)
  return selfsup.finish(config, words)
