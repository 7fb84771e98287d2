"""Converts docstrings to Markdown for the reference, and adds sigattn.kernels.

Docstrings contain indented formulas and tables in columns, which Markdown would
join into one line. They name papers by their number at arXiv, and documents by
their path, which become links.
"""

import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

_SECTION = re.compile(r"(Args|Attributes|Examples?|Raises|Returns|Yields):$")
_COLUMNS = re.compile(r"\S {2,}\S")
_FIELD = re.compile(r"\w+(, \w+)*: ")
_ITEM = re.compile(r"[-*] |\d+\. ")


def _linked(line: str) -> str:
  """The line, with links to the papers and documents that it names."""
  line = re.sub(
    r"(?<![\d./])(\d{4}\.\d{5})(?!\d)", r"[\1](https://arxiv.org/abs/\1)", line
  )
  return re.sub(r"(?<!`)\bdocs/(\w+\.md)\b(?!`)", r"[\g<0>](../\1)", line)


def _is_code(line: str) -> bool:
  return line.startswith("  ") or bool(_COLUMNS.search(line))


def _fields(lines: list[str]) -> list[str]:
  """Makes a list of a paragraph in which each line explains a name."""
  out = [""]
  for line in lines:
    name, _, meaning = line.partition(": ")
    is_new = not line.startswith(" ")
    out.append(_linked(f"- `{name}`: {meaning}" if is_new else line))
  return out


def _paragraph(lines: list[str]) -> list[str]:
  """A paragraph, with fences around indented lines and columns."""
  names = [line for line in lines if not line.startswith(" ")]
  if len(names) > 1 and all(map(_FIELD.match, names)):
    return _fields(lines)
  if _ITEM.match(lines[0]):
    return [_linked(line) for line in lines]  # an item's text is indented
  out = []
  for is_code, run in itertools.groupby(lines, _is_code):
    if is_code:
      text = textwrap.dedent("\n".join(run))
      out += ["", "```text", *text.splitlines(), "```", ""]
    else:
      out += map(_linked, run)
  return out


def as_markdown(docstring: str) -> str:
  """A docstring as Markdown, with links, and with fences around formulas."""
  out, paragraph, in_section = [], [], False
  for line in [*docstring.splitlines(), ""]:
    if line and not line.startswith(" "):
      in_section = bool(_SECTION.match(line))
    if line and not in_section:
      paragraph.append(line)
      continue
    if paragraph:
      out += _paragraph(paragraph)
      paragraph = []
    out.append(_linked(line))
  return "\n".join(out).strip()


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
  yield parent
  for member in parent.members.values():
    if not member.is_alias:
      yield from _objects(member)


class Sources(griffe.Extension):
  """Rewrites each docstring, and adds sigattn.kernels."""

  def on_package(
    self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any
  ) -> None:
    """Griffe calls this for each package that it has read."""
    for found in _objects(pkg):
      if found.docstring:
        found.docstring.value = as_markdown(found.docstring.value)
    if pkg.name == "sigattn":
      # Griffe skips a folder that has no __init__.py.
      pkg.set_member("kernels", loader.load("kernels"))
