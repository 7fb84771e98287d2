r"""Study 4: a norm after each branch, for short and for long sequences.

Claim of the paper (2409.04431, Table 3): with a billion parameters, ALiBi and
n = 4096, sigmoid is a little behind softmax, and hybrid norm,
x + norm(f(norm(x))), closes the gap.

This study trains the default language model of four layers on the King James
text, with ALiBi alone. Each update has 2048 tokens, in rows of 128 or of 2048.
The default learning rate was tuned with hybrid norm, so the sweep also has a
lower one.

  python -m sigattn.sweep --config=configs/studies/hybrid_norm.py \
    --sweep=attn,norm,length,lr,seed

A run took 39 s on an H100 that 15 runs shared. RESULTS.md has the results:
the gap exists, and hybrid norm does not close it.
"""

from configs import lm
from configs.lm import sweep_attn, sweep_seed  # noqa: F401


def get_config():
  config = lm.get_config().unlock()
  config.attn.update(kind="sigmoid", alibi=True)
  config.model.positions = "none"
  config.total_steps = 1000
  return config.lock()


def sweep_norm():
  for norm in ("pre", "hybrid"):
    yield {"model.norm": norm}


def sweep_length():
  for length in (128, 2048):
    yield {"data.length": length, "batch_size": 2048 // length}


def sweep_lr():
  for lr in (5e-3, 2e-3):
    yield {"optim.lr": lr}


def _gap(length):
  """Pre-norm, and 8,192 tokens an update at every length."""
  return {
    "data.length": length,
    "batch_size": 8192 // length,
    "model.norm": "pre",
    "total_steps": 400,
    "dtype": "bfloat16",
    "eval.length_factors": (),
    # The weights of softmax take 1 GiB a layer at 8,192.
    "model.remat": "all" if length == 8192 else "none",
  }


def sweep_gap():
  for length in (2048, 512, 128, 8192):
    yield _gap(length)


def sweep_gap_of_512():
  yield _gap(512)


def sweep_gap_positions():
  for alibi in (False, True):
    yield _gap(2048) | {"attn.alibi": alibi, "model.positions": "rope"}
