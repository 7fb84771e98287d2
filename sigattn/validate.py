"""What a config may hold: tables of fields, and rules between them.

Each module that reads a config has one table beside the code that reads it:

  FIELDS = {
    "model.width": whole(low=1),
    "model.mlp": choice(MLPS),
    "model.layer_scale": real(above=0, optional=True),
  }

If fields depend on each other, the module also has RULES: functions of the
config that raise ValueError. `fields` applies both before any work starts. An
error names the path, the value and what would be right.

Ranges are wide. They end where a value loses its meaning: float32 rounds it to
0 or infinity, it does not fit the machine's integers, or no machine has the
memory that it asks for.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from sigattn import extras

extras.require("train")

from ml_collections import ConfigDict

Rule = Callable[[ConfigDict], None]


class Field(NamedTuple):
  """What one value of a config may be.

  is_right: a function that returns True for a right value.
  wanted: the end of an error, which says what would be right.
  """

  is_right: Callable[[Any], bool]
  wanted: str


def fields(
  config: ConfigDict, table: Mapping[str, Field], rules: Collection[Rule] = ()
) -> None:
  """Raises ValueError for the first field or rule that the config breaks.

  table: Fields by their path, such as "model.width". rules: are called with the
  config after all fields have been found right.
  """
  for path, field in table.items():
    value = value_at(config, path)
    if not field.is_right(value):
      raise ValueError(f"config.{path}={_shown(value)}; {field.wanted}")
  for rule in rules:
    rule(config)


def value_at(config: ConfigDict, path: str) -> Any:
  """The value at a path. Raises ValueError if the config has no such field."""
  node = config
  for key in path.split("."):
    if not isinstance(node, ConfigDict) or key not in node:
      raise ValueError(f"config.{path} is missing; see configs/")
    node = node[key]
  return node


def _shown(value):
  """The value as text; only the beginning and the end of a long one."""
  try:
    text = repr(value)
  except ValueError:  # Python does not print an int of thousands of digits.
    text = f"an int of {value.bit_length()} bits"
  return text if len(text) <= 400 else f"{text[:200]} ... {text[-100:]}"


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
    if value is None:
      return optional
    # True == 1 == 1.0, but only one of them is a number of channels.
    return any(
      isinstance(value, type(x)) and not isinstance(value, bool) and value == x
      for x in choices
    )

  return Field(is_right, f"choose from {shown}")


def flag() -> Field:
  """True or False."""
  return Field(lambda value: isinstance(value, bool), "must be True or False")


# Longer than a path or a name of the Hub may be.
_MAX_TEXT = 4096


def text(*, optional: bool = False) -> Field:
  """A string that is not empty and could be the name of a file."""

  def is_right(value):
    return (
      isinstance(value, str)
      and 0 < len(value) <= _MAX_TEXT
      and "\0" not in value
      and _is_unicode(value)
    )

  wanted = f"must be a string that is not empty, at most {_MAX_TEXT} long"
  return _optional(Field(is_right, wanted), optional)


def regex() -> Field:
  """A regular expression that compiles."""

  def is_right(value):
    try:
      return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
      return False

  return Field(is_right, "must be a regular expression")


def zero_or(field: Field) -> Field:
  """The number 0, which turns something off, or what `field` allows."""

  def is_right(value):
    return field.is_right(value) or (_is_real(value) and value == 0)

  return Field(is_right, f"{field.wanted}, or 0")


def sequence(
  of: Field, wanted: str, *, empty: bool = False, longest: int = 1000
) -> Field:
  """A tuple or list whose values are each right by `of`.

  wanted: what an error says each value must be. empty: whether it may be empty.
  longest: the largest number of values.
  """

  def is_right(values):
    return (
      isinstance(values, (tuple, list))
      and (empty or len(values) > 0)
      and len(values) <= longest
      and all(map(of.is_right, values))
    )

  some = "" if empty else ", at least one"
  return Field(
    is_right, f"must be a tuple of {wanted}{some} and at most {longest} of them"
  )


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


_MAX_REAL = 1e38  # Everything is computed in float32, which ends at 3.4e38.


def _is_real(value):
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  # This also refuses NaN, because NaN is not below anything.
  return is_number and abs(value) <= _MAX_REAL


def _is_unicode(value):
  try:
    value.encode()
  except UnicodeEncodeError:  # half of a surrogate pair
    return False
  return True


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
  """A rule: the value at `path` divides that at `whole_path`, or is None."""

  def rule(config):
    value, total = value_at(config, path), value_at(config, whole_path)
    if value is not None and total % value:
      raise ValueError(
        f"config.{path}={value!r}; must divide config.{whole_path}={total!r}"
      )

  return rule
