"""The site builds without a warning, hangs together, and loads nothing from
elsewhere."""

import html.parser
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


class _Page(html.parser.HTMLParser):
  """Links, resources and anchors of a page."""

  def __init__(self, text: str):
    super().__init__()
    self.links, self.nav, self.resources = [], set(), []
    self.ids, self.tags = set(), []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    found = dict(attributes)
    self.tags.append(tag)
    self.ids |= {found.get("id"), found.get("name")}
    if tag == "a" and found.get("href"):
      self.links.append(found["href"])
      if "md-nav__link" in (found.get("class") or ""):
        self.nav.add(found["href"].partition("#")[0])
    if tag == "link" and found.get("rel") not in ("prev", "next"):
      self.resources.append(found.get("href"))
    if tag != "a":
      self.resources += [found.get("src"), found.get("data"),
                         found.get("srcset"), found.get("poster")]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
  """The built site; a warning is an error."""
  folder = tmp_path_factory.mktemp("site")
  done = subprocess.run(
    # --quiet would drop the warnings that --strict counts.
    [sys.executable, "-m", "mkdocs", "build", "--strict"]
    + ["--site-dir", str(folder)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
  )
  assert done.returncode == 0, (
    "mkdocs build --strict failed; it needs requirements-docs.txt.\n"
    + done.stdout
    + done.stderr
  )
  return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, _Page]:
  """Every page by its path below the site."""
  return {
    str(path.relative_to(site)): _Page(path.read_text("utf-8"))
    for path in sorted(site.rglob("*.html"))
  }


def test_every_page_is_there(pages):
  sources = {
    str(path.relative_to(ROOT / "docs")).removesuffix(".md")
    for path in (ROOT / "docs").rglob("*.md")
  }
  built = {name.removesuffix(".html") for name in pages}
  wanted = {re.sub(r"README$", "index", name) for name in sources}
  assert built == wanted | {"404"}


def test_every_page_is_reachable_from_the_navigation(pages):
  named = pages["index.html"].nav
  for name in pages:
    if name not in ("404.html", "index.html"):
      assert name in named, f"{name} is in no menu"


def test_no_link_is_broken(site, pages):
  checked = 0
  for name, page in pages.items():
    if name == "404.html":  # is served from anywhere, with absolute links
      continue
    for link in page.links:
      parts = urllib.parse.urlsplit(link)
      if parts.scheme or parts.netloc:
        assert parts.scheme in ("https", "mailto"), f"{name}: {link}"
        continue
      path = urllib.parse.unquote(parts.path)
      target = (site / name).parent / path if path else site / name
      assert target.exists(), f"{name} links to {link}"
      relative = os.path.relpath(target, site)
      if parts.fragment and relative in pages:
        anchor = urllib.parse.unquote(parts.fragment)
        there = pages[relative].ids | {"__skip"}
        assert anchor in there, f"{name} links to {link}"
      checked += 1
  assert checked > 500


def test_nothing_is_loaded_from_elsewhere(site, pages):
  for name, page in pages.items():
    for resource in filter(None, page.resources):
      parts = urllib.parse.urlsplit(resource)
      local = parts.scheme in ("", "data") and not parts.netloc
      assert local, f"{name} loads {resource}"
    assert "iframe" not in page.tags
  for sheet in site.rglob("*.css"):
    text = sheet.read_text("utf-8")
    found = re.findall(
      r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", text
    )
    assert not found, f"{sheet.name} loads {found}"
  for drawn in site.rglob("pictures/*.svg"):
    text = drawn.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text, drawn.name
  # The theme fetches a diagram library where a page has a diagram.
  for path in site.rglob("*.html"):
    assert 'class="mermaid"' not in path.read_text("utf-8"), path.name


def test_formulas_are_mathml(site, pages):
  assert pages["method.html"].tags.count("math") > 20
  for path in site.rglob("*.html"):
    text = path.read_text("utf-8")
    assert 'class="arithmatex"' not in text, path.name
    assert "<merror" not in text, path.name


def test_the_config_page_has_the_fields(pages):
  ids = pages["configs.html"].ids
  assert {"rl.steps", "reward.alpha", "select.rl.band", "seed"} <= ids
