"""Synthetic tasks with softmax attention, the twins of synthetic_sigmoid.py.

  python train.py --config=configs/synthetic.py:recall
  python -m sigattn.sweep --config=configs/synthetic.py:recall --sweep=attn,seed
  python eval.py --workdir=runs/synthetic:pair_repeat/default    longer inputs

The argument is one of summation, pair_repeat, recall, noisy_recall, copy and
selective_copy, which sigattn/data/synthetic.py describes, and runlocal for two
tiny steps.
`python -m sigattn.sweep` knows the sweeps attn, lr and seed.
"""

from ml_collections import config_dict

from configs import common
from configs.common import sweep_attn, sweep_lr, sweep_seed  # noqa: F401


def get_config(arg="recall"):
  """arg: comma-separated words: one of TASKS, and runlocal."""
  words = common.words("synthetic.py", arg, (*TASKS, "runlocal"))
  names = [word for word in words if word in TASKS]
  if len(names) != 1:
    raise ValueError(
      f"configs/synthetic.py:{arg}: choose exactly one of {(*TASKS,)}, not "
      f"{names}"
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
    name="recall",  # one of TASKS
    # How many numbers summation has, how many tokens a string of pair_repeat,
    # copy and selective_copy has, or how many pairs recall and noisy_recall
    # have.
    length=16,
    # How many numbers summation adds up, how many queries recall and
    # noisy_recall have, or how many symbols selective_copy repeats.
    size=8,
    vocab_size=64,  # symbols, including start and separator; not for summation
    eval_examples=2000,  # held-out examples
    train_split="train",  # has no end
    eval_split="test",  # validation or test
    num_workers=0,  # processes that make batches; 0 makes them in this one
  )
  config.model = dict(
    width=64,
    depth=2,
    num_heads=4,
    mlp_dim=256,
    positions="sincos",  # sincos (added), rope or none
    # The n of sigmoid's bias -log n. None means the number of tokens of a
    # training example.
    max_length=config_dict.placeholder(int),
    mlp="gelu",  # gelu, gelu_exact or swiglu
    norm="pre",  # pre, post, or hybrid: x + norm(f(norm(x)))
    norm_kind="layernorm",  # layernorm or rmsnorm
    # Added to the variance in a norm. None: 1e-6, or 1e-5 for rmsnorm.
    norm_epsilon=config_dict.placeholder(float),
    layer_scale=config_dict.placeholder(float),
    dropout=0.0,
    drop_path=0.0,
    remat="none",
    max_unrolled=6,
  )
  # eval.py also evaluates at these multiples of the training length.
  config.eval.length_factors = ()
  # The n of sigmoid's bias in these evaluations: the length of training, of the
  # test, or one after the other.
  config.eval.max_length_of = ("training",)
  config.optim.update(lr=1e-3, b2=0.98)
  common.log_lines(config, 30)
  return config


def _summation(config):
  # The task needs two layers: each 1 of the mask must first fetch its number.
  config.data.update(length=20, size=5)


def _pair_repeat(config):
  config.data.update(length=32, vocab_size=9)
  # RoPE, because the sines of positions beyond the training length are new to
  # the model.
  config.model.positions = "rope"
  config.eval.length_factors = (1, 2, 4, 8)


def _recall(config):
  config.data.update(length=16, size=8, vocab_size=64)
  config.total_steps = 6000
  common.log_lines(config, 60)


def _noisy_recall(config):
  _recall(config)
  config.data.vocab_size = 96


def _copy(config):
  config.data.update(length=24, vocab_size=32)


def _selective_copy(config):
  config.data.update(length=48, size=16, vocab_size=18)


TASKS = {
  "summation": _summation,
  "pair_repeat": _pair_repeat,
  "recall": _recall,
  "noisy_recall": _noisy_recall,
  "copy": _copy,
  "selective_copy": _selective_copy,
}
