"""The site builds without a warning, and all of its links have a target."""

import html.parser
import os
import pathlib
import subprocess
import sys
import urllib.parse

import pytest

import sigattn

ROOT = pathlib.Path(__file__).parents[1]


class Page(html.parser.HTMLParser):
  """The links of a page, the files that it loads, and its anchors."""

  def __init__(self, path):
    super().__init__()
    self.links, self.loaded, self.anchors = [], [], set()
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    if "id" in attrs:
      self.anchors.add(attrs["id"])
    if tag == "a" and attrs.get("href"):
      self.links.append(attrs["href"])
    if tag in ("img", "script") and attrs.get("src"):
      self.loaded.append(attrs["src"])
    if tag == "link":
      self.loaded.append(attrs["href"])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """{path: Page} of the site that the command of CONTRIBUTING.md builds."""
  command = "python -m mkdocs build --strict"
  assert f"`{command}`" in (ROOT / "CONTRIBUTING.md").read_text()
  folder = tmp_path_factory.mktemp("site")
  done = subprocess.run(
    [sys.executable, *command.split()[1:], "--site-dir", folder],
    cwd=ROOT,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  paths = [path for path in folder.rglob("*.html") if path.name != "404.html"]
  return {path: Page(path) for path in paths}


def test_links_and_pictures_of_the_site_lead_somewhere(pages):
  """MkDocs itself checks neither <img> nor links to files."""
  dead = []
  for path, page in pages.items():
    for link in page.links + page.loaded:
      parts = urllib.parse.urlparse(link)
      if parts.scheme or parts.netloc:
        continue
      where = urllib.parse.unquote(parts.path)
      target = (path.parent / where).resolve() if where else path
      anchors = pages[target].anchors if target in pages else {""}
      if not target.is_file() or parts.fragment not in {"", *anchors}:
        dead.append((path.name, link))
  assert len(pages) > 20
  assert dead == []


def test_the_site_loads_nothing_from_the_network(pages):
  loaded = {link for page in pages.values() for link in page.loaded}
  assert loaded
  assert [x for x in loaded if urllib.parse.urlparse(x).netloc] == []


def test_the_reference_has_every_public_name(pages):
  anchors = {anchor for page in pages.values() for anchor in page.anchors}
  names = {f"sigattn.{name}" for name in sigattn.__all__}
  names |= {f"sigattn.layers.{name}" for name in sigattn._LAYERS}
  assert names - anchors == set()


def test_columns_of_a_docstring_keep_their_lines(pages):
  [text] = [p.read_text() for p in pages if p.match("reference/attention.html")]
  assert "\nsigmoid   1 / (1 + e^-z)   -log n         2409.04431\n" in text
  assert 'href="https://arxiv.org/abs/2503.02130"' in text
