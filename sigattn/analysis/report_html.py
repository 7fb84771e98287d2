"""One HTML page of tables and figures, readable on a screen and on paper.

It needs no network: its style stands in it, and its figures are SVG. Their ink
is the page's, so that they are dark on light or light on dark as the text is.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from sigattn.analysis import plots

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff;
  --faint: #666; --line: #d4d4d4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181c; --faint: #a0a0a0;
    --line: #3c4047; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { max-width: 44rem; margin: .4rem 0; }
.note, figcaption { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); }
td.number, th.number { text-align: right; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.figures.wide { grid-template-columns: 100%; }
figure { margin: .4rem 0; }
svg { max-width: 100%; height: auto; }
@media print {
  @page { margin: 16mm; }
  :root { --ink: #000; --paper: #fff; --faint: #444; --line: #bbb; }
  body { margin: 0; max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  h2, p { break-after: avoid; break-inside: avoid; }
  figure, tr { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; }
  svg { max-height: 64mm; }
}
"""


def document(
  title: str, note: str, sections: Sequence[tuple[str, str, str]]
) -> str:
  """The page as a string.

  sections: (heading, explanation, HTML) of each part.
  """
  parts = [
    f"<section><h2>{html.escape(heading)}</h2>\n"
    f'<p class="note">{html.escape(text)}</p>\n{body}</section>'
    for heading, text, body in sections
  ]
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
    f"<body><h1>{html.escape(title)}</h1>\n"
    f'<p class="note">{html.escape(note)}</p>\n'
    + "\n".join(parts)
    + "\n</body></html>\n"
  )


def table(
  columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]
) -> str:
  """rows: lists of cells, None for an empty one; numbers stand on the right."""
  numeric = [
    all(isinstance(row[i], (int, float, type(None))) for row in rows)
    for i in range(len(columns))
  ]

  def cells(tag, row):
    return "".join(
      f"<{tag}{' class=number' if number else ''}>{_text(cell)}</{tag}>"
      for cell, number in zip(row, numeric, strict=True)
    )

  body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
  return (
    f'<div class="scroll"><table><thead><tr>{cells("th", columns)}</tr>'
    f"</thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
  )


def _text(cell):
  if cell is None:
    return ""
  if isinstance(cell, float):
    return f"{cell:.4g}" if abs(cell) < 1e-3 else f"{cell:.4f}"
  return html.escape(str(cell))


def figures(
  by_name: Mapping[str, Figure],
  captions: Mapping[str, str] | None = None,
  wide: bool = False,
) -> str:
  """{name: figure}, beside each other where there is room.

  captions: {name: what the caption says beside the name}. wide: each figure
  has the whole width.
  """
  parts = []
  for name, figure in by_name.items():
    caption = f"{name}: {captions[name]}" if captions else name
    parts.append(
      f"<figure>{_svg(figure, name)}\n"
      f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
  size = " wide" if wide else ""
  return f'<div class="figures{size}">' + "\n".join(parts) + "</div>\n"


def _svg(figure, name):
  """The figure as an element of the page, in the page's ink."""
  file = io.StringIO()
  plots.save(figure, file, "svg")
  text = file.getvalue().replace(plots.INK, "currentColor")
  text = text[text.index("<svg") :]
  # The ids of one figure are not those of another.
  text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
  return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
