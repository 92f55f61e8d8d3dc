"""Caches compiled automaton tables on disk.

A table is found by a hash of everything that it is compiled from.
"""

import hashlib
import os
import pathlib
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from opera_jax import atomic_file

_FORMAT = b"automaton 2"
# The exceptions that reading a damaged file can raise.
DAMAGE = (
  EOFError,
  NotImplementedError,
  OSError,
  RuntimeError,
  ValueError,
  zipfile.BadZipFile,
  zlib.error,
)
_TABLES = ("token_class", "next_state", "event", "end_event")


def cached(
  build: Callable[[], dict[str, np.ndarray]],
  *,
  cache_dir: str | os.PathLike | None,
  key: Sequence,
  vocab_bytes: Sequence[bytes | None],
) -> dict[str, np.ndarray]:
  """Returns cached tables, or builds and caches them.

  A cache file that cannot be read is rebuilt with a warning.

  Args:
    build: builds the tables.
    cache_dir: folder of the cache; None does not cache.
    key: everything that `build` depends on besides the vocabulary.
    vocab_bytes: [V] bytes of each token.
  """
  if cache_dir is None:
    return build()
  digest = hashlib.sha256(_FORMAT + repr(list(key)).encode())
  digest.update(repr(list(vocab_bytes)).encode())
  path = pathlib.Path(cache_dir) / f"automaton-{digest.hexdigest()[:32]}.npz"
  if os.path.lexists(path):
    try:
      return _read(path)
    except DAMAGE as error:
      warnings.warn(
        f"{path} cannot be read ({error}); it is rebuilt.", stacklevel=3
      )
  tables = build()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file.replacing(path, "wb") as file:
      np.savez_compressed(file, allow_pickle=False, **tables)
  except OSError as error:
    warnings.warn(
      f"{path} cannot be written ({error}); it is rebuilt at every start.",
      stacklevel=3,
    )
  return tables


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the tables of a cache file.

  Raises:
    ValueError: the path is not a plain file, or it holds something else. A
      damaged file raises any of `DAMAGE`.
  """
  if path.is_symlink() or not path.is_file():
    raise ValueError("it is no plain file")
  with np.load(path, allow_pickle=False) as stored:
    tables = dict(stored)
  if set(tables) != set(_TABLES) or any(
    table.dtype.kind not in "iu" for table in tables.values()
  ):
    raise ValueError(f"it holds {sorted(tables)} and not {sorted(_TABLES)}")
  return tables
