"""Excerpts end where sentences do, and cost time linear in the text."""

import growth
import pytest

from opera_jax.data import drafts


@pytest.mark.parametrize(
  "text,words,head",
  [
    (" One two. Three four five six", 4, "One two."),
    ("One two three. Four", 3, "One two three."),
    ("One. Two three four five six", 4, "One. Two three four"),
    ("One two 3. Four five", 4, "One two 3. Four"),
    ("One two 12. Four five", 4, "One two 12. Four"),
    ("One two a12. Four five", 4, "One two a12."),
    ('He said "no." Then he left', 4, 'He said "no."'),
    ("One two", 0, "One two"),
  ],
)
def test_excerpt(text, words, head):
  assert drafts.excerpt(text, words) == head


@pytest.mark.parametrize("unit", [". ", ".' ", ".", "'", "x" * 50 + " ", "\n"])
@pytest.mark.parametrize(
  "call",
  [
    lambda text: drafts.excerpt(text, 600),
    lambda text: drafts.sentences(text, (5, 20)),
  ],
  ids=["excerpt", "sentences"],
)
def test_no_text_takes_long_to_cut(call, unit):
  ratio = growth.twice_doubled(call, lambda n: unit * (n // len(unit)), 50_000)
  assert ratio < growth.LINEAR
