"""What runs in a process of the maths checkers; imports nothing heavy."""


def warm() -> None:
  """Loads math-verify before the first time-out runs."""
  import math_verify

  math_verify.parse("$1$")


def equal(truth: str, answer: str, timeout: int) -> bool:
  """Whether math-verify finds two answers equal.

  Args:
    truth: LaTeX of the true answer, without dollars.
    answer: LaTeX of the stated one.
    timeout: seconds for each of its parses and the comparison.
  """
  import math_verify

  parsed = [
    math_verify.parse(f"${side}$", parsing_timeout=timeout)
    for side in (truth, answer)
  ]
  return bool(math_verify.verify(*parsed, timeout_seconds=timeout))
