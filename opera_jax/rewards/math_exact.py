"""Whether two final answers are the same, told without a computer algebra.

What is decided here is sure: the same number (also as a fraction, a mixed or
a decimal number, a percentage, with its unit, after "x =", or as a word), the
same letter of a choice, the same list of those, the same LaTeX; or two numbers
that differ. For everything else the answer is None, "cannot tell".

Each answer is bounded before it is parsed, so that none costs more than its
reading: answers longer than `_LONGEST` characters and numbers of more than
`_DIGITS` digits are compared as text alone.
"""

import dataclasses
import fractions
import functools
import math
import re

from opera_jax.text import math_answer

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
  (re.compile(r"√|\\sqrt(?![a-z])"), r"\\sqrt"),
  (re.compile(r"\\(?:le|ge|ne)q(?![a-z])"), lambda hit: hit.group()[:-1]),
  (re.compile(r"[¼½¾⅓⅔⅕⅛]"), lambda hit: _VULGAR[hit.group()]),
)
_VULGAR = {
  c: rf"\frac{{{above}}}{{{below}}}"
  for c, above, below in (
    ("¼", 1, 4), ("½", 1, 2), ("¾", 3, 4), ("⅓", 1, 3), ("⅔", 2, 3),
    ("⅕", 1, 5), ("⅛", 1, 8),
  )
}  # fmt: skip
_TEXT = re.compile(
  r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*"
  r"\{([^{}]*)\}"
)
_NAMED = re.compile(
  r"\s*(\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?)\s*=(?!=)\s*(.*)",
  re.DOTALL,
)
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
  r"(?P<gap>[\s\\]*)(?P<unit>°\s*[CF]?|[A-Za-z][A-Za-z./\- ]*)"
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
# Units by all their names; what is not here is compared by its name.
_UNITS = {
  name: names[0]
  for names in (
    ("mm", "millimeter", "millimetre"), ("cm", "centimeter", "centimetre"),
    ("m", "meter", "metre"), ("km", "kilometer", "kilometre"),
    ("inch", "inche"), ("ft", "foot", "feet"), ("yd", "yard"), ("mi", "mile"),
    ("mg", "milligram"), ("g", "gram"), ("kg", "kilogram"), ("oz", "ounce"),
    ("s", "sec", "second"), ("min", "minute"), ("h", "hr", "hour"), ("day",),
    ("week",), ("month",), ("year",), ("ml", "milliliter", "millilitre"),
    ("l", "liter", "litre"), ("$", "dollar", "usd"), ("cent",),
    ("€", "euro"), ("°", "degree", "deg"), ("rad", "radian"), ("mph",),
  )
  for name in names
}  # fmt: skip
_KNOWN = frozenset(_UNITS.values())
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
  unit: str = ""
  loose: bool = False  # its unit may be a variable: "5 m"


def same(answer: str, truth: str) -> bool | None:
  """Whether two answers are the same; None where this cannot be told.

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
  """Whether a completion states its reference's answer; None: cannot tell.

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


def _compared(left: str, right: str) -> bool | None:
  number, true_number = _number(left), _number(right)
  if number is not None and true_number is not None:
    return _equal(number, true_number)
  if number is not None or true_number is not None:
    other = right if number is not None else left
    items = _items(other)
    # A pair is no number; a bare "1,2" may be one.
    return False if items and items[0][:1] in ("(", "[") else None
  choice, true_choice = _letter(left), _letter(right)
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
  verdicts = [_compared(*pair) for pair in zip(items[1], true_items[1])]
  if all(verdicts):
    return True
  # A set may be given in another order.
  return False if False in verdicts and items[0] not in ("", "{}") else None


def _plain(text: str) -> str:
  """An answer without its dress: dollars around it, spacing, text commands."""
  text = math_answer.fold(text)
  for pattern, by in _RENAMED:
    text = pattern.sub(by, text)
  text = _undressed(_DROPPED.sub("", text))
  text = _TEXT.sub(r" \1 ", text)
  return _undressed(" ".join(text.split()))


def _undressed(text: str) -> str:
  """Without formula marks, Markdown and a full stop around it."""
  while True:
    before = text
    text = text.strip(" \t\n").removesuffix(".").strip(" \t\n")
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
  """("x", "5") of "x = 5"; an answer without a name has the name ""."""
  hit = _NAMED.fullmatch(text)
  if hit is None or "=" in hit[2]:
    return "", text
  return _tight(hit[1]), hit[2].strip()


def _tight(text: str) -> str:
  """Without the spaces that part nothing."""
  return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _letter(text: str) -> str:
  """The letter of a choice such as "(A)", "A." or "A"; else ""."""
  hit = re.fullmatch(r"\(?\s*([A-Za-z])\s*\)?[.:]?", text)
  return hit[1] if hit else ""


def _items(text: str) -> tuple[str, list[str]] | None:
  """The opening and closing bracket and the parts between the commas.

  The brackets are "" for a bare list. None for what is no list, or might as
  well be a number ("(12,345)").
  """
  text = text.replace("\\{", "{").replace("\\}", "}")
  brackets, inner = "", text
  if text[:1] in _BRACKETS and text[-1:] in (")", "]", "}") and len(text) > 2:
    brackets, inner = text[0] + text[-1], text[1:-1]
  if re.fullmatch(r"\d{1,3}(?:,\d{3})+", inner):
    return None
  parts, depth, begin = [], 0, 0
  for i, c in enumerate(inner):
    if c in "([{":
      depth += 1
    elif c in ")]}":
      depth -= 1
      if depth < 0:
        return None
    elif c == "," and not depth:
      parts.append(inner[begin:i].strip())
      begin = i + 1
  parts.append(inner[begin:].strip())
  if len(parts) < 2 or depth or not all(parts):
    return None
  return brackets, parts


def _number(text: str) -> _Number | None:
  """The number that a text is, else None."""
  while text[:1] == "(" and text[-1:] == ")" and "," not in text:
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
  rest, unit = hit["rest"], hit["money"]
  percent = _PERCENT.match(rest)
  if percent:
    rest = rest[percent.end() :]
  if rest.strip(" .,"):
    found = _unit(rest)
    if found is None or (unit and found[1] and found[1] != unit):
      return None
    value, unit = value * found[0], found[1] or unit
  places = None
  if hit["number"] and not (hit["power"] or hit["ten"] or hit["ten1"]):
    places = len(hit["number"].partition(".")[2])
  loose = len(unit) == 1 and unit.isalpha()
  return _Number(value, places, percent is not None, unit, loose)


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


def _unit(rest: str) -> tuple[int, str] | None:
  """What a number's unit multiplies it by, and the unit's name."""
  hit = _UNIT.fullmatch(rest)
  if hit is None:
    return None
  words = hit["unit"].replace(".", " ").split()
  if words and words[0].startswith("°"):
    return 1, "".join(words).lower()
  size = 1
  while words and words[0].lower() in _SIZES:
    size *= _SIZES[words.pop(0).lower()]
  if any(word.lower() in _OPERATORS for word in words):
    return None
  if not words:
    return size, ""
  names = [_canonical(word) for word in words]
  # "5x" is a product, and so may be "5 xy", "5m" and "5abc".
  known = len(names) == 1 and names[0] in _KNOWN
  least = 3 if hit["gap"] and not known else 1 if hit["gap"] else 2
  if len(words[0]) < least or not (hit["gap"] or known):
    return None
  power = re.sub(r"\D", "", (hit["power"] or "").translate(_POWERS))
  return size, " ".join(names) + power


_POWERS = {ord("²"): "2", ord("³"): "3"}


@functools.lru_cache(maxsize=1000)
def _canonical(word: str) -> str:
  """A unit's one name."""
  word = word.lower()
  singular = word[:-1] if len(word) > 2 and word.endswith("s") else word
  return _UNITS.get(word, _UNITS.get(singular, singular))


def _equal(left: _Number, right: _Number) -> bool | None:
  """Whether two numbers are the same; None where units or digits differ."""
  if left.unit and right.unit and left.unit != right.unit:
    known = left.unit in _KNOWN and right.unit in _KNOWN
    # 5 cm are not 5 m; 500 cm may be.
    return False if known and left.value == right.value != 0 else None
  if left.value == right.value:
    loose = left.loose or right.loose
    return None if loose and left.unit != right.unit else True
  if left.percent != right.percent:
    # "50%" may be asked for as 50 and as 0.5.
    part, whole = (left, right) if left.percent else (right, left)
    return True if part.value == 100 * whole.value else None
  for one, other in ((left, right), (right, left)):
    if one.places and abs(one.value - other.value) * 10**one.places * 2 <= 1:
      return None
  return False
