r"""Study 9: whether sigmoid attention learns to recall, and what helps.

Later work reports that sigmoid matches softmax's loss and loses its retrieval
(2605.20798). Multi-query associative recall (sigattn/data/synthetic.py): 16
pairs of a key and a value, then eight of the keys; two layers of width 64. The
paper has no such task.

  python -m sigattn.sweep --config=configs/studies/recall.py \
    --sweep=variant,seed

MINUTES
"""

from configs import synthetic_sigmoid
from configs.synthetic import sweep_seed  # noqa: F401


def get_config():
  return synthetic_sigmoid.get_config("recall")


def sweep_variant():
  yield {"attn.kind": "softmax"}
  yield {"attn.kind": "sigmoid"}
  yield {"attn.kind": "relu"}
  for bias in (0.0, -1.0, -2.0):  # the default is -log 40 = -3.7
    yield {"attn.logit_bias": bias}
  yield {"attn.learn_logit_bias": True}
  yield {"attn.qk_norm": "rmsnorm"}
  yield {"model.norm": "hybrid"}
  yield {"model.positions": "rope"}
  yield {"attn.alibi": True}
  for lr in (3e-3, 1e-2):
    yield {"optim.lr": lr}
