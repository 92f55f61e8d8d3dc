"""Which exceptions are messages to the user, and which are bugs.

A command prints a message alone, without a traceback: it names the value, the
rule and the remedy, and the line of code that noticed says nothing more. A bug
keeps its traceback, since nothing else says where it is.

A message is what a `raise` of ours or of a user's own file says, or what the
system says of a file. The same types raised anywhere else (a library that
refuses its arguments, an operator that fails) are bugs.
"""

import difflib
import dis
import pathlib
import subprocess
import sysconfig
from collections.abc import Collection
from typing import Any

_OURS = pathlib.Path(__file__).resolve().parent
_LIBRARIES = tuple(
  pathlib.Path(sysconfig.get_path(name)).resolve()
  for name in ("stdlib", "purelib", "platlib")
)
# Types of our messages. TypeError, KeyError and the like are always bugs.
_TYPES = (
  ValueError,
  OSError,
  RuntimeError,
  ImportError,
  FloatingPointError,
  subprocess.SubprocessError,
)


class ConfigFileError(Exception):
  """A bug in a config file; its cause says where."""


def is_message(error: BaseException) -> bool:
  """Whether an exception's text is all that a user needs.

  Args:
    error: as it was caught, with its traceback.
  """
  # What the system says of a file has a number; its text names the file.
  if isinstance(error, OSError) and error.errno is not None:
    return True
  return isinstance(error, _TYPES) and _raised_by_us(error)


def nearest(name: Any, names: Collection[str]) -> str:
  """A hint `; did you mean 'NAME'?`, or "" if no other name is similar."""
  # A link that leads nowhere stands in its folder under the name given.
  others = [other for other in names if other != str(name)]
  found = difflib.get_close_matches(str(name), others, n=1, cutoff=0.5)
  return f"; did you mean {found[0]!r}?" if found else ""


def _raised_by_us(error: BaseException) -> bool:
  """Whether the exception comes from a `raise` outside the libraries.

  The last frame alone is not enough: an operator that fails in C has our frame
  as its last one too.
  """
  trace = error.__traceback__
  if trace is None:
    return False
  while trace.tb_next is not None:
    trace = trace.tb_next
  code = trace.tb_frame.f_code
  if code.co_code[trace.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
    return False
  if code.co_filename.startswith("<"):
    return False
  file = pathlib.Path(code.co_filename).resolve()
  if file.is_relative_to(_OURS):
    return True
  return not any(file.is_relative_to(folder) for folder in _LIBRARIES)
