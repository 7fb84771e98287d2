"""Gives the site's pages the same paths as in the repository.

MkDocs reads its pages from one folder below the repository's root, but
README.md and RESULTS.md are above it, and the pictures are elsewhere. With the
repository's own paths, every relative link works on GitHub and on the site.
"""

import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
FILES = (
  "*.md", "docs/*.md", "docs/reference/*.md", "docs/site/*.css",
  "benchmarks/NOTES.md", "CITATION.cff",
)  # fmt: skip

# Documents link to these folders. The site has a page that lists their files.
FOLDERS = {
  "benchmarks/results": ("Result files", ("*.json", "*.png", "*/*.png")),
  "notebooks": ("Notebooks", ("*.ipynb", "*.py")),
}


def _found(folder: pathlib.Path, patterns: tuple[str, ...]) -> list[str]:
  """The sorted paths, relative to the root, of the files in a folder."""
  paths = {path for pattern in patterns for path in folder.glob(pattern)}
  return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Replaces the files that MkDocs found below docs/ by those named above."""
  kept = [file for file in files if file.src_uri.startswith("assets/")]
  paths = _found(ROOT, FILES)
  for folder, (title, patterns) in FOLDERS.items():
    names = _found(ROOT / folder, patterns)
    paths += names
    links = [posixpath.relpath(name, folder) for name in names]
    text = "\n".join([f"# {title}\n", *(f"- [{x}]({x})" for x in links)])
    kept.append(File.generated(config, f"{folder}/index.md", content=text))
  for path in paths:
    source = str(ROOT / path)
    kept.append(File.generated(config, path, abs_src_path=source))
  return Files(kept)


def on_page_markdown(text: str, *, page: Page, **_: object) -> str:
  """Changes links to a folder into links to the page that lists its files."""
  here = posixpath.dirname(page.file.src_uri)

  def to_index(match: re.Match[str]) -> str:
    path = posixpath.normpath(posixpath.join(here, match[1]))
    return (
      f"]({match[1].rstrip('/')}/index.md)" if path in FOLDERS else match[0]
    )

  return re.sub(r"\]\(([^)\s#]+)\)", to_index, text)
