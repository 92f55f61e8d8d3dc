"""The 0/1 reward of tasks with one right answer.

Two methods compare what a completion says after its thought with the reference.
"exact" compares them itself (`math_exact`), and uses math-verify only if that
is undecided; "math_verify" always uses that package. If a check of math-verify
fails (it raises, times out, or its process dies), the exact comparison is used
if it can decide. An answer that neither can decide gets 0, and is counted as
undecided.
"""

import collections
import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from opera_jax import structs
from opera_jax.rewards import math_exact, math_pool
from opera_jax.text import math_answer

METHODS = ("exact", "math_verify")


@dataclasses.dataclass(frozen=True)
class Check:
  """The result of checking one completion.

  Attributes:
    right: whether its answer matches the reference; None if undecided.
    cannot_tell: whether the exact comparison was used and could not decide.
    failure: why math-verify's check failed; "" if it did not.
  """

  right: bool | None
  cannot_tell: bool = False
  failure: str = ""


@dataclasses.dataclass(frozen=True)
class Reward:
  """1 for a right answer to a maths prompt, else 0; open-ended prompts get 0.

  Attributes:
    method: "exact" or "math_verify".
    timeout: seconds, whole or not, that one check may take in math-verify.
    workers: processes of math-verify.
  """

  by_host: ClassVar[bool] = True

  method: str = "exact"
  timeout: float = 5.0
  workers: int = 2

  def __post_init__(self):
    """Refuses settings that no check could run with."""
    _check_settings(self.method, self.timeout, self.workers)

  def logprob_request(
    self, rollouts: structs.Rollouts
  ) -> structs.LogprobRequest:
    """Nothing is scored."""
    return structs.LogprobRequest()

  def rewards(
    self, rollouts: structs.Rollouts, result: structs.LogprobResult
  ) -> dict[str, np.ndarray]:
    """Returns `total`, which equals `correct`, and flags of the checks.

    Returns:
      float32 [B, N] each, 1 where it holds: `correct`; `cannot_tell`, where
      the exact comparison could not; `check_failed`, where math-verify's check
      did not run; `undecided`, where neither gave a verdict. Open-ended
      prompts have 0 everywhere.
    """
    checks = _checks(
      rollouts,
      method=self.method,
      timeout=self.timeout,
      workers=self.workers,
    )
    shape = (len(rollouts.prompts), rollouts.samples)

    def part(values: list[bool]) -> np.ndarray:
      return np.asarray(values, np.float32).reshape(shape)

    right_BN = part([check.right is True for check in checks])
    return {
      "total": right_BN,
      "correct": right_BN,
      "cannot_tell": part([check.cannot_tell for check in checks]),
      "check_failed": part([bool(check.failure) for check in checks]),
      "undecided": part([check.right is None for check in checks]),
    }


def right(
  rollouts: structs.Rollouts,
  *,
  method: str = "exact",
  timeout: float = 5.0,
  workers: int = 2,
) -> np.ndarray:
  """Which samples answer their maths prompt correctly, bool [B, N].

  Args:
    rollouts: samples; those of open-ended prompts are never right.
    method: see `check_many`.
    timeout: see `check_many`.
    workers: see `check_many`.
  """
  checks = _checks(rollouts, method=method, timeout=timeout, workers=workers)
  right_R = np.asarray([check.right is True for check in checks], bool)
  return right_R.reshape(len(rollouts.prompts), rollouts.samples)


def correct(
  text: str,
  reference: str,
  *,
  method: str = "exact",
  timeout: float = 5.0,
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
  timeout: float = 5.0,
  workers: int = 2,
) -> list[bool]:
  """Whether each completion is known to be right; see `check_many`."""
  checks = check_many(
    texts, references, method=method, timeout=timeout, workers=workers
  )
  return [check.right is True for check in checks]


def check_many(
  texts: Sequence[str],
  references: Sequence[str],
  *,
  method: str = "exact",
  timeout: float = 5.0,
  workers: int = 2,
) -> list[Check]:
  """Whether each completion states its reference's answer.

  A warning names and counts the checks that failed to run.

  Args:
    texts: whole completions, thoughts included. One whose thought is not
      closed, or that says nothing after it, is wrong.
    references: see `math_answer.of_reference`.
    method: "exact", which asks math-verify where it cannot tell, if that
      package is installed; or "math_verify".
    timeout: wall seconds that one check may take in math-verify.
    workers: its processes.

  Raises:
    ValueError: an unknown method, a time limit or a number of processes that
      is not above 0, "math_verify" without that package, a reference without
      an answer.
    RuntimeError: a process of math-verify cannot start.
  """
  _check_settings(method, timeout, workers)
  out: list[Check] = []
  asked: list[int] = []
  for text, reference in zip(texts, references, strict=True):
    verdict = None
    tail = math_answer.after_thought(text)
    if method == "exact" or tail is None or not tail.strip():
      verdict = math_exact.right(text, reference)
    else:
      math_answer.of_reference(reference)
    if verdict is None:
      asked.append(len(out))
    out.append(
      Check(verdict, cannot_tell=method == "exact" and verdict is None)
    )
  if not asked or not math_pool.available():
    return out
  outcomes = math_pool.check(
    [
      (
        math_answer.gold(references[i]),
        math_answer.fold(math_answer.after_thought(texts[i]) or ""),
      )
      for i in asked
    ],
    timeout=timeout,
    workers=workers,
  )
  for i, outcome in zip(asked, outcomes):
    verdict, cannot_tell = outcome.right, out[i].cannot_tell
    if verdict is None and method == "math_verify":
      verdict = math_exact.right(texts[i], references[i])
      cannot_tell = verdict is None
    out[i] = Check(verdict, cannot_tell, outcome.failure)
  _warn(out, len(asked))
  return out


def _checks(
  rollouts: structs.Rollouts, *, method: str, timeout: float, workers: int
) -> list[Check]:
  """One check per completion; open-ended prompts are not checked, and never
  right."""
  tasks = [
    rollouts.prompts[rollouts.prompt_index(r)]
    for r in range(len(rollouts.completions))
  ]
  maths = [r for r, task in enumerate(tasks) if task.task == "math"]
  out = [Check(False)] * len(tasks)
  found = check_many(
    [rollouts.texts[r] for r in maths],
    [tasks[r].reference for r in maths],
    method=method,
    timeout=timeout,
    workers=workers,
  )
  for r, check in zip(maths, found):
    out[r] = check
  return out


def _check_settings(method: str, timeout: float, workers: int) -> None:
  if method not in METHODS:
    raise ValueError(f"Unknown method {method!r}. Use one of {METHODS}.")
  number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
  if not number or not 0 < timeout < math.inf:
    raise ValueError(
      f"The time limit of a maths check is {timeout!r}; it must be a number of "
      "seconds above 0, such as 5 or 2.5."
    )
  whole = isinstance(workers, int) and not isinstance(workers, bool)
  if not whole or workers < 1:
    raise ValueError(
      f"The maths checks have {workers!r} processes; give a whole number "
      "above 0."
    )
  if method == "math_verify" and not math_pool.available():
    raise ValueError(
      "Method 'math_verify' needs the package math-verify, which is not "
      "installed. Install math-verify, or use 'exact'."
    )


def _warn(checks: Sequence[Check], asked: int) -> None:
  failures = collections.Counter(c.failure for c in checks if c.failure)
  if not failures:
    return
  undecided = sum(c.right is None for c in checks if c.failure)
  named = ", ".join(f"{n} x {name}" for name, n in failures.most_common())
  warnings.warn(
    f"{failures.total()} of {asked} checks by math-verify failed to run "
    f"({named}); {undecided} of them are undecided and pay 0, the exact "
    "comparison decided the others.",
    RuntimeWarning,
    stacklevel=3,
  )
