"""When the process began, and how long its main thread waited for programs.

Nothing here needs JAX, so that a driver imports it before anything else.

Waiting is the time in which the main thread can do nothing but wait for what
a program computes: it fetches results (`layout.to_host`), or all threads that
sample are at work (`rollout.workers`). It is a lower bound: on a CPU a small
program runs in the very call that starts it.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

_BEGAN = time.time()
_waited = [0.0]


def age() -> float:
  """Seconds since the process imported this module."""
  return time.time() - _BEGAN


def began() -> float:
  """`time.time()` when the process imported this module."""
  return _BEGAN


@contextlib.contextmanager
def waiting() -> Iterator[None]:
  """Counts what the block takes as waiting, in the main thread alone."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  start = time.monotonic()
  try:
    yield
  finally:
    _waited[0] += time.monotonic() - start


def waited() -> float:
  """Seconds that the main thread has waited so far."""
  return _waited[0]
