"""An acoustic encoder with sigmoid attention (2409.04431).

It is the twin of speech.py.

  python train.py --config=configs/speech_sigmoid.py
  python -m sigattn.sweep --config=configs/speech_sigmoid.py --sweep=attn,seed

Arguments, sizes and sweeps are those of speech.py.
"""

from configs import common, speech
from configs.speech import sweep_attn, sweep_lr, sweep_seed  # noqa: F401


def get_config(arg=None):
  return common.sigmoid(speech.get_config(arg))
