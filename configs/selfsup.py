"""What simclr.py, byol.py and mae.py share; no config by itself.

Each takes one argument:

  (none)    the embedded Fashion-MNIST, a small model for a CPU
  gpu       all 60,000 images of Fashion-MNIST, for one GPU. They are read from
            where the Debian package dataset-fashion-mnist installs them;
            --config.data.source names another folder.
  imagenet  the size that 2409.04431 trains, at 224 pixels
  runlocal  two tiny steps
"""

from configs import common, vit

ARGUMENTS = ("gpu", "imagenet", "runlocal")
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
EPOCH = 1_281_167  # images of ImageNet-1k


def base(task):
  """The fields that the three tasks share, with the embedded data."""
  config = vit.base()
  config.task = task
  # Pixels per side of what is read of an image; views are cut out of it.
  config.data.canvas_size = 28
  config.augment = dict(
    min_area=0.2,  # the smallest share of the canvas that a view keeps
    flip=True,  # mirror half of the views horizontally
  )
  # Nearest neighbours (1805.01978) evaluate the features during training.
  config.eval.update(
    knn_examples=10_000,  # training images among which they are looked for
    knn_neighbours=20,
    knn_temperature=0.07,  # of their votes
  )
  config.ckpt.best_metric = "knn_accuracy"
  config.model.position_std = 0.5
  config.optim.update(lr=1e-3, weight_decay=0.05, b2=0.95)
  return config


def two_views(config):
  """Adds what SimCLR and BYOL read: changes of colour, and projections."""
  config.augment.update(
    # The share of views whose brightness, contrast, saturation and hue change,
    # each by at most so much. Grey images have neither saturation nor hue.
    jitter_share=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey_share=0.2,  # of colour images
    # A share for each of the two views.
    blur_shares=(0.5, 0.5),
    blur_size=0.1,  # the kernel's side, as a share of the image's
    solarize_shares=(0.0, 0.0),
  )
  config.model.update(projection_hidden=256, projection_dim=64)


def imagenet(config, size, epochs):
  """ImageNet-1k at 224 pixels, for 2409.04431's three self-supervised rows.

  From 2409.04431: the size of the encoder and the number of epochs, which are
  read off its figure of training losses. Its other settings could not be
  verified, and none of what follows is taken from it.

  From the published code of MoCo v3 (2104.02057), for SimCLR and BYOL with a
  ViT: AdamW with the usual b2, batches of 4096, the learning rate 1.5e-4 for
  each 256 images, weight decay 0.1, a warm-up of 40 epochs, and projections of
  4096 and 256 numbers. That of MAE (2111.06377) has the same but for its weight
  decay, b2 and decoder: see mae.py. Views and the target's momentum are those
  of each method's own paper.

  Ours: gradients are clipped to the norm 1, a class token, one hidden layer in
  each projector, and views that are cut out of the middle 256 x 256 pixels of
  an image whose short side has 256, where the papers cut them out of the whole
  image. Nobody has trained these configs here.
  """
  batch = 4096
  vit.imagenet(config, size)
  config.data.canvas_size = 256
  config.batch_size = batch
  config.total_steps = epochs * EPOCH // batch
  # To keep what float32 norms make, for every layer of a loop, takes longer
  # than to compute it again, and three times the memory.
  config.model.update(position_std=0.02, remat="dots")
  config.optim.update(lr=1.5e-4 * batch / 256, weight_decay=0.1, b2=0.999)
  config.optim.warmup_steps = 40 * EPOCH // batch
  config.eval.every_steps = 10 * EPOCH // batch
  config.ckpt.every_steps = EPOCH // batch
  config.log.every_steps = 100


def gpu(config):
  """All of Fashion-MNIST: 49 patches, four layers, 25 epochs."""
  config.data.source = FASHION_MNIST
  config.total_steps = 3000
  config.batch_size = 512
  config.dtype = "bfloat16"
  config.model.update(
    width=128, depth=4, num_heads=4, mlp_dim=512, patch_size=4
  )
  config.eval.every_steps = 600
  config.log.every_steps = 100


def finish(config, words):
  """Applies runlocal, and locks."""
  if "runlocal" in words:
    common.shrink(config)
    config.eval.update(knn_examples=16, knn_neighbours=4)
  return config.lock()


def sweep_attn():
  yield {"attn.kind": "softmax"}
  yield {"attn.kind": "sigmoid"}
  yield {"attn.kind": "sigmoid", "attn.normalize": True}
