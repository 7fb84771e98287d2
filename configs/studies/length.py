r"""Study 8: texts longer than those of training, and the n of the bias.

When the paper's models are evaluated on longer texts, they keep the bias -log n
with the n of training (2409.04431; AXLearn's code). The alternative is the n of
the evaluated text.

This study trains the default language model on rows of 256, with ALiBi and
RoPE as by default, and with either of them alone. It evaluates the models on
rows of 256 to 2048, with both choices of n.

  python -m sigattn.sweep --config=configs/studies/length.py \
    --sweep=attn,positions,seed
  for run in runs/length/default/*/; do python eval.py --workdir=$run; done

A run and its evaluation took 22 to 75 s and 9 to 90 s on an H100 that 15 runs
shared. RESULTS.md has the results.
"""

from configs import lm
from configs.lm import sweep_attn, sweep_seed  # noqa: F401


def get_config():
  config = lm.get_config().unlock()
  config.attn.kind = "sigmoid"
  config.total_steps = 1500
  config.data.length = 256
  config.eval.max_length_of = ("training", "test")
  return config.lock()


def sweep_positions():
  yield {"attn.alibi": True, "model.positions": "rope"}
  yield {"attn.alibi": True, "model.positions": "none"}
  yield {"attn.alibi": False, "model.positions": "rope"}


def sweep_rope():
  yield {
    "attn.alibi": False,
    "model.positions": "rope",
    "eval.length_factors": (1, 2, 4, 8, 16),
    "eval.max_length_of": ("training",),
  }


def sweep_alibi():
  yield {
    "attn.alibi": True,
    "model.positions": "none",
    "eval.length_factors": (1, 2, 4, 8, 16),
    "eval.max_length_of": ("training",),
  }


def sweep_window():
  yield {}
  yield {"attn.window": 255}  # 256 keys with the token's own
