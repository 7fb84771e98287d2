r"""Study 7: a bias that is trained, one for each head.

The paper keeps one constant bias for all heads (2409.04431); its gradient is
the sum of the logits' gradients. The question here: does a trained bias find
its way from a bad start, and does it gain anything from a good one? The
one-block language model of attention_norm.py with RoPE, from -log n, 0, -10.

  python -m sigattn.sweep --config=configs/studies/logit_bias.py \
    --sweep=bias,learn,seed

A run took 30 s on an H100 that 15 runs shared. RESULTS.md has what came out:
it gains nothing from a good start and does not find its way from a bad one.
"""

from configs.lm import sweep_seed  # noqa: F401
from configs.studies.activations import get_config  # noqa: F401


def sweep_bias():
  for bias in (-6.238, 0.0, -10.0):  # the first is -log 512
    yield {"attn.logit_bias": bias}


def sweep_learn():
  for learn in (False, True):
    yield {"attn.learn_logit_bias": learn}
