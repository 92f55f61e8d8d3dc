"""Strings to a deterministic automaton over bytes (Aho-Corasick).

A state is what the past means for the future: which strings are partly
spelled and how far, whether the last byte was a word character, how much of
the separator stands. States are found by walking every byte from the start,
so the automaton holds only those that can occur.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

WORD = frozenset(
  b"0123456789_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
)
SPACE = frozenset(b" \t\n\r\x0b\x0c")

# Stands for a token without bytes (a special token, an unused id). It occurs
# in no UTF-8, so no string holds it; it is content, and no word character.
SPECIAL = 0xFF


@dataclasses.dataclass(frozen=True)
class ByteMachine:
  """Tables over [S states, 256 bytes]; state 0 is the start.

  Attributes:
    next_state: [S, 256] int32.
    found: [S, 256] int32, 1 + index of the string that this byte completes
      (or confirms, where a right boundary is asked for); 0 for none.
    separates: [S, 256] bool, this byte completes the separator. A string
      found at the same byte lies before the separator.
    found_at_end: [S] int32, as `found`, where the text ends here.
  """

  next_state: np.ndarray
  found: np.ndarray
  separates: np.ndarray
  found_at_end: np.ndarray


@dataclasses.dataclass(frozen=True)
class _State:
  spelled: frozenset[tuple[int, int]]  # (string, bytes of it that stand)
  after_word: bool  # only kept where a left boundary is asked for
  separator: int  # bytes of the separator that stand


def build(
  strings: Sequence[bytes],
  left_boundary: bool,
  right_boundary: bool,
  ignore_case: bool,
  separator: bytes | None = None,
) -> ByteMachine:
  """Builds the automaton that finds `strings`.

  A boundary means: no word character [A-Za-z0-9_] next to the string on that
  side. A match with a right boundary is known one byte later. After the
  separator the search starts anew. Of strings found at one byte the longest
  counts, then the first.

  Args:
    strings: what to find, not empty, distinct.
    left_boundary: ask for a boundary on the left.
    right_boundary: ask for a boundary on the right.
    ignore_case: fold the ASCII letters.
    separator: bytes that cut the text, found left to right, not overlapping.

  Returns:
    The tables.
  """
  if ignore_case:
    strings = [string.lower() for string in strings]
  restarts = None if separator is None else _restarts(separator)

  def best(indices: list[int]) -> int:
    if not indices:
      return 0
    return 1 + min(indices, key=lambda i: (-len(strings[i]), i))

  def advance(state: _State, byte: int) -> tuple[_State, int, bool]:
    folded = byte + 32 if ignore_case and 65 <= byte <= 90 else byte
    is_word = byte in WORD
    spelled, found = set(), []
    for index, size in state.spelled:
      if size == len(strings[index]):
        if not is_word:
          found.append(index)
      elif strings[index][size] == folded:
        spelled.add((index, size + 1))
    if not state.after_word:
      spelled.update(
        (i, 1) for i, string in enumerate(strings) if string[0] == folded
      )
    if not right_boundary:
      whole = [(i, size) for i, size in spelled if size == len(strings[i])]
      found += [i for i, _ in whole]
      spelled.difference_update(whole)
    stands = 0
    if separator is not None and restarts is not None:
      stands = restarts[state.separator][byte]
      if stands == len(separator):
        return _State(frozenset(), False, 0), best(found), True
    after_word = is_word and left_boundary
    return _State(frozenset(spelled), after_word, stands), best(found), False

  start = _State(frozenset(), False, 0)
  number = {start: 0}
  states, rows = [start], []
  for state in states:
    row = []
    for byte in range(256):
      target, found, separates = advance(state, byte)
      if target not in number:
        number[target] = len(states)
        states.append(target)
      row.append((number[target], found, separates))
    rows.append(row)
  table = np.asarray(rows, np.int32)
  at_end = [
    best([i for i, size in state.spelled if size == len(strings[i])])
    for state in states
  ]
  return ByteMachine(
    next_state=table[:, :, 0],
    found=table[:, :, 1],
    separates=table[:, :, 2].astype(bool),
    found_at_end=np.asarray(at_end, np.int32),
  )


def _restarts(separator: bytes) -> list[list[int]]:
  """[bytes that stand][next byte] -> bytes that stand (Knuth-Morris-Pratt)."""
  table = []
  for size in range(len(separator)):
    row = []
    for byte in range(256):
      text = separator[:size] + bytes([byte])
      keep = min(len(text), len(separator))
      while not text.endswith(separator[:keep]):
        keep -= 1
      row.append(keep)
    table.append(row)
  return table
