"""Synthetic tasks with softmax attention: the twin of synthetic_sigmoid.py.

  python train.py --config=configs/synthetic.py:recall
  python -m sigattn.sweep --config=configs/synthetic.py:recall --sweep=attn,seed
  python eval.py --workdir=runs/synthetic:pair_repeat/default    longer inputs

The argument is one of summation, pair_repeat, recall, copy (what they are:
sigattn/data/synthetic.py), and runlocal for two tiny steps. Sweeps: attn, lr,
seed.
"""

from ml_collections import config_dict

from configs import common
from configs.common import sweep_attn, sweep_lr, sweep_seed  # noqa: F401


def get_config(arg="recall"):
  """arg: a task of TASKS, and runlocal, joined by commas."""
  words = common.words("synthetic.py", arg, (*TASKS, "runlocal"))
  names = [word for word in words if word in TASKS]
  if len(names) != 1:
    raise ValueError(
      f"configs/synthetic.py:{arg}: one of {(*TASKS,)}, not {names}"
    )
  config = _base()
  config.data.name = names[0]
  TASKS[names[0]](config)
  if "runlocal" in words:
    common.shrink(config)
    config.model.depth = 1
    config.data.eval_examples = 20
  return config.lock()


def _base():
  config = common.base()
  config.task = "synthetic"
  config.total_steps = 3000
  config.batch_size = 64
  config.data = dict(
    name="recall",  # summation, pair_repeat, recall or copy
    length=16,  # numbers, symbols, pairs or symbols, in this order of names
    size=8,  # summation: how many are summed; recall: keys asked for
    vocab_size=64,  # symbols, with those of the task's own
    eval_examples=2000,  # held out
    train_split="train",  # endless
    eval_split="test",
    num_workers=0,  # processes that make batches; 0: none
  )
  config.model = dict(
    width=64,
    depth=2,
    num_heads=4,
    mlp_dim=256,
    positions="sincos",  # sincos (added), rope or none
    # n of sigmoid's -log n. None: the tokens of a training example.
    max_length=config_dict.placeholder(int),
    mlp="gelu",  # gelu or swiglu
    norm="pre",  # pre, post, or hybrid: x + norm(f(norm(x)))
    norm_kind="layernorm",  # layernorm or rmsnorm
    layer_scale=config_dict.placeholder(float),
    dropout=0.0,
    drop_path=0.0,
    remat=False,
  )
  config.eval.length_factors = ()  # eval.py evaluates these lengths too
  config.eval.max_length_of = ("training",)  # there: training, test, or both
  config.optim.update(lr=1e-3, b2=0.98)
  config.log.every_steps = 100
  return config


def _summation(config):
  # Two layers: a mask must fetch its number before they can be summed.
  config.data.update(length=20, size=5)


def _pair_repeat(config):
  config.data.update(length=32, vocab_size=9)
  # Sines of a place beyond the training length have never been seen.
  config.model.positions = "rope"
  config.eval.length_factors = (1, 2, 4, 8)


def _recall(config):
  config.data.update(length=16, size=8, vocab_size=64)
  config.total_steps = 6000


def _copy(config):
  config.data.update(length=24, vocab_size=32)


TASKS = {
  "summation": _summation,
  "pair_repeat": _pair_repeat,
  "recall": _recall,
  "copy": _copy,
}
