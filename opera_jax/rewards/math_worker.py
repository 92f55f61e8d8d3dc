"""The process in which math-verify compares answers; run as a script.

A line of standard input is a check, `[reference, answer]` in JSON; a line of
standard output is its verdict: `{"right": true}`, `{"right": null}` where
math-verify finds nothing to compare, `{"failure": "ValueError"}` where it
raises. The first line says that it is ready, or why it is not.

math-verify's own time-outs are off: they are signals, which a busy C function
does not hear. The parent ends this process when a check is overdue; should
the parent be gone, the limit on processor time does.
"""

import itertools
import json
import logging
import os
import re
import resource
import sys
from concurrent import futures
from typing import Any, TextIO

# Bytes of memory, and seconds of processor time that a check may take beyond
# twice its time limit.
_MEMORY = 4 * 2**30
_GRACE = 5
# References that math-verify reads as they stand; others are LaTeX to it.
_ANCHORED = re.compile(r"\$|\\boxed|\\\(|\\\[|(?i:answer)")
_AMOUNT = re.compile(r"[-+]?[\d.,]+ ?%?(?: [^\W\d_]{2,30}){0,5}\.?")


def main(timeout: float, paths: list[str]) -> None:
  """Answers until standard input ends.

  Args:
    timeout: seconds that the parent gives each check.
    paths: where the parent finds modules; none keeps this process's own.
  """
  sys.path[:] = paths or sys.path
  # What a library prints is no verdict.
  replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  logging.disable(logging.CRITICAL)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  with futures.ThreadPoolExecutor(1) as thread:
    error = thread.submit(_warm).exception()
    if error is not None:
      _say(replies, {"failure": f"{type(error).__name__}: {error}"})
      return
    _limit(resource.RLIMIT_AS, _MEMORY)
    _say(replies, {"ready": True})
    for line in sys.stdin:
      used = resource.getrusage(resource.RUSAGE_SELF)
      seconds = used.ru_utime + used.ru_stime + 2 * timeout + _GRACE
      _limit(resource.RLIMIT_CPU, int(seconds))
      reference, answer = json.loads(line)
      _say(replies, check(reference, answer, thread))


def check(
  reference: str, answer: str, thread: futures.ThreadPoolExecutor
) -> dict[str, Any]:
  """math-verify's verdict by its own defaults, as a reply.

  Args:
    reference: the true answer, see `readable`.
    answer: all that a completion says after its thought.
    thread: runs the calls, so that whatever one raises is a failure with a
      name. It is no verdict, unless another reading is found right.
  """
  import math_verify

  parsed = []
  for text in (readable(reference), answer):
    call = thread.submit(
      math_verify.parse, text, parsing_timeout=None, raise_on_error=True
    )
    if call.exception() is not None:
      return {"failure": type(call.exception()).__name__}
    parsed.append(call.result())
  if not all(parsed):
    return {"right": None}
  failure = ""
  for true, stated in itertools.product(*parsed):
    call = thread.submit(
      math_verify.verify,
      true,
      stated,
      timeout_seconds=None,
      raise_on_error=True,
    )
    if call.exception() is not None:
      failure = type(call.exception()).__name__
    elif call.result():
      return {"right": True}
  return {"failure": failure} if failure else {"right": False}


def readable(reference: str) -> str:
  """A reference as math-verify wants it: formulas between dollars."""
  if _ANCHORED.search(reference) or _AMOUNT.fullmatch(reference):
    return reference
  return f"${reference}$"


def _warm() -> None:
  """Loads math-verify and its grammar before the first time limit runs."""
  import math_verify

  one, two = (math_verify.parse(x, parsing_timeout=None) for x in ("$1$", "1"))
  math_verify.verify(one, two, timeout_seconds=None)


def _say(replies: TextIO, message: dict[str, Any]) -> None:
  replies.write(json.dumps(message) + "\n")
  replies.flush()


def _limit(what: int, value: int) -> None:
  """Lowers or raises a soft limit, within the hard one."""
  _, hard = resource.getrlimit(what)
  if hard != resource.RLIM_INFINITY:
    value = min(value, hard)
  resource.setrlimit(what, (value, hard))


if __name__ == "__main__":
  main(float(sys.argv[1]), json.loads(sys.argv[2]))
