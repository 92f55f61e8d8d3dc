"""Formulas become MathML when the site is built."""

import pytest

from scripts.docs import formulas


def test_a_block_and_an_inline_formula_of_a_page():
  page = (
    '<p>with <span class="arithmatex">\\(a &lt; b\\)</span></p>'
    '<div class="arithmatex">\\[R_{self}\\]</div>'
  )
  made = formulas.on_page_content(page, page=None)
  assert made.startswith("<p>with <math")
  assert "<mo>&#x0003C;</mo>" in made
  assert '<div class="formula"><math' in made
  assert 'display="block"' in made
  assert "arithmatex" not in made


def test_words_with_a_tag_are_shown_and_not_obeyed():
  made = formulas.mathml("P(y \\mid \\text{<think>})", block=False)
  assert "&lt;think&gt;" in made


@pytest.mark.parametrize("latex", ["\\unheardof{x}", "x \\unheardof"])
def test_an_unknown_command_stops_the_build(latex):
  with pytest.raises(formulas.FormulaError, match="unheardof"):
    formulas.mathml(latex, block=True)
