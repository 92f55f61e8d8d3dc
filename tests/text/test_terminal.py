"""What a model writes changes nothing on a terminal but what is read there."""

import io
import unicodedata

import pytest

from opera_jax.text import terminal


@pytest.mark.parametrize(
  "text",
  [
    "\x1b[2J\x1b]0;title\x07",  # clears the screen, sets the title
    "abc\rxyz\x08\x7f",  # writes over what stands there
    "\x9b31m\x85",  # the same in one character
    "a\u202ebc\u2066d\u200f",  # from right to left
    "a\u2028b\u2029c\x0b\x0c",  # lines where none is
    "\U000e0041\ufeff\ufff9",  # invisible
  ],
)
def test_nothing_is_left_that_a_terminal_obeys(text):
  shown = terminal.visible(text)
  assert len(shown) == len(text)
  for character in shown:
    assert unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp")
  plain = [c for c in text if c.isalnum() and c.isascii()]
  assert all(c in shown for c in plain)


def test_all_control_characters_but_line_breaks_and_tabs_are_signs():
  every = "".join(map(chr, (*range(32), *range(127, 160))))
  shown = terminal.visible(every)
  assert {c for c in shown if unicodedata.category(c) == "Cc"} == {"\n", "\t"}
  assert (
    terminal.visible("Ünï 漢字 \U0001f98a\n\t") == "Ünï 漢字 \U0001f98a\n\t"
  )


def test_what_the_encoding_lacks_ends_no_run():
  file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  file.write(terminal.visible("caf\xe9 \ud800 \x1b", file))
  file.flush()
  assert file.buffer.getvalue() == b"caf? ? ?"


def test_an_excerpt_is_as_long_and_as_wide_as_asked():
  text = "one two  three\n\nfour " + "long" * 40 + " end " * 50
  lines = terminal.excerpt(text, lines=3, width=20)
  assert len(lines) == 3 and max(map(len, lines)) <= 20
  assert lines[0] == "one two three four l"
  assert lines[-1].endswith("...")
  assert terminal.excerpt("short", lines=3, width=20) == ["short"]
  assert terminal.excerpt(" \n", lines=3, width=20) == [""]
