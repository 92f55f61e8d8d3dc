"""What a text states as its final answer to a maths task.

A completion states it after its thought: in the last `\\boxed{...}`, or else
after "####", or else where it announces it ("The answer is 5."), or else as
its last number or fraction. A reference is read by the same order, and where
it has none of these, all of it is the answer.

Everything here costs time linear in the text: searches go through it once, and
what is looked at around a find is bounded.
"""

import dataclasses
import re
import unicodedata

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
HASHES = "####"
# Characters read behind an announcement.
_SENTENCE = 300

_MINUS = {ord(c): "-" for c in "\u2010\u2011\u2212\ufe63\uff0d"}
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
# Between two boxes that may be parts of one answer.
_JOINED = re.compile(r"(?:.*\b(?:and|or)\b)?[^A-Za-z]*", re.DOTALL)
_ANNOUNCED = re.compile(
  r"\banswers?\b[^\n.:=]{0,60}?"
  r"(?::|=|\b(?:is|are|be|equals|becomes|was)\b)",
  re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*_]|$)|\n")
_NEGATIVE = re.compile(r"(?<![\d)}\]] )\b(?:minus|negative) ?$", re.IGNORECASE)
_RANGE = re.compile(r"\d\S* +(?:or|to) +\S*\d")
_UNCERTAIN = re.compile(r"\b(?:not|n't|either|neither|between|or)\b")
_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)"
_MIXED = r"\d{1,9} \d{1,9}/\d{1,9}(?!\d)"
_PLAIN = rf"{_MIXED}|{_DIGITS}(?:\.\d+)?(?: {{0,2}}/ {{0,2}}\d+)?|\.\d+"
_POWER = (
  r"[eE][-+]?\d{1,9}(?!\w)"
  r"| ?(?:[×x*]|\\times|\\cdot) ?10 ?\^ ?(?:\{ ?[-+]?\d{1,9} ?\}|[-+]?\d{1,9})"
)
NUMBER = re.compile(rf"[-\u2013]?(?:\\?[$€£¥₹])?(?:{_PLAIN})(?:{_POWER})?")
_ENDS = re.compile(
  rf"\b(?:is|are|be|equals?|exactly|therefore|thus|so|just|only|by|number)"
  rf" ({NUMBER.pattern}%?)$"
)
_FRACTION = re.compile(
  r"-?(?:(?<!\d)\d{1,30} ?)?\\[cdt]?frac ?"
  r"(?:\{[^{}]{1,60}\} ?\{[^{}]{1,60}\}|\d ?\d)"
)
_BEFORE = frozenset(" \t\n=*_\"'~≈$:>")
_AFTER = re.compile(r"[\s.,;!?*_\"'%°€£¥₹]|\\%|$")
_RATIO = re.compile(r"(?<![\w.:])\d{1,9}(?:(?::| : )\d{1,9}){1,2}$")
# A pair that ends with the last number.
_PAIR = re.compile(r"[(\[][^()\[\]]{1,60},[^()\[\]]{0,60}")
# A number that is one of several, or the operand of an operator.
_LISTED = re.compile(
  r"\d[ :]$|[\w)}\]](?:[,;]|\s+(?:and|or|to|by|plus|minus|times)\b"
  r"|\s*[-+*/^×÷±<>≤≥])\s*$"
)
_OPERATED = re.compile(r"\s*(?:[-+*/^=×÷±<>≤≥(]|(?:and|or|to|by|times)\b)")
_WRAPPER = re.compile(
  r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|boxed|fbox|left|right"
  r"|quad|qquad|displaystyle|operatorname)(?![a-zA-Z])"
)
_BRACE = re.compile(r"\\[{}]|[{}]")
_OPENS = re.compile(r"(?<!\\)(?:\$\$|\$|\\\(|\\\[)")
_FORMULA = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_EMPTY_SET = re.compile(r"\\\{\s*\\\}")


@dataclasses.dataclass(frozen=True)
class Stated:
  """An answer as a text states it.

  Attributes:
    text: what was stated, with its LaTeX.
    sure: False where the text can be read in another way, too: two boxes, a
      number among several, an operand.
  """

  text: str
  sure: bool = True


class _Fold(dict):
  """Signs, digits and fractions, as ASCII; for `str.translate`."""

  def __missing__(self, code: int) -> str | int:
    """Remembers what becomes of a character."""
    digit = unicodedata.decimal(chr(code), None)
    kind, *parts = unicodedata.decomposition(chr(code)).split() or [""]
    if digit is not None:
      self[code] = str(digit)
    elif kind == "<fraction>":
      # U+2044 is the stroke of "½".
      above_below = "".join(chr(int(part, 16)) for part in parts)
      self[code] = " " + above_below.replace("\u2044", "/")
    else:
      self[code] = code
    return self[code]


_FOLD = _Fold(_MINUS)


def fold(text: str) -> str:
  """The text with each minus sign, digit and "½" written in ASCII."""
  return text if text.isascii() else text.translate(_FOLD)


def after_thought(text: str) -> str | None:
  """What a completion says after its thought; None while it still thinks.

  Args:
    text: the whole completion, tags kept. What follows a thought that was
      opened and never closed belongs to that thought.
  """
  head, closed, tail = text.rpartition(THINK_CLOSE)
  tail, opened, _ = tail.partition(THINK_OPEN)
  if not closed and opened:
    return None
  return tail


def final_answer(text: str) -> Stated | None:
  """The answer stated in a completion; None if there is none.

  Args:
    text: the whole completion, thought included.
  """
  tail = after_thought(text)
  if tail is None:
    return None
  tail = fold(tail)
  return _boxed(tail) or _hashed(tail) or _announced(tail) or _last_number(tail)


def of_reference(reference: str) -> Stated:
  """The true answer that the reference of a maths task states.

  Args:
    reference: the answer alone, "... #### answer" as in GSM8K, or text with
      the answer in a box or announced.

  Raises:
    ValueError: nothing in it can be an answer.
  """
  text = fold(reference).rpartition(HASHES)[2].strip()
  answer = _boxed(text) or _announced(text) or Stated(text)
  if _blank(answer.text) or _empty_box(text):
    raise ValueError(
      f"A maths task needs a final answer, got the reference "
      f'{_short(reference)}. Give the answer itself, "#### answer", or '
      "\\boxed{answer}; it must hold a letter, a digit or a symbol of a value."
    )
  return answer


def gold(reference: str) -> str:
  """The part of a reference that holds its answer: what follows "####"."""
  return fold(reference).rpartition(HASHES)[2].strip()


def _short(text: str) -> str:
  return repr(text if len(text) <= 80 else f"{text[:40]}...{text[-40:]}")


def _blank(text: str) -> bool:
  """Whether nothing in a text can be a value."""
  if _EMPTY_SET.search(text):
    return False
  bare = _WRAPPER.sub("", text)
  return not any(c.isalnum() or c in "∞∅" for c in bare)


def _empty_box(text: str) -> bool:
  """Whether the last box of a text is closed and holds nothing."""
  hit = _last(_BOX, text)
  content = None if hit is None else _braced(text, hit.end())[0]
  return content is not None and _blank(content)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
  hit = None
  for hit in pattern.finditer(text):  # noqa: B007
    pass
  return hit


def _braced(text: str, begin: int) -> tuple[str | None, int]:
  """What the braces from `begin` on hold, and where they end.

  None where no brace opens there, or it is never closed.
  """
  while begin < len(text) and text[begin] == " ":
    begin += 1
  if text[begin : begin + 1] != "{":
    return None, begin
  depth = 0
  for hit in _BRACE.finditer(text, begin):
    if len(hit.group()) == 1:
      depth += 1 if hit.group() == "{" else -1
    if not depth:
      return text[begin + 1 : hit.start()], hit.end()
  return None, begin


def _boxed(text: str) -> Stated | None:
  """The last box that is closed and not empty."""
  previous, hit = None, None
  for found in _BOX.finditer(text):
    previous, hit = hit, found
  if hit is None:
    return None
  content, end = _braced(text, hit.end())
  if content is None or _blank(content):
    return None
  sure = True
  if previous is not None:
    before, end = _braced(text, previous.end())
    between = _COMMAND.sub(" ", text[max(end, hit.start() - 60) : hit.start()])
    sure = before in (None, content) or not _JOINED.fullmatch(between)
  return Stated(content.strip(), sure)


def _hashed(text: str) -> Stated | None:
  """What follows the last "####", unless that opens a Markdown heading."""
  _, found, rest = text.rpartition(HASHES)
  if not found:
    return None
  line, _, after = rest.partition("\n")
  line = line.strip()
  value = NUMBER.fullmatch(line) or line.startswith(("$", "\\"))
  if _blank(line) or (after.strip() and not value):
    return None
  return Stated(line)


def _announced(text: str) -> Stated | None:
  """What the last announcement with a value in it announces."""
  first = None
  for hit in reversed(list(_ANNOUNCED.finditer(text))):
    stated = _sentence(text, hit.end())
    if stated is None:
      continue
    if stated.sure or any(c.isdigit() for c in stated.text):
      return stated
    first = first or stated
  return first


def _sentence(text: str, begin: int) -> Stated | None:
  """The answer in the sentence that goes on at `begin`."""
  content = text[begin : begin + _SENTENCE].lstrip(" \t\n*_:=")
  span = _opening_span(content)
  if span is not None:
    inside, rest = span
    rest = _SENTENCE_END.split(rest, maxsplit=1)[0]
    if re.match(r"\s*(?:\\?%|percent|pct)", rest):
      inside += "%"
    alone = not re.search(r"[\d$\\=]", rest) and not _OPERATED.match(rest)
    return None if _blank(inside) else Stated(inside, alone)
  content = _SENTENCE_END.split(content, maxsplit=1)[0].strip(" \t*_\"'")
  if _blank(content):
    return None
  head, equals, value = content.rpartition("=")
  if equals and not _blank(value) and head[-1:] not in "<>!":
    content, words = value.strip(), ""
  else:
    words = content
  content = re.sub(r"^(?:minus|negative) +(?=[\d$.])", "-", content)
  hit = NUMBER.match(content)
  if hit is None:
    # One word, or LaTeX, may be the answer; a number behind words may be.
    content = re.sub(r"^(?:option|choice) +(?=\(?[A-Z]\b)", "", content)
    ends = _ENDS.search(content)
    if ends and not _UNCERTAIN.search(content):
      return Stated(ends[1], not re.search(r"\d", content[: ends.start(1)]))
    denied = NUMBER.fullmatch(content.removeprefix("not "))
    single = len(content.split()) == 1 or re.match(r"\([A-Z]\) ", content)
    alone = bool(single) and not _UNCERTAIN.search(content)
    return Stated(content, bool(alone or denied))
  rest = content[hit.end() :]
  several = re.search(r"\d", rest) is not None or _UNCERTAIN.search(words)
  return Stated(content, not several or _RANGE.match(content) is not None)


def _opening_span(content: str) -> tuple[str, str] | None:
  """The formula that a text opens with, and what follows it."""
  for opens, closes in _FORMULA:
    if content.startswith(opens):
      inside, closed, rest = content[len(opens) :].partition(closes)
      spaced = inside != inside.strip() and "\\" not in inside
      if not closed or (opens == "$" and spaced):
        return None
      return inside.strip(), rest
  return None


def _last_number(text: str) -> Stated | None:
  """The last number, or the formula that it stands in."""
  number, fraction = _last(NUMBER, text), _last(_FRACTION, text)
  spans = _spans(text)
  if number is None:
    return Stated(spans[-1][2].strip(), sure=len(spans) == 1) if spans else None
  begin, end = number.span()
  if fraction is not None and fraction.end() >= end:
    begin, end = fraction.span()
  for opens, closes, content in reversed(spans):
    if opens <= begin and end <= closes:
      return Stated(content.strip(), sure=_unsigned(text[:opens]))
  found = text[begin:end]
  before = text[begin - 1 : begin]
  # In "10-4" the dash is an operator, not a sign.
  operator = before.isalnum() or before in (")", "]", "}")
  if found[0] in "-\u2013" and operator:
    return Stated(found[1:], sure=False)
  low = max(0, begin - 150)
  pair = _PAIR.fullmatch(
    text, max(*(text.rfind(c, low, begin) for c in "(["), 0), end
  )
  ratio = _RATIO.search(text[low:end])
  if ratio is not None:
    return Stated(ratio.group())
  if pair is not None and text[end : end + 1] in (")", "]"):
    return Stated(pair.group() + text[end])
  negative = _NEGATIVE.search(text[low:begin])
  if negative is not None and found[0] not in "-\u2013":
    found, begin = f"-{found}", low + negative.start()
    before = text[begin - 1 : begin]
  listed = _LISTED.search(text[max(0, begin - 20) : begin])
  sure = (
    (not before or before in _BEFORE)
    and _AFTER.match(text, end) is not None
    and listed is None
    and not _OPERATED.match(text[end : end + 20])
    and not (spans and spans[-1][0] >= end)
  )
  tail = re.match(r" ?(?:\\?%|percent\b)", text[end : end + 10])
  return Stated(found + ("%" if tail else ""), sure)


def _unsigned(before: str) -> bool:
  return before.rstrip("$\\([")[-1:] not in ("-", "\u2013")


def _spans(text: str) -> list[tuple[int, int, str]]:
  """Formulas between dollars, \\( \\) or \\[ \\]: (begin, end, content).

  A dollar before an amount opens none: the one that would close it has a space
  before it, and no command between them. Each search ends where the next
  begins, so that all of them together go through the text a few times.
  """
  out, at, gone = [], 0, set()
  for hit in _OPENS.finditer(text):
    if hit.start() < at or hit.group() in gone:
      continue
    opens = hit.group()
    closes = {"\\(": "\\)", "\\[": "\\]"}.get(opens, opens)
    end = text.find(closes, hit.end())
    if end < 0:
      gone.add(opens)
      continue
    content = text[hit.end() : end]
    spaced = content != content.strip() and "\\" not in content
    if opens == "$" and (spaced or not content.strip()):
      continue
    at = end + len(closes)
    out.append((hit.start(), at, content))
  return out
