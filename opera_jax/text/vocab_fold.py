"""A byte automaton folded over a vocabulary, and the store of such tables.

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
# What reading a damaged file raises.
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
  act: Callable[[np.ndarray, np.ndarray], None],
) -> tuple[np.ndarray, np.ndarray]:
  """Runs every token from every state, byte column by byte column.

  Args:
    table_SB: [S, 256] next state.
    tokens: the bytes of each token.
    act: called as act(flat, code) with flat [S, n] = state * 256 + byte, and
      code [S, n] int32 to change in place, a view on the n longest tokens.

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
    act(flat, code[:, :active])
    state[:, :active] = flat_table[flat]
  back = np.argsort(np.asarray(order, np.int64))
  return state[:, back], code[:, back]


def distinct_tokens(
  table_SX: np.ndarray, vocab_bytes: Sequence[bytes | None]
) -> tuple[list[bytes], np.ndarray]:
  """Tokens up to bytes that act alike, and which of them each token is.

  Args:
    table_SX: [S, 256, k] all that the automaton knows of a byte.
    vocab_bytes: [V] bytes of each token.

  Returns:
    (distinct tokens, index [V + 1] into them, -1 where special).
  """
  rows = table_SX.transpose(1, 0, 2).reshape(256, -1)
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
  return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def compress(
  next_state: np.ndarray,
  code: np.ndarray,
  index: np.ndarray,
  end_event: np.ndarray,
) -> dict[str, np.ndarray]:
  """Keeps one column of each kind."""
  columns = np.ascontiguousarray(np.concatenate([next_state, code]).T)
  seen: dict[bytes, int] = {}
  kind = np.asarray(
    [seen.setdefault(row.tobytes(), len(seen)) for row in columns]
  )
  _, first = np.unique(kind, return_index=True)
  return {
    "token_class": _smallest(kind[index]),
    "next_state": _smallest(next_state[:, first]),
    "event": _smallest(code[:, first]),
    "end_event": _smallest(np.asarray(end_event)),
  }


def cached(
  build: Callable[[], dict[str, np.ndarray]],
  cache_dir: str | os.PathLike | None,
  key: Sequence,
  vocab_bytes: Sequence[bytes | None],
) -> dict[str, np.ndarray]:
  """Builds, or reads what was built from the same strings and vocabulary."""
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
        f"{path} cannot be read ({error}); built anew.", stacklevel=3
      )
  tables = build()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file.replacing(path, "wb") as file:
      np.savez_compressed(file, allow_pickle=False, **tables)
  except OSError as error:
    warnings.warn(
      f"{path} cannot be written ({error}); it is built at every start.",
      stacklevel=3,
    )
  return tables


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tables of a file.

  Raises:
    ValueError: it is no plain file, or holds something else; and whatever
      numpy raises of a damaged file.
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
