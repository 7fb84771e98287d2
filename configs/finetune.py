"""Supervised training of a vision transformer that starts from another run.

  python train.py --config=configs/finetune.py:runs/mae_sigmoid/default
  python eval.py --workdir=runs/mae_sigmoid/default --eval=finetune

Data, model and attention are those of the run, which was trained by vit.py,
simclr.py, byol.py or mae.py. --config.init_from=None trains the same model from
random parameters.
"""

import os

from configs import vit
from configs.common import sweep_lr, sweep_seed  # noqa: F401
from sigattn.training import run_dir


def get_config(arg=None):
  """arg: the folder of the run."""
  if not arg:
    raise ValueError(
      f"configs/finetune.py:{arg or ''}: name the folder of a run, as in "
      "configs/finetune.py:runs/mae/default"
    )
  theirs = run_dir.load_config(arg)
  config = vit.get_config().unlock()
  for part in ("data", "model", "attn"):
    for key in config[part]:
      if key not in theirs[part]:
        raise ValueError(
          f"configs/finetune.py:{arg}: is a run of the task {theirs.task!r}, "
          f"whose config.{part} has no {key!r}; must be of images"
        )
      config[part][key] = theirs[part][key]
  config.seed, config.dtype = theirs.seed, theirs.dtype
  config.init_from = os.fspath(arg)
  config.batch_size = theirs.batch_size
  config.total_steps = 1000
  config.optim.update(lr=5e-4, weight_decay=0.05)
  if theirs.data.image_size >= 64:  # photographs, as for imagenet
    config.augment.update(crop="inception", flip=True, mixup=0.8, cutmix=1.0)
  return config.lock()
