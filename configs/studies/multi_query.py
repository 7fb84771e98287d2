r"""Study 6: fewer heads for keys and values than for queries.

Claim of the paper (2409.04431, Figure 9; ViT-B/16 on ImageNet-1k): sigmoid
works with multi-query attention as well as softmax does.

This study trains the vision transformer of layer_scale.py with six heads for
queries, and six, two or one for keys and values.

  python -m sigattn.sweep --config=configs/studies/multi_query.py \
    --sweep=attn,heads,seed

A run took 63 s on an H100 that 15 runs shared. RESULTS.md has the results.
"""

from configs.lm import sweep_attn, sweep_seed  # noqa: F401
from configs.studies.layer_scale import get_config  # noqa: F401


def sweep_heads():
  for heads in (6, 2, 1):
    yield {"attn.num_kv_heads": heads}
