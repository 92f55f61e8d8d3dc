"""MkDocs hook: turns LaTeX into MathML, which browsers draw by themselves.

`pymdownx.arithmatex` marks the formulas of a page; they are converted here, at
build time, so that no page loads a script or a font to show them.
"""

import html
import re
from typing import Any

from latex2mathml import converter

_FORMULA = re.compile(
  r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL
)


def on_page_content(page_html: str, **_: Any) -> str:
  """Replaces every marked formula of a page; MkDocs calls this."""
  return _FORMULA.sub(_mathml, page_html)


def _mathml(found: re.Match[str]) -> str:
  block = found[1] == "div"
  latex = html.unescape(found[3]).strip()
  drawn = converter.convert(latex, display="block" if block else "inline")
  return f'<div class="formula">{drawn}</div>' if block else drawn
