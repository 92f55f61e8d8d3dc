"""SHA-256 of what a run reads, by which a later start knows it again.

Of a file that is read whole, the digest is of its bytes, as `sha256sum` gives
it, taken as they are read. Of a data set that comes row by row (a directory,
`hf:`, `tfds:`), it is of its rows in their order. Of a directory (a model, a
tokenizer), it is of the list of its files' names and digests.
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
  """Reads one data source, and knows its digest once it has been read."""

  def __init__(self, read_file: rows.Read):
    """Args: read_file: gives a file's bytes."""
    self._read = read_file
    self._bytes: str | None = None
    self._rows = hashlib.sha256()

  def read(self, path: pathlib.Path) -> bytes:
    """A file's bytes."""
    content = self._read(path)
    self._bytes = hashlib.sha256(content).hexdigest()
    return content

  def row(self, row: Mapping[str, Any]) -> None:
    """Takes note of a row; where the bytes were read, those count."""
    if self._bytes is None:
      text = json.dumps(row, sort_keys=True, default=_plain)
      self._rows.update(text.encode("utf-8", "surrogatepass") + b"\n")

  def hexdigest(self) -> str:
    """Of all that was read."""
    return self._bytes or self._rows.hexdigest()


def file(path: pathlib.Path) -> str:
  """Of a file's bytes, a block at a time."""
  out = hashlib.sha256()
  with open(path, "rb") as opened:
    while block := opened.read(_BLOCK):
      out.update(block)
  return out.hexdigest()


def folder(path: pathlib.Path, names: tuple[str, ...] = ("**/*",)) -> str:
  """Of the files of a directory, each read whole.

  Args:
    path: directory.
    names: patterns of the files that count.
  """
  found = sorted(
    {one for name in names for one in path.glob(name) if one.is_file()}
  )
  listed = [[str(one.relative_to(path)), file(one)] for one in found]
  return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _plain(value: Any) -> str:
  """What JSON lacks; of values whose text says where they lie, the type."""
  known = (bytes, datetime.date, datetime.time, decimal.Decimal)
  return repr(value) if isinstance(value, known) else type(value).__name__
