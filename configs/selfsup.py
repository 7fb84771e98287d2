"""The fields that simclr.py, byol.py and mae.py share; not a config itself.

Each takes one argument:

  (none)    the embedded Fashion-MNIST, a small model for a CPU
  gpu       all 60,000 images of Fashion-MNIST, for one GPU. They are read from
            the folder into which the Debian package dataset-fashion-mnist
            installs them; --config.data.source names another folder.
  imagenet  the model size of 2409.04431, at 224 pixels
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
  # Pixels per side of the square that is read from an image. Views are cut out
  # of it.
  config.data.canvas_size = 28
  config.augment = dict(
    min_area=0.2,  # the smallest share of the canvas that a view keeps
    flip=True,  # mirror half of the views horizontally
  )
  # Nearest neighbours (1805.01978) evaluate the features during training.
  config.eval.update(
    knn_examples=10_000,  # training images that are searched for neighbours
    knn_neighbours=20,
    knn_temperature=0.07,  # of the neighbours' votes
  )
  config.ckpt.best_metric = "knn_accuracy"
  config.model.position_std = 0.5
  config.optim.update(lr=1e-3, weight_decay=0.05, b2=0.95)
  return config


def two_views(config):
  """Adds the fields of SimCLR and BYOL: changes of colour and projections."""
  config.augment.update(
    # The share of views whose brightness, contrast, saturation and hue change.
    # The next four numbers are the largest changes. Grey images have neither
    # saturation nor hue.
    jitter_share=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey_share=0.2,  # of colour images
    # The probability of a blur for each of the two views.
    blur_shares=(0.5, 0.5),
    blur_size=0.1,  # the kernel's side, as a share of the image's
    solarize_shares=(0.0, 0.0),
  )
  config.model.update(projection_hidden=256, projection_dim=64)


def imagenet(config, size, epochs):
  """ImageNet-1k at 224 pixels, for 2409.04431's three self-supervised rows.

  The size of the encoder and the number of epochs are from 2409.04431: we read
  them from its figure of training losses. We could not verify its other
  settings, and nothing that follows is taken from it.

  SimCLR and BYOL follow the published code of MoCo v3 (2104.02057) for a ViT:
  AdamW with the usual b2, batches of 4096, the learning rate 1.5e-4 for each
  256 images, weight decay 0.1, a warm-up of 40 epochs, and projections of 4096
  and 256 numbers. MAE follows its own published code (2111.06377), which
  differs in weight decay, b2 and decoder: see mae.py. Views and the target's
  momentum are those of each method's own paper.

  Four choices are ours: gradients are clipped to the norm 1; the encoder has a
  class token; each projector has one hidden layer; and views are cut out of the
  middle 256 x 256 pixels of an image whose short side has 256 pixels, whereas
  the papers cut them out of the whole image. We have not trained these configs.
  """
  batch = 4096
  vit.imagenet(config, size)
  config.data.canvas_size = 256
  config.batch_size = batch
  config.total_steps = epochs * EPOCH // batch
  # In a loop over the layers, storing the float32 outputs of the norms takes
  # longer than computing them again, and three times the memory.
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
  common.log_lines(config, 30)


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
