"""MkDocs hook: turns LaTeX into MathML, which browsers draw by themselves.

`pymdownx.arithmatex` marks the formulas of a page; they are converted here, at
build time, so that no page loads a script or a font to show them.
"""

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml import converter

_FORMULA = re.compile(
  r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL
)
_TEXT = re.compile(r"(\\text\{)([^{}]*)(\})")


class FormulaError(ValueError):
  """A formula that cannot be drawn."""


def on_page_content(text: str, **_: Any) -> str:
  """Replaces every marked formula of a page; MkDocs calls this."""
  return _FORMULA.sub(_replaced, text)


def mathml(latex: str, *, block: bool) -> str:
  """A formula as a `<math>` element.

  Args:
    latex: without its dollars.
    block: a line of its own.

  Raises:
    FormulaError: names the formula and what is wrong with it.
  """
  # The converter copies words as they are: "<" has to be escaped before.
  escaped = _TEXT.sub(
    lambda found: found[1] + html.escape(found[2], quote=False) + found[3],
    latex,
  )
  drawn = converter.convert(escaped, display="block" if block else "inline")
  try:
    words = "".join(ElementTree.fromstring(drawn).itertext())
  except ElementTree.ParseError as error:
    raise FormulaError(
      f"The formula {latex!r} gives MathML that is not well formed: {error}. "
      "Write it with commands that latex2mathml knows."
    ) from error
  if "\\" in words:
    raise FormulaError(
      f"The formula {latex!r} has a command that latex2mathml does not know: "
      f"it would be shown as {words!r}."
    )
  return drawn


def _replaced(found: re.Match[str]) -> str:
  block = found[1] == "div"
  drawn = mathml(html.unescape(found[3]).strip(), block=block)
  return f'<div class="formula">{drawn}</div>' if block else drawn
