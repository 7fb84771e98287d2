r"""Language models of 85 million parameters on real text, one for each form.

The shape is that of configs/lm.py:85m, on rows of 2,048 tokens of the corpus
that `python -m benchmarks.corpus --out=corpus` builds: manuals, prose and code.

  python train.py --config=configs/lm_85m.py:sigmoid
  python train.py --config=configs/lm_85m.py:softmax,runlocal

`python -m benchmarks.lm_85m` trains and measures all forms of FORMS. A run has
1,526 updates of 32 rows, 100 million tokens. All forms have RoPE and no ALiBi,
so that softmax can use cuDNN, its fastest implementation.
"""

from configs import common, lm
from configs.common import sweep_seed  # noqa: F401

FORMS = {
  "softmax": {"attn.kind": "softmax", "attn.implementation": "cudnn"},
  "sigmoid": {"attn.kind": "sigmoid"},
  "normalized": {"attn.kind": "sigmoid", "attn.normalize": True},
  # The weight of a logit u far below 14 is then e^u times a constant, as in
  # softmax.
  "normalized_low_bias": {
    "attn.kind": "sigmoid",
    "attn.normalize": True,
    "attn.logit_bias": -14.0,
  },
}


def get_config(arg=None):
  """arg: comma-separated words: a name of FORMS, and runlocal."""
  words = common.words("lm_85m.py", arg, ("runlocal", *FORMS))
  forms = [word for word in words if word != "runlocal"]
  if len(forms) != 1:
    raise ValueError(f"configs/lm_85m.py:{arg}: choose one of {[*FORMS]}")
  config = lm.get_config("85m").unlock()
  config.total_steps = 1526
  config.batch_size = 32
  config.data.update(
    source="corpus/tokens",
    mixture=(),
    eval_source=None,
    eval_split="validation",
    tokenizer="corpus/tokens/tokenizer.json",
    length=2048,
  )
  config.attn.alibi = False
  config.model.positions = "rope"
  # By XLA's count a step then needs 26 GiB of a card.
  config.model.remat = "none"
  config.update_from_flattened_dict(FORMS[forms[0]])
  config.optim.lr = 4e-3
  config.optim.warmup_steps = config.get_ref("total_steps") // 20
  config.eval.every_steps = config.get_ref("total_steps") // 4
  config.eval.length_factors = (1, 2, 4)
  config.ckpt.every_steps = config.get_ref("total_steps") // 3
  # Each update, because a mean over several would hide a spike.
  config.log.update(every_steps=1, tensorboard=False)
  config.telemetry.update(every_steps=100, examples=2)
  if "runlocal" in words:
    common.shrink(config)
    config.attn.implementation = None  # cuDNN needs a GPU
    config.dtype = "float32"  # faster on a CPU
    config.data.length = 128
    config.model.loss_chunks = 1
    config.telemetry.every_steps = 0
  return config.lock()


def sweep_lr():
  for lr in (6e-4, 1.5e-3, 4e-3, 1e-2):
    yield {"optim.lr": lr}
