"""The subprocess of a user's function: loads it once, and answers calls.

`rewards.function` starts it as `python -P function_worker.py FD` and talks to
it over a socket: pickled requests in, JSON replies out. It imports nothing of
this package, so that it starts fast and uses no accelerator.
"""

import importlib
import inspect
import json
import numbers
import operator
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct(">Q")  # bytes of the message that follows
SHOWN = 4_000  # characters of a traceback that travel
GRACE = 5  # seconds after the time limit before the system kills the process


class Wrong(ValueError):
  """The function returned an invalid value."""


class Caught:
  """Catches any exception in the block, including SystemExit and
  KeyboardInterrupt."""

  def __init__(self):
    """Nothing was raised yet."""
    self.error: BaseException | None = None

  def __enter__(self) -> "Caught":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> bool:
    self.error = error
    return True


def floats(value: Any) -> list[float]:
  """Converts the result of a reward function to floats.

  Args:
    value: a list, a tuple, or an array of one axis.

  Raises:
    Wrong: it has another type, or an element that is not a number.
  """
  if inspect.iscoroutine(value):
    value.close()
    raise Wrong("a coroutine: it is not awaited, call asyncio.run inside")
  if inspect.isgenerator(value):
    raise Wrong("a generator: make a list of it")
  if not isinstance(value, list | tuple) and hasattr(value, "tolist"):
    value = value.tolist()
  if not isinstance(value, list | tuple):
    raise Wrong(f"{type(value).__name__}: {_short(value)}")
  return [_number(entry, place) for place, entry in enumerate(value)]


def index(value: Any) -> int:
  """Converts the result of a choosing function to an index.

  Raises:
    Wrong: no whole number.
  """
  if isinstance(value, bool) or not hasattr(type(value), "__index__"):
    raise Wrong(f"{type(value).__name__}: {_short(value)}")
  return operator.index(value)


SHAPES: dict[str, Callable[[Any], Any]] = {"floats": floats, "index": index}


def load(path: str) -> Callable[..., Any]:
  """The function at "package.module:function".

  Raises:
    Wrong: it is not callable, or it is asynchronous.
    ImportError: no such module.
    AttributeError: no such name in it.
  """
  module, _, name = path.partition(":")
  found = getattr(importlib.import_module(module), name)
  if not callable(found):
    raise Wrong(f"{type(found).__name__}, which cannot be called")
  for what, is_one in (
    ("a coroutine function", inspect.iscoroutinefunction),
    ("an asynchronous generator", inspect.isasyncgenfunction),
    ("a generator function", inspect.isgeneratorfunction),
  ):
    if is_one(found):
      raise Wrong(f"{what}; it must be a plain function that returns a list")
  return found


def main(sock: socket.socket) -> None:
  """Loads the function that the first message names, then answers calls.

  Args:
    sock: the end of the pair that was handed over; its closing ends this.
  """
  begun = pickle.loads(receive(sock))
  sys.path[:] = begun["sys_path"]
  sys.argv = [""]
  threading.Thread(target=_watch, args=(begun["parent"],), daemon=True).start()
  function = None
  with Caught() as caught:
    function = load(begun["path"])
  _send(sock, _told(caught.error))
  while function is not None:
    body = receive(sock)
    value, caught = None, Caught()
    with caught:
      call = pickle.loads(body)
      _end_after(call["seconds"] + GRACE)
      given = function(*call["args"], **call["keywords"])
      value = SHAPES[call["shape"]](given)
    _end_after(0)
    _send(sock, _told(caught.error) | {"value": value})


def receive(sock: socket.socket) -> bytes:
  """Receives one message; exits if the other side is gone."""
  (size,) = HEADER.unpack(_exactly(sock, HEADER.size))
  return _exactly(sock, size)


def _exactly(sock: socket.socket, size: int) -> bytes:
  parts = []
  while size:
    part = sock.recv(min(size, 1 << 20))
    if not part:
      raise SystemExit(0)
    parts.append(part)
    size -= len(part)
  return b"".join(parts)


def _send(sock: socket.socket, reply: dict[str, Any]) -> None:
  body = json.dumps(reply).encode()
  sock.sendall(HEADER.pack(len(body)) + body)


def _told(error: BaseException | None) -> dict[str, Any]:
  """Describes the error of a call, without the frames of this file."""
  if error is None:
    return {}
  if isinstance(error, Wrong):
    return {"wrong": str(error)}
  trace = error.__traceback__
  lines = traceback.format_exception(
    type(error), error, trace.tb_next if trace else None
  )
  return {
    "raised": type(error).__name__,
    "summary": lines[-1].strip()[:SHOWN] if lines else "",
    "trace": "".join(lines)[-SHOWN:],
    "missing": isinstance(error, ImportError | AttributeError),
  }


def _number(entry: Any, place: int) -> float:
  if isinstance(entry, str | bytes) or not (
    isinstance(entry, numbers.Real) or hasattr(type(entry), "__float__")
  ):
    raise Wrong(f"at place {place} {type(entry).__name__}: {_short(entry)}")
  try:
    return float(entry)
  except OverflowError:
    raise Wrong(f"at place {place} a number beyond any float") from None


def _short(value: Any) -> str:
  return repr(value)[:80]


def _end_after(seconds: float) -> None:
  """Lets the system kill the process after `seconds`; 0 cancels that.

  A function that holds the interpreter sees no signal handler of Python, so
  the default action of the signal is left in force.
  """
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.setitimer(signal.ITIMER_REAL, seconds)


def _watch(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(1)
  os._exit(1)


if __name__ == "__main__":
  # The run decides when it ends. Handlers, unlike SIG_IGN, are not inherited
  # by what the function starts.
  signal.signal(signal.SIGTERM, lambda *_: None)
  signal.signal(signal.SIGINT, lambda *_: None)
  given_fd = int(sys.argv[1])
  os.set_inheritable(given_fd, False)
  main(socket.socket(fileno=given_fd))
