"""A language model with sigmoid attention (2409.04431): lm.py's twin."""

from configs import common, lm


def get_config(arg=None):
  return common.sigmoid(lm.get_config(arg))
