"""How the time of a call grows with the size of what it is given."""

import gc
import time
from collections.abc import Callable
from typing import Any

# A size doubled twice takes 4 times as long if the time is linear, 16 times if
# it is quadratic. Between them lies room for caches and a busy machine.
LINEAR = 10.0
# Seconds of processor time below which nothing is told from noise.
_LEAST = 2e-3


def twice_doubled(
  call: Callable[[Any], Any], make: Callable[[int], Any], size: int
) -> float:
  """The time at four times a size over the time at that size, each the best.

  Args:
    call: what is measured, up to seven times.
    make: gives the argument of a size.
    size: the smaller one, large enough to be measured.
  """
  arguments = [make(size), make(4 * size)]
  times = [_seconds(call, argument) for argument in arguments]
  for _ in range(6):
    if times[1] < LINEAR * max(times[0], _LEAST):
      break
    for i, argument in enumerate(arguments):
      times[i] = min(times[i], _seconds(call, argument))
  return times[1] / max(times[0], _LEAST)


def _seconds(call: Callable[[Any], Any], argument: Any) -> float:
  gc.disable()
  try:
    begin = time.thread_time()
    call(argument)
    return time.thread_time() - begin
  finally:
    gc.enable()
