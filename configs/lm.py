"""A language model with softmax attention: the twin of lm_sigmoid.py."""

from ml_collections import config_dict

from configs import common


def get_config(arg=None):
  config = common.base()
  config.task = "lm"
  config.total_steps = 3000
  config.batch_size = 32
  config.data = dict(
    source="kjv",
    train_split="train",
    eval_split="test",
    length=256,
    vocab_size=64,
    num_workers=0,
  )
  config.model = dict(
    width=128,
    depth=4,
    num_heads=4,
    mlp_dim=344,
    positions="none",
    mlp="swiglu",
    norm="hybrid",
    norm_kind="rmsnorm",
    layer_scale=config_dict.placeholder(float),
    drop_path=0.0,
    remat=False,
  )
  config.attn.update(alibi=True, qk_norm="rmsnorm")
  config.optim.update(lr=3e-3, b2=0.98, weight_decay=0.1, decay_groups=((r".*kernel|embed", 1.0),))
  config.eval.length = config_dict.placeholder(int)
  config.ckpt.update(best_metric="loss", best_mode="min")
  config.log.every_steps=100
  return config.lock()
