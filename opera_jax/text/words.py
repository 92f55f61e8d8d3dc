"""Words, n-grams and scripts of plain text, in any language.

A word is a run of letters, digits and underscores; a character of Chinese,
Japanese or Thai, which are written without spaces, is a word of its own.
"""

import collections
import functools
import re
import unicodedata
from collections.abc import Sequence

import regex

_SINGLE = (
  "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
  "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+")
# What may join the letter before it: marks, and the later jamos of Hangul.
_PIECE = regex.compile(r"\s+|\S{1,256}[\p{M}\u1160-\u11ff]{0,256}")
# Names that Unicode gives to letters of one way of writing.
_SAME = {"CJK": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA", "IDEOGRAPHIC":
         "HAN", "FULLWIDTH": "LATIN"}  # fmt: skip


def normal(text: str) -> str:
  """Text without what does not change its meaning: case, width, spacing.

  Done in pieces, as NFKC sorts a run of combining marks in quadratic time. A
  piece ends before a letter, which is as good as the whole, unless more than
  256 marks follow each other.
  """
  if not text.isascii():
    # Case folding can leave letters that combine with what follows them ("\xdf"
    # becomes "ss"), so both are applied twice.
    text = _composed(_composed(text).casefold())
    text = _composed(text.casefold())
  return " ".join(text.casefold().split())


def _composed(text: str) -> str:
  """NFKC, in pieces; see `normal`."""
  return "".join(
    unicodedata.normalize("NFKC", piece) for piece in _PIECE.findall(text)
  )


def split(text: str) -> list[str]:
  """The words of a text, in order."""
  return _WORD.findall(text)


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
  """Every run of n words; of fewer words the one run there is, or none."""
  if len(words) <= n:
    return [tuple(words)] if words else []
  return list(zip(*(words[i:] for i in range(n))))


def scripts(text: str) -> collections.Counter[str]:
  """How many letters of each script: "LATIN", "HAN", "CYRILLIC", ..."""
  counts: collections.Counter[str] = collections.Counter()
  for character, count in collections.Counter(text).items():
    name = _script(character)
    if name:
      counts[name] += count
  return counts


@functools.cache
def _script(character: str) -> str:
  if not character.isalpha():
    return ""
  name = unicodedata.name(character, "").partition(" ")[0]
  name = name.partition("-")[0]
  return _SAME.get(name, name)
