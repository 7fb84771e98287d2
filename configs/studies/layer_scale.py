r"""Study 2: LayerScale, QK norm and the bias in a vision transformer.

Claims of the paper (2409.04431, Figures 7 to 9; ViT-B/16 on ImageNet-1k,
n = 196): in vision, sigmoid needs LayerScale, which starts at 1e-4. With
LayerScale it needs no bias, and it trains well with and without QK norm.

This study trains four layers of width 96 on Fashion-MNIST with n = 49, and
compares with softmax.

  python -m sigattn.sweep --config=configs/studies/layer_scale.py \
    --sweep=attn,layer_scale,qk_norm,seed

Add lr to the sweep to measure the sensitivity to the learning rate.

A run took 71 s on an H100 that 16 runs shared. RESULTS.md has the results.
"""

from configs import vit
from configs.vit import sweep_seed  # noqa: F401


def get_config():
  config = vit.get_config().unlock()
  config.attn.kind = "sigmoid"
  config.total_steps = 1000
  config.model.update(depth=4, patch_size=4)
  config.optim.lr = 2e-3
  return config.lock()


def sweep_attn():
  yield {"attn.kind": "softmax"}
  yield {"attn.kind": "sigmoid"}
  yield {"attn.logit_bias": 0.0}


def sweep_layer_scale():
  yield {}
  yield {"model.layer_scale": 1e-4}


def sweep_qk_norm():
  for name in ("none", "layernorm"):
    yield {"attn.qk_norm": name}


def sweep_lr():
  for lr in (1e-3, 4e-3, 1.6e-2):
    yield {"optim.lr": lr}
