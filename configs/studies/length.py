r"""Study 8: longer texts than trained on, and whose n the bias is made for.

The paper's models keep the bias of training, -log of the training length, when
what they evaluate is longer (2409.04431; AXLearn's code); a bias of the test's
own length is the other choice. Here: the language model's default, which has
ALiBi and RoPE, and with either of them alone, trained on rows of 256 and
evaluated on rows of 256 to 2048 with both choices.

  python -m sigattn.sweep --config=configs/studies/length.py \
    --sweep=attn,positions,seed
  for run in runs/length/default/*/; do python eval.py --workdir=$run; done

A run and its evaluation took 22 to 75 s and 9 to 90 s on an H100 that 15 runs
shared. RESULTS.md has what came out.
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
