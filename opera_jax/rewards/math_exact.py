"""Compares two final answers without a computer algebra system.

Every decision here is certain: the same number (also as a fraction, a mixed or
a decimal number, a percentage, with its unit, after "x =", or as a word), the
same letter of a choice, the same list of those, the same LaTeX; or two numbers
that differ. Everything else gives None, "cannot tell".

Answers are bounded before they are parsed, so that the cost is linear: answers
longer than `_LONGEST` characters and numbers of more than `_DIGITS` digits are
only compared as text.
"""

import dataclasses
import fractions
import math
import re

from opera_jax.text import math_answer

_ALONE = 40  # characters of a word that is a whole answer
_LONGEST = 1000
_DIGITS = 400

_DROPPED = re.compile(
  r"\\[!,;:]|\\(?:displaystyle|left|right|big|Big|limits|q?quad)(?![a-zA-Z])"
  r"|\\(?= )|~"
)
_RENAMED = (
  (re.compile(r",\\! ?"), ","),
  (re.compile(r"(?<=\d)\\[,;:! ](?=\d{3}(?!\d))"), ""),
  (re.compile(r"\\[cdt]frac(?![a-z])"), r"\\frac"),
  (re.compile(r"\^? ?(?:\{ ?\\circ ?\}|\\(?:circ|degree)(?![a-z]))"), "°"),
  (re.compile(r"\\(?=[$%])"), ""),
  (re.compile(r"\{,\}"), ","),
  (re.compile(r"[×✕]|\\times(?![a-z])|\\cdot(?![a-z])"), r"\\times "),
  (re.compile(r"√ ?\(?(\d{1,30})\)?"), r"\\sqrt{\1}"),
  (re.compile(r"\\geq?(?:slant)?(?![a-z])|>="), "≥"),
  (re.compile(r"\\leq?(?:slant)?(?![a-z])|<="), "≤"),
  (re.compile(r"\\neq?(?![a-z])|!="), "≠"),
  (re.compile(r"\\gt(?![a-z])"), ">"),
  (re.compile(r"\\lt(?![a-z])"), "<"),
  (re.compile(r"\\frac ?(\d) ?(\d)"), r"\\frac{\1}{\2}"),
  (re.compile(r"\\sqrt ?([A-Za-z\d])(?![A-Za-z\d])"), r"\\sqrt{\1}"),
)
_PAIRED = re.compile(r"\$([^$]*)\$")
_TEXT = re.compile(
  r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*"
  r"\{([^{}]*)\}"
)
# What may stand before "=" as the name of a value: no sum, no number.
_NAME = re.compile(r"[^\d<>≤≥≠!+*/^=-]+")
_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)")
_JOINING = re.compile(r",? ?\b(?:and|or)\b ?")
_MOST = 20  # elements of lists that are compared in any order
_CHOSEN = re.compile(r"\(([A-Z])\)[.:]? +(?=\S)")
# Several numbers where one is asked for.
_RANGE = re.compile(r"[-\d.,$ ]*\d\S* (?:or|to) \S*\d[^=]*")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}

_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[-+]? ?{_DECIMAL}"
_VALUE = re.compile(
  rf"(?P<sign>[-+\u2013]?)\s*(?P<money>[$€£¥₹]?)\s*(?P<inner>-?)(?:"
  rf"(?:(?P<whole>\d+)\s*)?\\frac\s*(?:"
  rf"\{{\s*(?P<above>{_SIGNED})\s*\}}|(?P<above1>\d))\s*(?:"
  rf"\{{\s*(?P<below>{_SIGNED})\s*\}}|(?P<below1>\d))"
  rf"|(?:(?P<mixed>\d+)\s+)?(?P<over>{_INTEGER})\s*/\s*(?P<under>{_DECIMAL})"
  rf"|(?P<factor>\d*)\s*\\sqrt\s*(?:\{{\s*(?P<root>{_DECIMAL})\s*\}}|"
  rf"(?P<root1>\d)(?!\d))"
  rf"|(?P<number>{_DECIMAL})(?:"
  rf"[eE](?P<power>[-+]?\d+)(?![\d.])"
  rf"|\s*(?:\\times|\*|x)\s*10\s*\^\s*(?:"
  rf"\{{\s*(?P<ten>[-+]?\d+)\s*\}}|(?P<ten1>[-+]?\d+)))?"
  rf")(?P<rest>.*)",
  re.DOTALL,
)
_PERCENT = re.compile(r"\s*(?:%|percent(?:age)?\b|pct\b)\s*", re.IGNORECASE)
_UNIT = re.compile(
  r"(?P<gap>\s*)(?P<unit>°\s*[CF]?|[A-Za-z][A-Za-z./\- ]*)"
  r"(?P<power>\^?\s*\{?\s*[23²³]\s*\}?)?[\s.]*"
)

_SIZES = {
  "hundred": 10**2,
  "thousand": 10**3,
  "million": 10**6,
  "billion": 10**9,
  "trillion": 10**12,
  "dozen": 12,
}
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty",
         "ninety")  # fmt: skip
_WORDS = {
  "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6,
  "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
  "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
  "seventeen": 17, "eighteen": 18, "nineteen": 19,
} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}  # fmt: skip
# Units: what they measure, in which size, and all their names.
_TABLE = (
  ("length", "1/1000", "mm", "millimeter", "millimetre"),
  ("length", "1/100", "cm", "centimeter", "centimetre"),
  ("length", "1", "m", "meter", "metre"),
  ("length", "1000", "km", "kilometer", "kilometre"),
  ("length", "0.0254", "inch", "inche"),
  ("length", "0.3048", "ft", "foot", "feet"),
  ("length", "0.9144", "yd", "yard"),
  ("length", "1609.344", "mi", "mile"),
  ("mass", "1/1000", "mg", "milligram"),
  ("mass", "1", "g", "gram"),
  ("mass", "1000", "kg", "kilogram"),
  ("time", "1", "s", "sec", "second"),
  ("time", "60", "min", "minute"),
  ("time", "3600", "h", "hr", "hour"),
  ("time", "86400", "day"),
  ("time", "604800", "week"),
  ("months", "1", "month"),
  ("months", "12", "year"),
  ("volume", "1/1000", "ml", "milliliter", "millilitre"),
  ("volume", "1", "l", "liter", "litre"),
  ("dollars", "1", "$", "dollar", "usd"),
  ("dollars", "1/100", "cent"),
  ("euros", "1", "€", "euro"),
  ("angle", "1", "°", "degree", "deg"),
)
# What a name measures, and how much of it.
_UNITS = {
  name: (measure, fractions.Fraction(size))
  for measure, size, *names in _TABLE
  for name in names
}
# Words behind a number that make it another number, or no number.
_OPERATORS = frozenset((
  "pi", "i", "e", "and", "or", "not", "to", "of", "plus", "minus", "times",
  "over", "by", "squared", "cubed", "less", "more", "mod", "modulo", "base",
  "factorial", "sin", "cos", "tan", "log", "ln", "exp", "sqrt", "choose",
  "half", "halves", "third", "thirds", "quarter", "quarters", "fifth",
  "fifths", "tenth", "tenths", "th", "st", "nd", "rd", "if", "for", "all", "in",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Number:
  value: fractions.Fraction
  places: int | None = None  # decimal places it was written with
  percent: bool = False
  unit: str = ""  # as `_UNITS` names its measure, or as it was written
  size: fractions.Fraction = fractions.Fraction(1)  # of the unit
  loose: bool = False  # its unit may be a variable: "5 m"


def same(answer: str, truth: str) -> bool | None:
  """Whether two answers are the same; None if undecided.

  Args:
    answer: as a completion states it, LaTeX allowed.
    truth: the true one.
  """
  answer, truth = answer.strip(), truth.strip()
  if max(len(answer), len(truth)) > _LONGEST:
    return True if answer == truth else None
  (name, left), (true_name, right) = map(_named, map(_plain, (answer, truth)))
  if name and true_name and name != true_name:
    return None
  return _compared(left, right)


def right(text: str, reference: str) -> bool | None:
  """Whether a completion's answer matches its reference; None if undecided.

  Args:
    text: the whole completion, thought included.
    reference: see `math_answer.of_reference`.

  Raises:
    ValueError: the reference holds no answer.
  """
  truth = math_answer.of_reference(reference)
  tail = math_answer.after_thought(text)
  if tail is None or not tail.strip():
    return False
  stated = math_answer.final_answer(text)
  if stated is None:
    # An answer and nothing else, such as "(A)" or "Paris".
    alone = tail.strip().strip("*").rstrip(".")
    if len(alone) <= _ALONE and not re.search(r"\s", alone):
      verdict = same(alone, truth.text)
      if verdict is not None:
        return verdict
    # Words alone do not give a number, unless they are numbers.
    words = set(re.findall("[a-z]+", tail.lower()))
    return False if is_number(truth.text) and not words & set(_WORDS) else None
  if not (stated.sure and truth.sure):
    return None
  return same(stated.text, truth.text)


def is_number(answer: str) -> bool:
  """Whether an answer is a number whose value is known here."""
  answer = answer.strip()
  if len(answer) > _LONGEST:
    return False
  return _number(_named(_plain(answer))[1]) is not None


def _compared(left: str, right: str, nested: bool = False) -> bool | None:
  """`same` for normalised answers without names.

  Args:
    left: one of them.
    right: the other.
    nested: whether they are elements of a list. Sets among those are compared
      in the order given.
  """
  if not (_letter(left) or _letter(right)):
    left, right = (_CHOSEN.sub("", side) for side in (left, right))
  number, true_number = _number(left), _number(right)
  if number is not None and true_number is not None:
    return _equal(number, true_number)
  if number is not None or true_number is not None:
    other = right if number is not None else left
    if other.startswith("not "):
      value = _number(other.removeprefix("not "))
      return False if value == (number or true_number) else None
    items = _items(other)
    # A pair is no number; a bare "1,2" may be one.
    pair = items is not None and items[0][:1] in ("(", "[")
    return False if pair or _RANGE.fullmatch(other) else None
  choice = _letter(left) or _chosen(left)
  true_choice = _letter(right) or _chosen(right)
  if choice and true_choice:
    if choice == true_choice:
      return True
    return False if choice.lower() != true_choice.lower() else None
  if _tight(left) == _tight(right):
    return bool(left) or None
  word = _tight(left).casefold()
  if len(word) > 1 and word.isalpha() and word == _tight(right).casefold():
    return True
  items, true_items = _items(left), _items(right)
  if items is None or true_items is None or items[0] != true_items[0]:
    return None
  if len(items[1]) != len(true_items[1]):
    return None
  verdicts = [
    _compared(*pair, nested=True) for pair in zip(items[1], true_items[1])
  ]
  if all(verdicts):
    return True
  if items[0]:
    return False if False in verdicts else None
  if nested or len(items[1]) > _MOST:
    return None
  left_out = list(true_items[1])
  for item in items[1]:
    same_as = [true for true in left_out if _compared(item, true, nested=True)]
    if not same_as:
      return None
    left_out.remove(same_as[0])
  return True


def _plain(text: str) -> str:
  """Normalises an answer: strips dollars, spacing and text commands."""
  text = math_answer.fold(text)
  for pattern, by in _RENAMED:
    text = pattern.sub(by, text)
  text = _undressed(_DROPPED.sub("", text))
  text = _PAIRED.sub(r" \1 ", _TEXT.sub(r" \1 ", text))
  return _undressed(" ".join(text.split()))


def _undressed(text: str) -> str:
  """Strips surrounding formula marks, Markdown and a full stop."""
  while True:
    before = text
    text = text.strip(" \t\n").rstrip(" \t\n.,;:")
    for opens, closes in (
      ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"),
      ("\"", "\""),
    ):  # fmt: skip
      inner = text[len(opens) : -len(closes)]
      if (
        text.startswith(opens)
        and text.endswith(closes)
        and len(text) > len(opens + closes)
        and opens not in inner
      ):
        text = inner
    for box in ("\\boxed{", "\\fbox{", "\\mathbf{"):
      inner = text.removeprefix(box)
      if inner != text and text.endswith("}") and "{" not in inner:
        text = inner[:-1]
    if text == before:
      return text


def _named(text: str) -> tuple[str, str]:
  """("x", "5") of "x = 5" and of "x = 2 + 3 = 5"; ("", "5") of "5"."""
  name, equals, rest = text.partition("=")
  several = "=" in rest and re.search(r"[,;]|\b(?:and|or)\b", text)
  value = rest.rpartition("=")[2].strip()
  if not equals or several or not value or rest.startswith(">"):
    return "", text
  if not _NAME.fullmatch(_SUBSCRIPT.sub("", name.strip())):
    return "", text
  return _tight(name), value


def _tight(text: str) -> str:
  """Removes spaces that do not separate numbers."""
  return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _letter(text: str) -> str:
  """The letter of a choice such as "(A)", "A." or "A"; else ""."""
  hit = re.fullmatch(r"\(?\s*([A-Za-z])\s*\)?[.:]?", text)
  return hit[1] if hit else ""


def _chosen(text: str) -> str:
  """The letter of a choice that is named with its text: "(B) 12"."""
  hit = _CHOSEN.match(text)
  return hit[1] if hit else ""


def _items(text: str) -> tuple[str, list[str]] | None:
  """The brackets around a list, and the parts between its commas.

  The brackets are "" for a set and for a bare list, whose order is free. None
  for what is no list, or might as well be a number ("(12,345)").
  """
  text = text.replace("\\{", "{").replace("\\}", "}")
  parts = None
  if _BRACKETS.get(text[:1]) and text[-1:] in (")", "]", "}"):
    parts = _parts(text[1:-1])
    brackets = "" if text[0] == "{" else text[0] + text[-1]
  if parts is None:
    parts, brackets = _parts(text), ""
  return None if parts is None else (brackets, parts)


def _parts(inner: str) -> list[str] | None:
  """What stands between commas, or semicolons, outside of brackets."""
  if re.fullmatch(r"\d{1,3}(?:,\d{3})+", inner):
    return None
  inner = _JOINING.sub(",", inner)
  for comma in (",", ";"):
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(inner):
      if c in "([{":
        depth += 1
      elif c in ")]}":
        depth -= 1
        if depth < 0:
          return None
      elif c == comma and not depth:
        parts.append(inner[begin:i].strip())
        begin = i + 1
    parts.append(inner[begin:].strip())
    if depth:
      return None
    if len(parts) > 1:
      return parts if all(parts) else None
  return None


def _number(text: str) -> _Number | None:
  """Parses a text as a number; None if it is not one."""
  while text[:1] + text[-1:] in ("()", "{}") and "," not in text:
    text = text[1:-1].strip()
  if text.casefold() in _WORDS:
    return _Number(fractions.Fraction(_WORDS[text.casefold()]))
  hit = _VALUE.fullmatch(text)
  if hit is None or sum(map(str.isdigit, text)) > _DIGITS:
    return None
  value = _value(hit)
  if value is None:
    return None
  if (hit["sign"] in ("-", "\u2013")) != bool(hit["inner"]):
    value = -value
  rest, unit, size = hit["rest"], hit["money"], fractions.Fraction(1)
  percent = _PERCENT.match(rest)
  if percent:
    rest = rest[percent.end() :]
  unit, size = _UNITS.get(unit, (unit, size))
  loose = False
  if rest.strip(" .,"):
    found = _unit(rest)
    if found is None or (unit and found.unit not in ("", unit)):
      return None
    value, unit = value * found.value, found.unit or unit
    size, loose = found.size, found.loose
  places = None
  if hit["number"] and not (hit["power"] or hit["ten"] or hit["ten1"]):
    places = len(hit["number"].partition(".")[2])
  return _Number(value, places, percent is not None, unit, size, loose)


def _value(hit: re.Match[str]) -> fractions.Fraction | None:
  """The unsigned value of a `_VALUE`; None if it has none or is too large."""
  if hit["number"]:
    power = int((hit["power"] or hit["ten"] or hit["ten1"] or "0")[:9])
    if abs(power) > _DIGITS:
      return None
    return _fraction(hit["number"]) * fractions.Fraction(10) ** power
  if hit["over"]:
    whole, above, below = hit["mixed"], hit["over"], hit["under"]
  elif hit["root"] or hit["root1"]:
    return _root(hit["factor"] or "1", hit["root"] or hit["root1"])
  else:
    whole = hit["whole"]
    above = hit["above"] or hit["above1"]
    below = hit["below"] or hit["below1"]
  divisor = _fraction(below)
  if not divisor or (whole and not 0 < _fraction(above) < divisor):
    return None
  return _fraction(whole or "0") + _fraction(above) / divisor


def _fraction(digits: str) -> fractions.Fraction:
  return fractions.Fraction(digits.replace(",", "").replace(" ", ""))


def _root(factor: str, square: str) -> fractions.Fraction | None:
  """factor * sqrt(square) where that is rational."""
  value = _fraction(square)
  above, below = math.isqrt(value.numerator), math.isqrt(value.denominator)
  root = fractions.Fraction(above, below)
  return _fraction(factor) * root if root * root == value else None


def _unit(rest: str) -> _Number | None:
  """Parses the text after a number into a factor and a unit."""
  hit = _UNIT.fullmatch(rest)
  if hit is None:
    return None
  words = hit["unit"].replace(".", " ").split()
  factor = 1
  while words and words[0].lower() in _SIZES:
    factor *= _SIZES[words.pop(0).lower()]
  if any(word.lower() in _OPERATORS for word in words):
    return None
  value = fractions.Fraction(factor)
  if not words:
    return _Number(value)
  unit, size = " ".join(words).lower(), fractions.Fraction(1)
  name = next((n for n in (unit, unit.removesuffix("s")) if n in _UNITS), "")
  # "5x" is a product, and so may be "5 xy", "5m" and "5abc".
  least = 3 if not name else 1 if hit["gap"] or unit == "°" else 2
  if len(words[0]) < least or not (hit["gap"] or name):
    return None
  unit, size = _UNITS.get(name, (unit.removesuffix("s"), size))
  power = re.sub(r"\D", "", (hit["power"] or "").translate(_POWERS)) or "1"
  return _Number(
    value,
    unit=f"{unit}^{power}" if power != "1" else unit,
    size=size ** int(power),
    loose=len(name) == 1 and name.isalpha(),
  )


_POWERS = {ord("²"): "2", ord("³"): "3"}


def _equal(left: _Number, right: _Number) -> bool | None:
  """Whether two numbers are the same; None if units or digits leave it open."""
  if left.unit and right.unit:
    if left.unit == right.unit:
      if left.size != right.size:
        return left.value * left.size == right.value * right.size
    else:
      # Hours are no metres; what apples are, only their names say.
      measures = {measure for measure, _ in _UNITS.values()}
      known = {left.unit.split("^")[0], right.unit.split("^")[0]} <= measures
      return False if known else None
  elif left.loose or right.loose:
    return None if left.value == right.value else False
  if left.value == right.value:
    return True
  if left.percent != right.percent:
    # "50%" may be asked for as 50 and as 0.5.
    part, whole = (left, right) if left.percent else (right, left)
    return True if part.value == 100 * whole.value else None
  for one, other in ((left, right), (right, left)):
    if one.places and abs(one.value - other.value) * 10**one.places * 2 <= 1:
      return None
  return False
