"""Files that appear whole or not at all, and never by way of a link."""

import contextlib
import errno
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def replacing(
  path: str | os.PathLike, mode: str = "w", **how: Any
) -> Iterator[IO[Any]]:
  """A file that takes the name `path` once the block ends well.

  It is written under a name of its own beside `path`, on which nobody can have
  laid a link. What `path` was before, a link too, is replaced, not followed.

  Args:
    path: of the file; its folder exists.
    mode: "w" for text, in UTF-8, or "wb".
    **how: of `open`, such as `errors`.

  Raises:
    OSError: it cannot be written, or `path` is a folder.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
  if "b" not in mode:
    how = {"encoding": "utf-8"} | how
  try:
    with open(partial, mode.replace("w", "x"), **how) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise OSError(
      f"{path} cannot be written ({error.strerror}). What was saved before is "
      "whole: make room, and run the same command again."
    ) from error
  finally:
    partial.unlink(missing_ok=True)


def write(path: str | os.PathLike, text: str, **how: Any) -> None:
  """Writes a text file, see `replacing`."""
  with replacing(path, **how) as file:
    file.write(text)
