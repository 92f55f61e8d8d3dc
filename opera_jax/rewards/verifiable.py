"""The 0/1 reward of tasks with one right answer.

The answer is what stands after the thought: the last `\\boxed{...}`, or else
the last number or fraction. Two answers agree when they are the same number or
the same string after normalisation; math-verify, where asked for, decides the
rest (equal expressions, intervals, sets).
"""

import fractions
import re

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_NUMBER = re.compile(
  r"-?\\d?frac\{-?\d+\}\{\d+\}"
  r"|-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?"
  r"|-?\.\d+"
)
_FRAC = re.compile(r"^(-?)\\d?frac\{(-?\d+)\}\{(\d+)\}$")
_WRAPPED = re.compile(r"^\\(?:text|mathrm|mbox|textbf)\{(.*)\}$")


def final_answer(text: str) -> str | None:
  """The answer stated in a completion, normalised; None if there is none.

  Args:
    text: the whole completion. A thought that was opened and never closed
      gives no answer.
  """
  head, closed, tail = text.rpartition(THINK_CLOSE)
  if not closed and THINK_OPEN in head + tail:
    return None
  boxed = _last_boxed(tail)
  if boxed is not None:
    return normalise(boxed)
  numbers = list(_NUMBER.finditer(tail))
  if not numbers:
    return None
  last = numbers[-1]
  # In "10-4" the dash is an operator, not a sign.
  glued = last.start() > 0 and tail[last.start() - 1].isalnum()
  number = last.group()
  return normalise(number[1:] if glued and number[0] == "-" else number)


def true_answer(reference: str) -> str:
  """The answer of a reference: after "####" as in GSM8K, boxed, or all of it.

  Raises:
    ValueError: the reference is empty.
  """
  text = reference.rpartition("####")[2].strip()
  boxed = _last_boxed(text)
  answer = normalise(text if boxed is None else boxed)
  if not answer:
    raise ValueError(
      f"A maths task needs a final answer, got the reference {reference!r}. "
      'Give the answer itself, "#### answer", or \\boxed{answer}.'
    )
  return answer


def normalise(answer: str) -> str:
  """Strips what does not change an answer: $, commas, spaces, a full stop."""
  answer = answer.strip()
  wrapped = _WRAPPED.match(answer)
  if wrapped:
    answer = wrapped.group(1)
  for dropped in ("\\$", "$", "\\%", "%", "\\!", "\\,", "\\left", "\\right"):
    answer = answer.replace(dropped, "")
  answer = answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
  answer = re.sub(r"\s+", "", answer).rstrip(".")
  return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)


def correct(
  text: str, reference: str, *, method: str = "exact", timeout: int = 5
) -> bool:
  """Whether a completion states the reference's answer.

  Args:
    text: the whole completion, thought included.
    reference: see `true_answer`.
    method: "exact", or "math_verify" to also ask that package, which must be
      installed and works in the main thread alone.
    timeout: seconds that math-verify may take for one answer.

  Raises:
    ValueError: an unknown method, or an empty reference.
  """
  if method not in ("exact", "math_verify"):
    raise ValueError(
      f'Unknown method {method!r}. Use "exact" or "math_verify".'
    )
  truth = true_answer(reference)
  answer = final_answer(text)
  if answer is None:
    return False
  if answer == truth:
    return True
  number, true_number = _number(answer), _number(truth)
  if number is not None and true_number is not None:
    return number == true_number
  if method == "exact":
    return False
  import math_verify

  parsed = [
    math_verify.parse(f"${side}$", parsing_timeout=timeout)
    for side in (truth, answer)
  ]
  return math_verify.verify(*parsed, timeout_seconds=timeout)


def _last_boxed(text: str) -> str | None:
  """What the last `\\boxed{...}` holds, braces matched; None if unclosed."""
  begin = text.rfind("\\boxed{")
  if begin < 0:
    return None
  begin += len("\\boxed{")
  depth = 1
  for i in range(begin, len(text)):
    depth += {"{": 1, "}": -1}.get(text[i], 0)
    if not depth:
      return text[begin:i]
  return None


def _number(answer: str) -> fractions.Fraction | None:
  """The exact value of a plain number or fraction, else None."""
  frac = _FRAC.match(answer)
  if frac:
    sign, above, below = frac.groups()
    answer = f"{sign}{above}/{below}".replace("--", "")
  try:
    return fractions.Fraction(answer)
  except (ValueError, ZeroDivisionError):
    return None
