"""What a config may hold: tables of fields, and rules between them.

Each module that reads a config has one table beside the code that reads it,

  FIELDS = {
    "model.width": whole(low=1),
    "model.mlp": choice(MLPS),
    "model.layer_scale": real(above=0, optional=True),
  }

and, where fields depend on each other, RULES: functions of the config that
raise ValueError. `fields` applies both, before any work starts. An error
names the path, the value and what would be right.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from sigattn import extras

extras.require("train")

from ml_collections import ConfigDict

Rule = Callable[[ConfigDict], None]


class Field(NamedTuple):
  """What one value of a config may be.

  is_right: a function of the value, True where the value is right.
  wanted: what an error says would be right, after the value.
  """

  is_right: Callable[[Any], bool]
  wanted: str


def fields(
  config: ConfigDict, table: Mapping[str, Field], rules: Collection[Rule] = ()
) -> None:
  """Raises ValueError for the first field or rule that the config breaks.

  table: Fields by path, "model.width". rules: called with the config after all
  fields were found right.
  """
  for path, field in table.items():
    value = value_at(config, path)
    if not field.is_right(value):
      raise ValueError(f"config.{path}={value!r}; {field.wanted}")
  for rule in rules:
    rule(config)


def value_at(config: ConfigDict, path: str) -> Any:
  """The value at a path; ValueError where the config has no such field."""
  node = config
  for key in path.split("."):
    if key not in node:
      raise ValueError(f"config.{path} is missing; see configs/")
    node = node[key]
  return node


# Fields.


def whole(
  low: int | None = None, high: int | None = None, *, optional: bool = False
) -> Field:
  """An int with low <= value <= high."""
  return _number("a whole number", _is_whole, low, high, optional=optional)


def real(
  low: float | None = None,
  high: float | None = None,
  *,
  above: float | None = None,
  below: float | None = None,
  optional: bool = False,
) -> Field:
  """A finite number with low <= value <= high and above < value < below."""
  return _number(
    "a finite number", _is_real, low, high, above, below, optional=optional
  )


def choice(choices: Collection[Any], *, optional: bool = False) -> Field:
  """One of the choices, which may be the keys of a dict."""
  shown = [None] * optional + sorted(choices)

  def is_right(value):
    return value is None if optional and value is None else value in choices

  return Field(is_right, f"choose from {shown}")


def flag() -> Field:
  """True or False."""
  return Field(lambda value: isinstance(value, bool), "must be True or False")


def text(*, optional: bool = False) -> Field:
  """A string that is not empty."""
  return _optional(
    Field(
      lambda value: isinstance(value, str) and bool(value),
      "must be a string that is not empty",
    ),
    optional,
  )


def sequence(of: Field, wanted: str, *, empty: bool = False) -> Field:
  """A tuple or list of values that are each right by `of`.

  wanted: what an error says each value must be. empty: whether none will do.
  """

  def is_right(values):
    return (
      isinstance(values, (tuple, list))
      and (empty or len(values) > 0)
      and all(map(of.is_right, values))
    )

  some = "" if empty else ", at least one"
  return Field(is_right, f"must be a tuple of {wanted}{some}")


def items(*of: Field) -> Field:
  """A tuple or list with one value for each of the given fields."""

  def is_right(values):
    return (
      isinstance(values, (tuple, list))
      and len(values) == len(of)
      and all(f.is_right(x) for f, x in zip(of, values, strict=True))
    )

  return Field(is_right, f"must be {len(of)} values")


def _is_whole(value):
  return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value):
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def _number(name, is_number, low, high, above=None, below=None, *, optional):
  bounds = [
    (low, ">=", lambda value: value >= low),
    (above, ">", lambda value: value > above),
    (high, "<=", lambda value: value <= high),
    (below, "<", lambda value: value < below),
  ]
  given = [bound for bound in bounds if bound[0] is not None]
  words = [f"{sign} {bound}" for bound, sign, _ in given]

  def is_right(value):
    return is_number(value) and all(holds(value) for _, _, holds in given)

  wanted = " ".join(["must be", name, " and ".join(words)]).strip()
  return _optional(Field(is_right, wanted), optional)


def _optional(field, optional):
  if not optional:
    return field
  return Field(
    lambda value: value is None or field.is_right(value),
    f"{field.wanted}, or None",
  )


# Rules.


def divides(path: str, whole_path: str) -> Rule:
  """The value at `path` divides the one at `whole_path`; None is right."""

  def rule(config):
    value, total = value_at(config, path), value_at(config, whole_path)
    if value is not None and total % value:
      raise ValueError(
        f"config.{path}={value!r}; must divide config.{whole_path}={total!r}"
      )

  return rule
