"""The page of a pool: everything foreign is escaped, nothing is fetched."""

import html.parser

from opera_jax.report import clusters

NASTY = '<script>alert("&")</script></li>'


class _Tags(html.parser.HTMLParser):
  """Every tag and attribute, and whether tags close in order."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.attributes = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in ("meta", "circle"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag != "circle":
      assert self.open.pop() == tag


def _view(**changes):
  given = {
    "counts": {"read": 9, "near duplicate": 2, "kept": 7, "clusters": 2},
    "embedder": NASTY,
    "silhouette": {2: 0.31, 4: 0.12},
    "clusters": [
      clusters.Cluster(6, 5, {"math": 2, "open_ended": 4}, [NASTY, "b"]),
      clusters.Cluster(3, 2, {"math": 3}, ["c" * 1000]),
    ],
    "points": [
      clusters.Point(-1.0, 1.0, 0, True),
      clusters.Point(0.5, -1.0, 1, False),
    ],
    "rejected": {NASTY: [(NASTY, NASTY)]},
  }
  return clusters.View(**(given | changes))


def test_foreign_text_is_escaped_and_nothing_is_fetched():
  shown = clusters.render(_view())
  parsed = _Tags(shown)
  assert not parsed.open
  assert "script" not in parsed.tags and NASTY not in shown
  assert not {"src", "href", "onclick"} & {
    name for name, _ in parsed.attributes
  }
  assert "c" * 400 not in shown  # long prompts are cut


def test_what_is_said(tmp_path):
  clusters.write(tmp_path / "a.html", _view())
  shown = (tmp_path / "a.html").read_text()
  assert "7 of 9 prompts" in shown
  assert "5 of 6" in shown and "2 of 3" in shown
  assert "2 (chosen)" in shown
  assert shown.count("<circle") == 2 and shown.count('fill="none"') == 1


def test_an_empty_rest_is_left_out():
  shown = clusters.render(_view(silhouette={}, rejected={}))
  assert "Number of clusters" not in shown and "Rejected" not in shown
