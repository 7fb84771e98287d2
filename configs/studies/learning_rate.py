r"""Study 3: how the loss depends on the learning rate, for several widths.

Claim of the paper (2409.04431, Appendix; protocol of 2309.14322): without QK
norm, language models with either attention are sensitive to the learning rate;
with QK norm they are much less so.

Model k has k heads of width 64, 2 k layers and MLPs of width 256 k. The
sensitivity is the mean of min(final loss, initial loss) - best loss over the
learning rates. The paper goes up to k = 16 on C4 with n = 512, 16,384 steps and
rates from 3e-4 to 0.3. This study takes k = 1, 2, 4 on the King James text with
RoPE, n = 128 and 1,000 steps.

  python -m sigattn.sweep --config=configs/studies/learning_rate.py \
    --sweep=attn,qk_norm,width,lr

The first line of a run's metrics holds its initial loss. A run that diverges
stops; its final loss is taken to be the initial one.

A run took 17 to 108 s on an H100 that 15 runs shared. RESULTS.md has the
results: the loss depends on the rate without QK norm, and much less with it.
"""

from configs import lm
from configs.lm import sweep_attn, sweep_seed  # noqa: F401


def get_config():
  """Returns the smallest model, k = 1."""
  config = lm.get_config().unlock()
  config.attn.update(kind="sigmoid", alibi=False, qk_norm="none")
  config.total_steps = 1000
  config.batch_size = 16
  config.data.length = 128
  config.log.every_steps = 1
  config.model.update(
    width=64,
    depth=2,
    num_heads=1,
    mlp_dim=256,
    positions="rope",
    mlp="gelu",
    norm="pre",
    norm_kind="layernorm",
  )
  config.optim.update(b2=0.95, weight_decay=0.0)
  config.optim.warmup_steps = config.get_ref("total_steps") // 16
  return config.lock()


def sweep_qk_norm():
  for name in ("none", "layernorm"):
    yield {"attn.qk_norm": name}


def sweep_width():
  for k in (1, 2, 4):
    yield {
      "model.width": 64 * k,
      "model.depth": 2 * k,
      "model.num_heads": k,
      "model.mlp_dim": 256 * k,
    }


def sweep_lr():
  for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
    yield {"optim.lr": lr}
