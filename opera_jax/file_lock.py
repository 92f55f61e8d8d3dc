"""Who works on what, among processes that share a folder and nothing else.

A claim is a lock of the kernel on a file. It ends with the process that holds
it, however that dies, so that nothing need be cleaned up after a kill. The
file says who holds it.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator

_POLL = 0.5  # seconds between two tries
_MOST = 4096  # bytes read of who holds a lock
# Of this process: a fork would keep the locks that its parent holds.
_OPEN: set[int] = set()


@contextlib.contextmanager
def claim(
  path: str | os.PathLike, *, wait: Callable[[], None] | None = None
) -> Iterator[bool]:
  """Holds `path` against other processes while the block runs.

  Args:
    path: file to lock, made if need be, readable by its owner alone, and left
      behind.
    wait: called again and again until the file is free; what it raises ends
      the wait. None does not wait.

  Yields:
    Whether it is held; always, if waited for.

  Raises:
    OSError: the file cannot be made, is no plain file of one name, or the file
      system has no locks.
  """
  handle = _open(path)
  _OPEN.add(handle)
  try:
    held = _lock(path, handle)
    while not held and wait is not None:
      wait()
      time.sleep(_POLL)
      held = _lock(path, handle)
    if held:
      _write(handle, _own_name())
    yield held
    if held and handle in _OPEN:
      _write(handle, b"")
  finally:
    if handle in _OPEN:
      _OPEN.remove(handle)
      os.close(handle)


def holder(path: str | os.PathLike) -> str:
  """Who holds a lock, in words; "another process" where it does not say."""
  handle = _open(path)
  try:
    said = json.loads(os.pread(handle, _MOST, 0))
    return (
      f"process {int(said['pid'])} on {str(said['host'])[:100]!r} since "
      f"{str(said['since'])[:40]}"
    )
  except (ValueError, TypeError, KeyError):
    return "another process"
  finally:
    os.close(handle)


def _open(path: str | os.PathLike) -> int:
  """The file, never another one by way of a link, and never a pipe."""
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
  try:
    handle = os.open(path, flags, 0o600)
  except OSError as error:
    if error.errno == errno.ELOOP:
      raise _odd(path, "a symbolic link") from error
    if error.errno == errno.EISDIR:
      raise _odd(path, "a directory") from error
    if error.errno == errno.EACCES:
      raise OSError(
        f"{path} may not be opened ({error.strerror}); the lock of another "
        "user's run is theirs alone. Name a --workdir of your own."
      ) from error
    raise
  found = os.fstat(handle)
  if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
    os.close(handle)
    raise _odd(path, "no plain file, or has a second name")
  if found.st_mode & 0o077 and found.st_uid == os.geteuid():
    os.fchmod(handle, 0o600)
  return handle


def _odd(path: str | os.PathLike, what: str) -> OSError:
  return OSError(
    f"{path} is {what}; a lock must be a plain file. Somebody else has put it "
    "there: remove it, or name another --workdir."
  )


def _lock(path: str | os.PathLike, handle: int) -> bool:
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    raise OSError(
      f"{path} cannot be locked ({error.strerror}), and without locks two "
      "processes could do the same work. Put --workdir on a file system "
      "that has them."
    ) from error
  return True


def _own_name() -> bytes:
  now = datetime.datetime.now().astimezone()
  return json.dumps(
    {
      "pid": os.getpid(),
      "host": socket.gethostname(),
      "since": now.isoformat(" ", "seconds"),
    }
  ).encode()


def _write(handle: int, text: bytes) -> None:
  """A full disk costs the name of the holder, not the lock."""
  with contextlib.suppress(OSError):
    os.ftruncate(handle, 0)
    os.pwrite(handle, text, 0)


def _let_go() -> None:
  for handle in _OPEN:
    os.close(handle)
  _OPEN.clear()


os.register_at_fork(after_in_child=_let_go)
