"""Refusing a bad config: its path, its value and what would be right."""

import math


def choice(config, path, choices, optional=False):
  """ValueError unless the value at `path` is one of `choices` (or None)."""
  value = _value(config, path)
  if value is None and optional:
    return
  if value not in choices:
    none = ["None"] if optional else []
    raise ValueError(
      f"config.{path}={value!r}; choose from {none + sorted(choices)}"
    )


def number(config, path, low=None, high=None, above=None, optional=False):
  """ValueError unless low <= value <= high and value > above."""
  value = _value(config, path)
  if value is None and optional:
    return
  bounds = [
    (low is not None, f">= {low}", lambda: value >= low),
    (above is not None, f"> {above}", lambda: value > above),
    (high is not None, f"<= {high}", lambda: value <= high),
  ]
  wanted = [text for given, text, _ in bounds if given]
  # NaN compares false, so it is refused wherever there is a bound.
  if value is None or not all(ok() for given, _, ok in bounds if given):
    raise ValueError(f"config.{path}={value!r}; must be {' and '.join(wanted)}")


def divides(config, path, whole_path):
  """ValueError unless the value at `path` divides the one at `whole_path`."""
  value, whole = _value(config, path), _value(config, whole_path)
  if whole % value:
    raise ValueError(
      f"config.{path}={value!r}; must divide config.{whole_path}={whole!r}"
    )


def finite(config, path):
  """ValueError for an infinity or NaN at `path`; None is well."""
  value = _value(config, path)
  if value is not None and not math.isfinite(value):
    raise ValueError(f"config.{path}={value!r}; must be finite")


def below_one(config, path):
  """ValueError unless 0 <= value < 1."""
  value = _value(config, path)
  if not 0 <= value < 1:
    raise ValueError(f"config.{path}={value!r}; must be >= 0 and < 1")


def _value(config, path):
  for key in path.split("."):
    config = config[key]
  return config
