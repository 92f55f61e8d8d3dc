"""What a process of several says when another one has died: one line.

The runtime of a host writes a page of C++ and aborts the process when another
host is gone. Here that page goes to a file of the run's folder, and the
process ends with a line that names who it was. Python's own errors are shown
as ever.
"""

import contextlib
import ctypes
import datetime
import os
import pathlib
import re
import secrets
import signal
import socket
import sys
import time
import types
from typing import Any

import jax

FOLDER = "runtime"  # in the run's folder
EXIT_CODE = 1
_TAIL = 64 * 2**10  # bytes read of what the runtime wrote
_STDERR = 2
_IN_USE: list[Any] = []  # what C calls must outlive whoever made it
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
# "stopped sending heartbeats):\n1\n2\n", or "/job:x/replica:0/task:1".
_SILENT = re.compile(r"heartbeats\):((?:[\s,]+\d+)+)\s*\n")
_TASK = re.compile(r"task[: ](\d+)")
_BROKEN = re.compile(r"Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED")
_SERVICE = re.compile(r"(?i)unavailable|socket closed|failed to connect|"
                      r"connection re|polled an error")  # fmt: skip


def _of_the_network(error: BaseException | None) -> bool:
  """Whether the runtime raised it, or what it came from, and not we."""
  while error is not None:
    runtime = isinstance(error, jax.errors.JaxRuntimeError)
    if runtime or _BROKEN.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


class FailureReporter:
  """Of this process: takes over standard error as C++ sees it."""

  def __init__(self, folder: str | os.PathLike):
    """Sends what is written to standard error, but not by Python, to a file.

    Args:
      folder: of the run, which all processes see.

    Raises:
      OSError: the file cannot be made.
    """
    self._folder = pathlib.Path(folder) / FOLDER
    self._folder.mkdir(parents=True, exist_ok=True)
    self._path = self._folder / f"starting-{secrets.token_hex(8)}.txt"
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    self._name = f"host {socket.gethostname()}, pid {os.getpid()}, since {now}"
    sys.stderr.flush()
    self._screen = os.dup(_STDERR)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
    file = os.open(self._path, flags, 0o600)
    os.write(file, (self._name + "\n").encode())
    os.dup2(file, _STDERR)
    os.close(file)
    sys.stderr = os.fdopen(
      self._screen, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    self._index, self._count = 0, 1

  def ready(self, *, index: int, count: int, seconds: float) -> None:
    """All processes are there: from now on a death is explained.

    Args:
      index: of this process.
      count: of processes.
      seconds: after which the runtime gives up a silent process.
    """
    self._index, self._count = index, count
    named = self._folder / f"{index}.txt"
    self._path.replace(named)
    self._path = named
    handler = _HANDLER(self._on_abort)
    _IN_USE.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = (ctypes.c_int, _HANDLER)
    libc.signal(signal.SIGABRT, handler)
    before = sys.excepthook

    def hook(
      kind: type[BaseException],
      error: BaseException,
      trace: types.TracebackType | None,
    ) -> None:
      broken = _of_the_network(error)
      if broken:
        # Who died is known once its signs of life stop; this process goes on
        # giving its own meanwhile, for it is well.
        time.sleep(2 * seconds)
      before(kind, error, trace)
      if broken:
        sys.stderr.flush()
        os._exit(EXIT_CODE)  # no farewell to processes that are gone

    sys.excepthook = hook

  def _on_abort(self, number: int) -> None:
    """Called by the thread that aborts the process."""
    os.write(self._screen, (self.line() + "\n").encode())
    os._exit(EXIT_CODE)

  def line(self) -> str:
    """Who has died, as far as the runtime has said."""
    with open(self._path, "rb") as file:
      file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
      text = file.read().decode(errors="replace")
    end = (
      f"Give the same command again on every host, and the run goes on. What "
      f"the runtime wrote is in {self._path}."
    )
    dead = sorted(self._dead(text))
    me = f"Process {self._index} of the run ends"
    if not dead:
      return f"{me}: the runtime aborted it. {end}"
    names = " and ".join(f"process {i} ({self._of(i)})" for i in dead)
    verb = "has" if len(dead) == 1 else "have"
    return f"{me}, for {names} {verb} died or cannot be reached. {end}"

  def _dead(self, text: str) -> set[int]:
    silent = _SILENT.findall(text)
    found = {int(n) for group in silent for n in re.findall(r"\d+", group)}
    found = found or {int(n) for n in _TASK.findall(text)}
    found = {i for i in found if i < self._count and i != self._index}
    if not found and self._index and _SERVICE.search(text):
      return {0}  # where the service runs that all report to
    return found

  def _of(self, index: int) -> str:
    """The host of a process, by the file that it has left."""
    with contextlib.suppress(OSError):
      path = self._folder / f"{index}.txt"
      with open(path, "rb") as file:
        return file.readline(200).decode(errors="replace").strip()
    return "of unknown host"
