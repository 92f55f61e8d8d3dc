"""SHA-256 digests of a run's inputs, so that a later start detects changes.

For a file, the digest covers its bytes, as `sha256sum` computes it, while they
are read. For a data set that is read row by row (a directory, `hf:`, `tfds:`),
it covers the rows in order. For a directory (a model, a tokenizer), it covers
the list of file names and digests.
"""

import datetime
import decimal
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from opera_jax.data import rows

_BLOCK = 1 << 20  # bytes in memory at a time


class Source:
  """Reads one data source and computes its digest."""

  def __init__(self, read_file: rows.Read):
    """Args: read_file: returns a file's bytes."""
    self._read = read_file
    self._bytes: str | None = None
    self._rows = hashlib.sha256()

  def read(self, path: pathlib.Path) -> bytes:
    """A file's bytes."""
    content = self._read(path)
    self._bytes = hashlib.sha256(content).hexdigest()
    return content

  def row(self, row: Mapping[str, Any]) -> None:
    """Adds a row to the digest, unless the digest covers the file's bytes."""
    if self._bytes is None:
      text = json.dumps(row, sort_keys=True, default=_plain)
      self._rows.update(text.encode("utf-8", "surrogatepass") + b"\n")

  def hexdigest(self) -> str:
    """The digest of everything read so far."""
    return self._bytes or self._rows.hexdigest()


def file(path: pathlib.Path) -> str:
  """The digest of a file, read in blocks."""
  out = hashlib.sha256()
  with open(path, "rb") as opened:
    while block := opened.read(_BLOCK):
      out.update(block)
  return out.hexdigest()


def folder(path: pathlib.Path, names: tuple[str, ...] = ("**/*",)) -> str:
  """The digest of the files in a directory.

  Args:
    path: directory.
    names: glob patterns of the files to include.
  """
  found = sorted(
    {one for name in names for one in path.glob(name) if one.is_file()}
  )
  listed = [[str(one.relative_to(path)), file(one)] for one in found]
  return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _plain(value: Any) -> str:
  """Text of values that JSON lacks; the type name if the repr contains an
  address."""
  known = (bytes, datetime.date, datetime.time, decimal.Decimal)
  return repr(value) if isinstance(value, known) else type(value).__name__
