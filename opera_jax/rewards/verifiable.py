"""The 0/1 reward of tasks with one right answer.

The answer is what stands after the thought: the last `\\boxed{...}`, or else
the last number or fraction. Two answers agree when they are the same number or
the same string after normalisation; math-verify, where asked for, decides the
rest (equal expressions, intervals, sets) in other processes, with time-outs.
"""

import atexit
import dataclasses
import fractions
import functools
import multiprocessing
import re
from collections.abc import Sequence

import numpy as np

from opera_jax import structs
from opera_jax.rewards import math_worker

METHODS = ("exact", "math_verify")

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


@dataclasses.dataclass(frozen=True)
class Reward:
  """1 for a right answer to a maths prompt, else 0; open-ended prompts get 0.

  Attributes:
    method: "exact" or "math_verify".
    timeout: seconds that one answer may take in math-verify.
    workers: processes of math-verify.
  """

  method: str = "exact"
  timeout: int = 5
  workers: int = 2

  def questions(self, rollouts: structs.Rollouts) -> structs.Questions:
    """Nothing is priced."""
    return structs.Questions()

  def rewards(
    self, rollouts: structs.Rollouts, answers: structs.Answers
  ) -> dict[str, np.ndarray]:
    """`total` and the same as `correct`, float32 [B, N]."""
    right_BN = right(
      rollouts,
      method=self.method,
      timeout=self.timeout,
      workers=self.workers,
    ).astype(np.float32)
    return {"total": right_BN, "correct": right_BN}


def right(
  rollouts: structs.Rollouts,
  *,
  method: str = "exact",
  timeout: int = 5,
  workers: int = 2,
) -> np.ndarray:
  """Which samples answer their maths prompt rightly, bool [B, N].

  Args:
    rollouts: samples; those of open-ended prompts are never right.
    method: see `correct_many`.
    timeout: see `correct_many`.
    workers: see `correct_many`.
  """
  tasks = [
    rollouts.prompts[rollouts.owner(r)]
    for r in range(len(rollouts.completions))
  ]
  maths = [r for r, task in enumerate(tasks) if task.task == "math"]
  out_R = np.zeros(len(tasks), bool)
  out_R[maths] = correct_many(
    [rollouts.texts[r] for r in maths],
    [tasks[r].reference for r in maths],
    method=method,
    timeout=timeout,
    workers=workers,
  )
  return out_R.reshape(len(rollouts.prompts), rollouts.samples)


def correct(
  text: str,
  reference: str,
  *,
  method: str = "exact",
  timeout: int = 5,
  workers: int = 1,
) -> bool:
  """`correct_many` of one completion."""
  return correct_many(
    [text], [reference], method=method, timeout=timeout, workers=workers
  )[0]


def correct_many(
  texts: Sequence[str],
  references: Sequence[str],
  *,
  method: str = "exact",
  timeout: int = 5,
  workers: int = 2,
) -> list[bool]:
  """Whether each completion states its reference's answer.

  Args:
    texts: whole completions, thoughts included.
    references: see `true_answer`.
    method: "exact"; or "math_verify" to also ask that package about answers
      that are not the same number or string. Where it runs out of time or
      dies, the exact comparison stands.
    timeout: seconds that math-verify may take for one answer.
    workers: its processes.

  Raises:
    ValueError: an unknown method, or an empty reference.
  """
  if method not in METHODS:
    raise ValueError(f"Unknown method {method!r}. Use one of {METHODS}.")
  out, open_questions = [], []
  for text, reference in zip(texts, references, strict=True):
    truth, answer = true_answer(reference), final_answer(text)
    same = answer is not None and answer == truth
    if answer is not None and not same:
      number, true_number = _number(answer), _number(truth)
      if number is not None and true_number is not None:
        same = number == true_number
      else:
        open_questions.append((len(out), truth, answer))
    out.append(same)
  if method == "math_verify" and open_questions:
    asked = [(truth, answer) for _, truth, answer in open_questions]
    decided = _verified(asked, timeout, workers)
    for (place, _, _), same in zip(open_questions, decided):
      out[place] = same
  return out


def _verified(
  asked: Sequence[tuple[str, str]], timeout: int, workers: int
) -> list[bool]:
  """math-verify's word on pairs of answers; False where it gives none.

  Its own time-outs are signals, which a busy C extension may not hear, so the
  processes are killed when an answer is overdue, and the rest asked anew.
  """
  pool = _pool(workers)
  waiting = [
    pool.apply_async(math_worker.equal, (*pair, timeout)) for pair in asked
  ]
  out = []
  for call in waiting:
    try:
      out.append(call.get(timeout=4 * timeout + 1))
    except multiprocessing.TimeoutError:
      out.append(False)
      pool.terminate()
      _pool.cache_clear()
      rest = asked[len(out) :]
      return out + (_verified(rest, timeout, workers) if rest else [])
  return out


@functools.cache
def _pool(workers: int):
  """Processes that have math-verify loaded; they fork from no JAX process."""
  context = multiprocessing.get_context("spawn")
  pool = context.Pool(workers)
  atexit.register(pool.terminate)
  pool.apply(math_worker.warm)
  return pool


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
