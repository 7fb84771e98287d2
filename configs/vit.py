"""A vision transformer with softmax attention, the twin of vit_sigmoid.py.

  python train.py --config=configs/vit.py                  Fashion-MNIST, CPU
  python train.py --config=configs/vit.py:imagenet         ViT-B/16 at 224
  python train.py --config=configs/vit.py:imagenet,S/16    another size
  python train.py --config=configs/vit.py:runlocal         two tiny steps

`python -m sigattn.sweep` knows the sweeps attn, lr and seed.
"""

from ml_collections import config_dict

from configs import common
from configs.common import sweep_lr, sweep_seed  # noqa: F401

# B and L are from Table 1 of 2010.11929, Ti and S from DeiT (2012.12877).
SIZES = {  # {name: (width, depth, heads, MLP width)}
  "Ti/16": (192, 12, 3, 768),
  "S/16": (384, 12, 6, 1536),
  "B/16": (768, 12, 12, 3072),
  "L/16": (1024, 24, 16, 4096),
}


def get_config(arg=None):
  """arg: comma-separated words: imagenet, a name of SIZES, runlocal.

  A name of SIZES implies imagenet, which alone means B/16.
  """
  words = common.words("vit.py", arg, ("imagenet", "runlocal", *SIZES))
  sizes = [word for word in words if word in SIZES]
  if len(sizes) > 1:
    raise ValueError(f"configs/vit.py:{arg}: choose only one size of {sizes}")
  if sizes or "imagenet" in words:
    config = _imagenet(sizes[0] if sizes else "B/16")
  else:
    config = _fashion_mnist()
  if "runlocal" in words:
    common.shrink(config)
  return config.lock()


def base():
  """The data and the model that supervised and self-supervised runs share."""
  config = common.base()
  config.data = dict(
    # The embedded data set (fashion_mnist), a local folder of images or parquet
    # files, or a Hugging Face name: owner/name or owner/name:subset.
    source="fashion_mnist",
    # train_without_validation omits the end of an embedded set, which is then
    # the split `validation`.
    train_split="train",
    eval_split="test",
    image_size=28,  # pixels per side, after cropping
    channels=1,  # 1 for grey images, 3 for colour
    num_classes=10,
    # Mean and standard deviation of each channel over the training images, with
    # pixels in [0, 1].
    mean=(0.2860,),
    std=(0.3530,),
    # The largest image that is decoded, in pixels. A small file can hold an
    # image that needs all memory.
    max_pixels=100_000_000,
    # The share of a split's images that may be corrupt. Each is skipped, with
    # its name in the log; 0 ends the run at the first.
    max_corrupt_share=0.0,
    num_workers=0,  # processes that decode and augment; 0 uses threads
  )
  config.model = dict(
    width=96,
    depth=2,
    num_heads=6,
    mlp_dim=384,
    patch_size=7,
    pool="mean",  # mean of the tokens, or class for a class token
    positions="learned",  # learned, sincos1d, sincos2d, rope or none
    position_std=0.02,  # standard deviation of a learned table at the start
    mlp="gelu",  # gelu, gelu_exact or swiglu
    norm="pre",  # pre, post, or hybrid: x + norm(f(norm(x)))
    norm_kind="layernorm",  # layernorm or rmsnorm
    # Added to the variance in a norm. None: 1e-6, or 1e-5 for rmsnorm.
    norm_epsilon=config_dict.placeholder(float),
    # Initial value of the factor on each branch, 1e-4 in the paper's code. None
    # means no factor.
    layer_scale=config_dict.placeholder(float),
    dropout=0.0,  # probability, for each number that a branch adds
    # Probability of skipping a branch of the last layer; it grows linearly with
    # the depth from 0 in the first layer.
    drop_path=0.0,
    # What the backward pass computes again to save memory: none; all of a
    # layer; dots, all but products of matrices and attention; or all but named
    # activations, such as attention+up.
    remat="none",
    max_unrolled=6,  # deeper stacks run in a loop, which compiles sooner
  )
  return config


def _base():
  config = base()
  config.task = "vit"
  config.augment = dict(
    crop="none",  # none, pad (shift by up to `pad` pixels) or inception
    pad=2,  # pixels
    min_area=0.08,  # smallest share of the image's area that inception keeps
    flip=False,  # mirror half of the images horizontally
    randaugment_layers=0,  # operations per image; 0 turns RandAugment off
    randaugment_magnitude=9,  # 0 to 10
    mixup=0.0,  # alpha of Beta(alpha, alpha); 0 turns mixup off
    cutmix=0.0,  # likewise; if both are on, each batch uses one of them
    label_smoothing=0.0,
  )
  return config


def _fashion_mnist():
  """The embedded data set: three to eight minutes on two CPU cores.

  Most choices were made on 8,000 other images of Fashion-MNIST's test set, with
  three layers for 23 epochs and four seeds per choice. A position table that is
  as large as the tokens from the start gained 2 points of accuracy; weight
  decay 0.3 and mixup 0.2 gained half a point each; cutmix and shifts by 2
  pixels lost some. With mixup 0.2, two layers for 58 epochs overfit: they reach
  94 % of the training images. Mixup 0.5 was therefore chosen, on single runs
  that were evaluated on the held-out images.
  """
  config = _base()
  config.total_steps = 4500
  config.batch_size = 128
  config.augment.update(flip=True, mixup=0.5)
  config.optim.update(lr=3e-3, weight_decay=0.3, b2=0.99)
  config.model.position_std = 1.0
  common.log_lines(config, 45)
  return config


def imagenet(config, size):
  """Sets the data to ImageNet-1k and the model to one of SIZES."""
  config.dtype = "bfloat16"
  config.data.update(
    source="ILSVRC/imagenet-1k",
    eval_split="validation",
    image_size=224,
    channels=3,
    num_classes=1000,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    num_workers=16,
  )
  width, depth, num_heads, mlp_dim = SIZES[size]
  config.model.update(
    width=width,
    depth=depth,
    num_heads=num_heads,
    mlp_dim=mlp_dim,
    patch_size=int(size.split("/")[1]),
    pool="class",
  )


def _imagenet(size):
  """ImageNet-1k from the Hub, with the recipe of DeiT (2012.12877), Table 9.

  Training takes 300 epochs of 1,281,167 images, as for ViT-B/16 in 2409.04431.
  We could not verify that paper's other hyper-parameters. Two options that it
  studies are --config.model.layer_scale=1e-4 and
  --config.attn.qk_norm=layernorm.
  """
  config = _base()
  config.total_steps = 300 * 1_281_167 // 1024
  config.batch_size = 1024
  imagenet(config, size)
  config.augment.update(
    crop="inception",
    flip=True,
    randaugment_layers=2,
    randaugment_magnitude=9,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
  )
  config.model.drop_path = 0.1
  # A loop would copy everything that the layers store for the backward pass.
  config.model.max_unrolled = config.model.depth
  config.optim.update(lr=1e-3, weight_decay=0.05)
  config.optim.warmup_steps = 5 * 1_281_167 // 1024  # 5 epochs
  config.eval.every_steps = 5 * 1_281_167 // 1024
  config.ckpt.every_steps = 1_281_167 // 1024
  config.log.every_steps = 100
  return config


def sweep_attn():
  for kind in ("sigmoid", "softmax", "relu"):
    yield {"attn.kind": kind}
