"""The process's start time, and how long its main thread waited for programs.

This module does not need JAX, so a driver imports it first.

Waiting is the time in which the main thread is blocked on a program's result:
it fetches arrays (`layout.to_host`), or all sampling threads are busy
(`rollout.workers`). It is a lower bound: on a CPU a small program runs inside
the call that dispatches it.
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
  """Counts the block's duration as waiting, in the main thread only."""
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
