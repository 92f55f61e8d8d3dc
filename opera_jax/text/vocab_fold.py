"""Turns a byte automaton into one over tokens, and caches the tables on disk.

Shape key: S states, C columns, V tokens of the vocabulary.
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

_FORMAT = b"automaton 1"
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


def fold(
  table_SB: np.ndarray,
  tokens: Sequence[bytes],
  record: Callable[[np.ndarray, np.ndarray], None],
) -> tuple[np.ndarray, np.ndarray]:
  """Runs the bytes of every token from every state.

  All tokens are processed together: first their first bytes, then their second
  bytes, and so on.

  Args:
    table_SB: [S, 256] next state.
    tokens: the bytes of each token.
    record: called as record(flat, code) before each transition. `flat` [S, n]
      is state * 256 + byte; `code` [S, n] int32 is updated in place. It is a
      view of the n tokens that have such a byte.

  Returns:
    (next_state [S, tokens], code [S, tokens]), int32.
  """
  states = table_SB.shape[0]
  order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
  lengths = np.asarray([len(tokens[i]) for i in order], np.int64)
  state = np.repeat(np.arange(states, dtype=np.int32)[:, None], len(tokens), 1)
  code = np.zeros_like(state)
  flat_table = np.ascontiguousarray(table_SB, np.int32).reshape(-1)
  for column in range(lengths[0] if len(tokens) else 0):
    active = int(np.count_nonzero(lengths > column))
    byte = np.asarray([tokens[i][column] for i in order[:active]], np.int32)
    flat = state[:, :active] * 256 + byte
    record(flat, code[:, :active])
    state[:, :active] = flat_table[flat]
  inverse = np.argsort(np.asarray(order, np.int64))
  return state[:, inverse], code[:, inverse]


def distinct_tokens(
  table_SBK: np.ndarray, vocab_bytes: Sequence[bytes | None]
) -> tuple[list[bytes], np.ndarray]:
  """Replaces bytes by a representative of equal behaviour; merges equal tokens.

  Args:
    table_SBK: [S, 256, k] everything that the automaton does at a byte.
    vocab_bytes: [V] bytes of each token, None for special tokens.

  Returns:
    The distinct tokens, and the index [V + 1] into them of each token; -1 for
    special tokens and, last, for ids outside the vocabulary.
  """
  rows = table_SBK.transpose(1, 0, 2).reshape(256, -1)
  _, first, group = np.unique(
    rows, axis=0, return_index=True, return_inverse=True
  )
  translate = first[group.reshape(-1)].astype(np.uint8).tobytes()
  seen: dict[bytes, int] = {}
  index = [
    -1
    if token is None
    else seen.setdefault(token.translate(translate), len(seen))
    for token in vocab_bytes
  ]
  return list(seen), np.asarray([*index, -1])


def _smallest(array: np.ndarray) -> np.ndarray:
  """Casts to the smallest unsigned integer type that holds all values."""
  return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def compress(
  next_state: np.ndarray,
  code: np.ndarray,
  *,
  index: np.ndarray,
  end_event: np.ndarray,
) -> dict[str, np.ndarray]:
  """Keeps one column of each distinct behaviour.

  Args:
    next_state: [S, n] of n token kinds.
    code: [S, n] event codes.
    index: [V + 1] kind of each token.
    end_event: [S] event codes at the end of the text.

  Returns:
    The arrays of an `automaton.Automaton` by name.
  """
  columns = np.ascontiguousarray(np.concatenate([next_state, code]).T)
  seen: dict[bytes, int] = {}
  column_of = np.asarray(
    [seen.setdefault(column.tobytes(), len(seen)) for column in columns]
  )
  _, first = np.unique(column_of, return_index=True)
  return {
    "token_class": _smallest(column_of[index]),
    "next_state": _smallest(next_state[:, first]),
    "event": _smallest(code[:, first]),
    "end_event": _smallest(np.asarray(end_event)),
  }


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
