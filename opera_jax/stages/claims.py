"""Who works on what, among processes that share a folder and nothing else.

A claim is a lock of the kernel on a file. It ends with the process that holds
it, however that dies, so that nothing need be cleaned up after a kill.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator


@contextlib.contextmanager
def claim(path: str | os.PathLike, *, wait: bool = False) -> Iterator[bool]:
  """Holds `path` against other processes while the block runs.

  Args:
    path: file to lock, made if need be and left behind, empty.
    wait: until it is free.

  Yields:
    Whether it is held; always, if waited for.

  Raises:
    OSError: the file cannot be made, or the file system has no locks.
  """
  with open(path, "a") as handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
      held = True
    except BlockingIOError:
      held = False
    except OSError as error:
      raise OSError(
        f"{path} cannot be locked ({error.strerror}), and without locks two "
        "processes could do the same work. Put --workdir on a file system "
        "that has them."
      ) from error
    yield held
