r"""Study 5: softmax, sigmoid, ReLU and ReLU squared, and scaled rows.

Claims of the paper: ReLU-like activations are about on par with softmax in
vision (2409.04431, Figure 11). If there is a bias, a factor 1/i or 1/sqrt(i) on
row i of sigmoid(q k^T / sqrt(d)) v is not needed (its Appendix G and its code).

This study uses the one-block language model of attention_norm.py with RoPE,
where row i of causal attention sees i keys. The ReLU kinds are divided by n, as
in 2309.08586.

  python -m sigattn.sweep --config=configs/studies/activations.py \
    --sweep=attn,seed

A run took 42 s on an H100 that 16 runs shared. RESULTS.md has the results.
"""

from configs.lm import sweep_seed  # noqa: F401
from configs.studies import attention_norm


def get_config():
  config = attention_norm.get_config().unlock()
  config.model.positions = "rope"
  return config.lock()


def sweep_attn():
  for kind in ("softmax", "sigmoid", "relu", "relu2"):
    yield {"attn.kind": kind}
  for power in (0.0, 0.5, 1.0):
    yield {"attn.logit_bias": 0.0, "attn.row_power": power}
