r"""Study 7: a trainable bias for each head.

The paper uses one constant bias for all heads (2409.04431). The gradient of a
trainable bias is the sum of the logits' gradients. This study asks whether a
trainable bias recovers from a bad initial value, and whether it improves a good
one. It trains the one-block language model of attention_norm.py with RoPE, with
the initial values -log n, 0 and -10.

  python -m sigattn.sweep --config=configs/studies/logit_bias.py \
    --sweep=bias,learn,seed

A run took 30 s on an H100 that 15 runs shared. RESULTS.md has the results: a
trainable bias does not improve a good initial value, and does not recover from
a bad one.
"""

from configs.lm import sweep_seed  # noqa: F401
from configs.studies.activations import get_config  # noqa: F401


def sweep_bias():
  for bias in (-6.238, 0.0, -10.0):  # the first is -log 512
    yield {"attn.logit_bias": bias}


def sweep_learn():
  for learn in (False, True):
    yield {"attn.learn_logit_bias": learn}
