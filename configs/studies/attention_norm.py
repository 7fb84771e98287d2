r"""Study 1: what sigmoid's bias does to the norm of attention, and to the loss.

The claim: sigmoid attention trained badly because its output starts too large;
a bias of -log n, or ALiBi, which makes most logits negative, keeps it near
softmax's, and then it trains as well. A bias of -10 helps only in part, and
sines or RoPE without a bias stay behind softmax (2409.04431, Figures 3 to 6).
There: one block of width 3072 on C4, n = 4096. Here: one of width 128 on the
King James text, n = 512, its recipe otherwise.

  python -m sigattn.sweep --config=configs/studies/attention_norm.py \
    --sweep=positions,bias,seed

A run took 46 s on an H100 that 16 runs shared. RESULTS.md has what came out.
"""

from configs import lm
from configs.lm import sweep_seed  # noqa: F401


def get_config():
  """One block: pre-norm LayerNorm, GELU, no decay, no QK norm; sigmoid."""
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
