"""Turns a byte automaton into one over the tokens of a vocabulary.

Shape key: S states, C columns, V tokens of the vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np


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
