r"""Study 1: how sigmoid's bias changes the norm of attention and the loss.

Claims of the paper (2409.04431, Figures 3 to 6): sigmoid attention without a
bias trains badly, because its output is too large at the start. A bias of
-log n keeps the output near softmax's, and so does ALiBi, which makes most
logits negative; sigmoid then trains as well as softmax. A bias of -10 helps
only in part. Sines or RoPE without a bias stay behind softmax.

The paper trains one block of width 3072 on C4 with n = 4096. This study trains
one block of width 128 on the King James text with n = 512, and otherwise
follows the paper's recipe.

  python -m sigattn.sweep --config=configs/studies/attention_norm.py \
    --sweep=positions,bias,seed

A run took 46 s on an H100 that 16 runs shared. RESULTS.md has the results.
"""

from configs import lm
from configs.lm import sweep_seed  # noqa: F401


def get_config():
  """One block: sigmoid, pre-norm LayerNorm and GELU, no decay, no QK norm."""
  config = lm.get_config().unlock()
  config.total_steps = 1500
  config.batch_size = 4
  config.data.length = 512
  config.model.update(
    depth=1,
    mlp="gelu",
    mlp_dim=4 * config.model.width,
    positions="none",
    norm="pre",
    norm_kind="layernorm",
  )
  config.attn.update(kind="sigmoid", alibi=False, qk_norm="none")
  config.optim.update(lr=3e-3, b2=0.95, weight_decay=0.0)
  config.optim.warmup_steps = config.get_ref("total_steps") // 16
  config.eval.every_steps = config.get_ref("total_steps") // 5
  config.log.every_steps = 25
  config.telemetry.every_steps = 100
  return config.lock()


def sweep_positions():
  yield {"model.positions": "sincos"}
  yield {"model.positions": "rope"}
  yield {"attn.alibi": True}


def sweep_bias():
  yield {"attn.kind": "softmax"}
  for bias in (0.0, -10.0, -6.238):  # the last is -log 512
    yield {"attn.logit_bias": bias}
