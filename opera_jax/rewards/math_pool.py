"""A pool of subprocesses that compare answers with math-verify.

Each runs the script `math_worker`, which loads neither JAX nor the run's
script. A check that times out kills its process, which delays other checks only
by the start of a new one. A process that dies during a check is noticed at
once. A process that cannot start is an error, without a retry.
"""

import atexit
import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from opera_jax.rewards import math_worker

# Seconds to load math-verify, on a machine that has much else to do.
_START = 120
# Environment variables that are passed to a worker; no secrets.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The outcome of one check.

  Attributes:
    right: the verdict; None if there is none.
    failure: why the check failed to run; "" if it ran. One that ran without a
      verdict found nothing that it could compare.
  """

  right: bool | None
  failure: str = ""


def available() -> bool:
  """Whether math-verify is installed."""
  return importlib.util.find_spec("math_verify") is not None


def check(
  pairs: Sequence[tuple[str, str]], *, timeout: float, workers: int
) -> list[Outcome]:
  """Runs math-verify on (reference, answer) pairs.

  Args:
    pairs: the part of a reference that holds its answer, and all that a
      completion says after its thought. Equal pairs are asked about once.
    timeout: wall seconds that one check may take.
    workers: processes that share the checks.

  Raises:
    RuntimeError: a process cannot start.
  """
  asked = list(dict.fromkeys(pairs))
  crew: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
  hired = _hire(min(workers, len(asked)))
  for worker in hired:
    crew.put(worker)

  def ask(pair: tuple[str, str]) -> Outcome:
    worker = crew.get()
    try:
      return worker.ask(pair, timeout)
    finally:
      crew.put(worker)

  done = False
  threads = futures.ThreadPoolExecutor(max(len(hired), 1))
  try:
    said = dict(zip(asked, threads.map(ask, asked)))
    done = True
  finally:
    if not done:
      for worker in hired:
        worker.end()
    threads.shutdown(cancel_futures=True)
    _IDLE.extend(hired)
  return [said[pair] for pair in pairs]


class _Worker:
  """One worker process, started on first use."""

  def __init__(self):
    self._process: Any = None  # a Popen[bytes] while it runs
    self._timeout = 0.0

  def ask(self, pair: tuple[str, str], timeout: float) -> Outcome:
    """One check; ends the process if that takes longer than `timeout`."""
    if self._process is None or self._timeout != timeout:
      self.end()
      self._start(timeout)
    reply, overdue = self._exchange(json.dumps(pair) + "\n", timeout)
    if overdue or reply is None:
      code = self.end(grace=0.0 if overdue else 1.0)
      why = f"no verdict in {timeout:g} s" if overdue else _ended(code)
      return Outcome(None, why)
    if reply.get("failure") == MemoryError.__name__:
      self.end()
    if "failure" in reply:
      return Outcome(None, reply["failure"])
    return Outcome(reply["right"])

  def end(self, grace: float = 0.0) -> int | None:
    """Kills the process after seconds of grace; returns its exit code."""
    process, self._process = self._process, None
    if process is None:
      return None
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(grace)
    process.kill()
    code = process.wait()
    process.stdin.close()
    process.stdout.close()
    return code

  def _start(self, timeout: float) -> None:
    self._timeout = timeout
    paths = [os.path.abspath(path) for path in sys.path]
    kept = {
      name: os.environ[name] for name in _ENVIRONMENT if name in os.environ
    }
    try:
      self._process = subprocess.Popen(
        # -P: modules beside the script are not what libraries import.
        [
          sys.executable,
          "-P",
          math_worker.__file__,
          repr(float(timeout)),
          json.dumps(paths),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Verdicts of sympy may depend on the order of a set.
        env=kept | {"PYTHONHASHSEED": "0"},
        bufsize=0,
        start_new_session=True,
      )
    except OSError as error:
      raise _no_start(f"{sys.executable}: {error}") from error
    reply, overdue = self._exchange("", _START)
    if reply is None or "failure" in reply:
      code = self.end(grace=0.0 if overdue else 1.0)
      if overdue:
        raise _no_start(f"it was not ready after {_START} s")
      raise _no_start(_ended(code) if reply is None else reply["failure"])

  def _exchange(self, line: str, timeout: float) -> tuple[dict | None, bool]:
    """Writes a line and reads one: (the reply, whether it was overdue)."""
    process, overdue = self._process, threading.Event()

    def end() -> None:
      overdue.set()
      process.kill()

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
      rest = memoryview(line.encode())
      while rest:
        rest = rest[process.stdin.write(rest) :]
      reply = _line(process)
    except OSError:
      reply = b""
    finally:
      timer.cancel()
      # Past this line it does not kill the process under the next check.
      timer.join()
    return json.loads(reply) if reply else None, overdue.is_set()


def _line(process: Any) -> bytes:
  """The next whole line; b"" if the process ended before."""
  reply = b""
  while not reply.endswith(b"\n"):
    more = process.stdout.read(65536)
    if not more:
      return b""
    reply += more
  return reply


def _ended(code: int | None) -> str:
  return f"its process ended with code {code}"


def _no_start(why: str) -> RuntimeError:
  return RuntimeError(
    f"The processes of math-verify cannot start: {why}. Install "
    "math-verify as the package asks for it, and look at what "
    f"`{sys.executable} -P {math_worker.__file__} 5 []` prints."
  )


_IDLE: collections.deque[_Worker] = collections.deque()


def _hire(count: int) -> list[_Worker]:
  """Takes idle workers first, since they have already started."""
  hired: list[_Worker] = []
  while len(hired) < count:
    try:
      hired.append(_IDLE.pop())
    except IndexError:
      hired.append(_Worker())
  return hired


def _dismiss() -> None:
  while _IDLE:
    _IDLE.pop().end()


atexit.register(_dismiss)
