"""Text of a model as a terminal may show it.

A terminal obeys control characters, and a model may write any: they could
change its title, its colours or what is read before. They are shown as signs.
"""

import sys
import textwrap
from typing import TextIO

# Pictures of the first 32 and of delete; what turns the direction of writing,
# breaks lines, or is a tag without a picture: the replacement character.
_SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_SIGNS |= {0x7F: 0x2421}
_SIGNS |= dict.fromkeys(
  [
    *range(0x80, 0xA0),
    *(0x061C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
    *range(0xFFF9, 0xFFFC),
    *range(0xE0000, 0xE0080),
  ],
  0xFFFD,
)


def visible(text: str, file: TextIO | None = None) -> str:
  """The text with signs in the place of control characters.

  Args:
    text: any; line breaks and tabs stay.
    file: where it will be written, default standard output; what its encoding
      lacks becomes "?".
  """
  encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"
  plain = text.translate(_SIGNS)
  return plain.encode(encoding, "replace").decode(encoding)


def excerpt(text: str, *, lines: int = 4, width: int = 76) -> list[str]:
  """The first lines of a text, each no wider than asked for.

  Args:
    text: any; runs of white space become one space.
    lines: at most; "..." ends the last where text is left out.
    width: characters of a line, at least 5.
  """
  wrapped = textwrap.wrap(
    " ".join(visible(text).split()),
    width,
    max_lines=lines,
    placeholder=" ...",
    break_on_hyphens=False,
  )
  return wrapped or [""]
