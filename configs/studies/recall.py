r"""Study 9: whether sigmoid attention learns to recall, and what helps.

A model may have a good loss and still have lost an ability: 2605.20798 reports
two modifications of attention's output that nearly reach the baseline's loss
and fail on downstream tasks. Its abstract does not say that sigmoid is one of
them. The paper 2409.04431 has no retrieval task.

The task is multi-query associative recall (sigattn/data/synthetic.py): 16 pairs
of a key and a value, then eight of the keys. The model has two layers of width
64. The study trains both kinds with QK norm, hybrid norm, other positions and
other learning rates, and with fewer pairs. It also trains sigmoid with other
biases than the default -log 40 = -3.7, and with each row divided by the number
of keys that it sees.

  python -m sigattn.sweep --config=configs/studies/recall.py \
    --sweep=attn,variant,seed
  python -m sigattn.sweep --config=configs/studies/recall.py --sweep=bias,seed
  python -m sigattn.sweep --config=configs/studies/recall.py \
    --sweep=attn,task,seed
  python -m sigattn.sweep --config=configs/studies/recall.py \
    --sweep=attn,size,seed

A run takes about 3 minutes on one CPU core. It took 84 s on an H100 that 16
runs shared.
"""

from configs import synthetic_sigmoid
from configs.synthetic import sweep_attn, sweep_seed  # noqa: F401


def get_config():
  config = synthetic_sigmoid.get_config("recall")
  config.telemetry.every_steps = 1000
  return config


def sweep_variant():
  yield {}
  yield {"attn.qk_norm": "rmsnorm"}
  yield {"model.norm": "hybrid"}
  yield {"attn.alibi": True}
  yield {"model.positions": "rope"}
  for lr in (3e-3, 1e-2):
    yield {"optim.lr": lr}
    yield {"optim.lr": lr, "model.positions": "rope"}


def _pairs(count):
  return {
    "data.length": count,
    "data.size": count // 2,
    "data.vocab_size": 4 * count,
  }


def sweep_size():
  yield _pairs(4) | {"total_steps": 3000}
  yield _pairs(32)
  yield _pairs(64)


def sweep_sixteen():
  yield _pairs(16)


def sweep_task():
  yield _pairs(16)
  yield _pairs(8)
  yield _pairs(16) | {"data.name": "noisy_recall", "data.vocab_size": 96}
  yield {
    "data.name": "selective_copy",
    "data.length": 48,
    "data.size": 16,
    "data.vocab_size": 18,
  }


def sweep_noisy():
  yield _pairs(8) | {"data.name": "noisy_recall", "data.vocab_size": 48}


def sweep_bias():
  for bias in (0.0, -1.0, -2.0):
    yield {"attn.logit_bias": bias}
  yield {"attn.learn_logit_bias": True}
  yield {"attn.logit_bias": 0.0, "attn.row_power": 1.0}
