r"""Study 6: fewer heads of keys and values.

The claim: sigmoid goes with multi-query attention as softmax does (2409.04431,
Figure 9, ViT-B/16 on ImageNet-1k). Here: the vision transformer of
layer_scale.py, six heads of queries and six, two or one of keys and values.

  python -m sigattn.sweep --config=configs/studies/multi_query.py \
    --sweep=attn,heads,seed

A run took 63 s on an H100 that 15 runs shared. RESULTS.md has what came out.
"""

from configs.lm import sweep_attn, sweep_seed  # noqa: F401
from configs.studies.layer_scale import get_config  # noqa: F401


def sweep_heads():
  for heads in (6, 2, 1):
    yield {"attn.num_kv_heads": heads}
