"""Reports the death of another process of the run in one line.

When a host disappears, the JAX runtime of every other host prints a page of C++
output and aborts. Here that output goes to a file in the run's folder, and the
process ends with one line that names the dead process. Python errors are
printed as usual.
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
_TAIL = 64 * 2**10  # bytes read from the end of the runtime's output
_STDERR = 2
_IN_USE: list[Any] = []  # keeps C callbacks alive
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
# "stopped sending heartbeats):\n1\n2\n", or "/job:x/replica:0/task:1".
_SILENT = re.compile(r"heartbeats\):((?:[\s,]+\d+)+)\s*\n")
_TASK = re.compile(r"task[: ](\d+)")
_BROKEN = re.compile(r"Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED")
_SERVICE = re.compile(r"(?i)unavailable|socket closed|failed to connect|"
                      r"connection re|polled an error")  # fmt: skip


def _from_the_runtime(error: BaseException | None) -> bool:
  """Whether the error, or one of its causes, comes from the JAX runtime."""
  while error is not None:
    runtime = isinstance(error, jax.errors.JaxRuntimeError)
    if runtime or _BROKEN.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


class FailureReporter:
  """Redirects this process's C++ standard error, and reports dead processes."""

  def __init__(self, folder: str | os.PathLike):
    """Redirects standard error to a file, except for what Python writes.

    Args:
      folder: of the run, shared by all processes.

    Raises:
      OSError: the file cannot be created.
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
    """Starts reporting; called once all processes have joined.

    Args:
      index: of this process.
      count: of processes.
      seconds: heartbeat timeout of the runtime.
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
      broken = _from_the_runtime(error)
      if broken:
        # The dead process is known only after its heartbeats stop; this process
        # keeps sending its own meanwhile.
        time.sleep(2 * seconds)
      before(kind, error, trace)
      if broken:
        sys.stderr.flush()
        os._exit(
          EXIT_CODE
        )  # skip the shutdown barrier, which would wait for the dead

    sys.excepthook = hook

  def _on_abort(self, number: int) -> None:
    """Signal handler; runs in the thread that aborts the process."""
    os.write(self._screen, (self.line() + "\n").encode())
    os._exit(EXIT_CODE)

  def line(self) -> str:
    """Builds the line that names the dead processes, from the runtime's
    output."""
    with open(self._path, "rb") as file:
      file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
      text = file.read().decode(errors="replace")
    end = (
      f"Run the same command again on every host to resume. The output of the "
      f"runtime is in {self._path}."
    )
    dead = sorted(self._dead(text))
    me = f"Process {self._index} of the run ends"
    if not dead:
      return f"{me}: the runtime aborted it. {end}"
    names = " and ".join(f"process {i} ({self._of(i)})" for i in dead)
    verb = "has" if len(dead) == 1 else "have"
    return f"{me}: {names} {verb} died or cannot be reached. {end}"

  def _dead(self, text: str) -> set[int]:
    silent = _SILENT.findall(text)
    found = {int(n) for group in silent for n in re.findall(r"\d+", group)}
    found = found or {int(n) for n in _TASK.findall(text)}
    found = {i for i in found if i < self._count and i != self._index}
    if not found and self._index and _SERVICE.search(text):
      return {0}  # the process that runs the coordination service
    return found

  def _of(self, index: int) -> str:
    """The host of a process, from the file that it wrote."""
    with contextlib.suppress(OSError):
      path = self._folder / f"{index}.txt"
      with open(path, "rb") as file:
        return file.readline(200).decode(errors="replace").strip()
    return "of unknown host"
