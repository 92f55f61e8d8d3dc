"""Builds an automaton over bytes that finds strings (Aho-Corasick).

A state holds the partial matches of all strings, whether the last byte was a
word character, and the partial match of the separator. States are enumerated
breadth-first from the initial state, so that only reachable states exist.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

WORD = frozenset(
  b"0123456789_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
)
SPACE = frozenset(b" \t\n\r\x0b\x0c")

# Represents a token without bytes (a special token, an unused id). The byte
# does not occur in UTF-8, so it is part of no string. It is neither white space
# nor a word character.
SPECIAL = 0xFF


@dataclasses.dataclass(frozen=True)
class ByteMachine:
  """Tables over [S states, 256 bytes]; state 0 is the initial state.

  Attributes:
    next_state: [S, 256] int32.
    found: [S, 256] int32, 1 + index of the string that this byte completes
      (with a right boundary: confirms); 0 for none.
    separates: [S, 256] bool, this byte completes the separator. A string
      found at the same byte is before the separator.
    found_at_end: [S] int32, like `found`, if the text ends in this state.
  """

  next_state: np.ndarray
  found: np.ndarray
  separates: np.ndarray
  found_at_end: np.ndarray


@dataclasses.dataclass(frozen=True)
class _State:
  partial: frozenset[tuple[int, int]]  # (string, bytes of it that matched)
  after_word: bool  # the last byte is a word character; for left boundaries
  separator: int  # bytes of the separator that matched


def build(
  strings: Sequence[bytes],
  *,
  left_boundary: bool,
  right_boundary: Sequence[bool],
  ignore_case: bool,
  separator: bytes | None = None,
) -> ByteMachine:
  """Builds the automaton that finds `strings`.

  A boundary means that no word character [A-Za-z0-9_] is next to the string on
  that side. A match with a right boundary is known one byte later. The search
  restarts after a separator. Of several strings found at one byte, the longest
  is reported, of equally long ones the first.

  Args:
    strings: what to find, not empty, distinct.
    left_boundary: require a boundary on the left.
    right_boundary: for each string, require a boundary on the right.
    ignore_case: ignore the case of ASCII letters.
    separator: bytes that separate the text, found left to right without
      overlap; None for no separator.
  """
  if ignore_case:
    strings = [string.lower() for string in strings]
  restarts = None if separator is None else match_table(separator)

  def best(indices: list[int]) -> int:
    if not indices:
      return 0
    return 1 + min(indices, key=lambda i: (-len(strings[i]), i))

  def step(state: _State, byte: int) -> tuple[_State, int, bool]:
    folded = byte + 32 if ignore_case and 65 <= byte <= 90 else byte
    is_word = byte in WORD
    partial, found = set(), []
    for index, size in state.partial:
      if size == len(strings[index]):
        if not is_word:
          found.append(index)
      elif strings[index][size] == folded:
        partial.add((index, size + 1))
    if not state.after_word:
      partial.update(
        (i, 1) for i, string in enumerate(strings) if string[0] == folded
      )
    complete = [
      (i, size)
      for i, size in partial
      if size == len(strings[i]) and not right_boundary[i]
    ]
    found += [i for i, _ in complete]
    partial.difference_update(complete)
    matched = 0  # bytes of the separator
    if separator is not None and restarts is not None:
      matched = restarts[state.separator][byte]
      if matched == len(separator):
        return _State(frozenset(), False, 0), best(found), True
    after_word = is_word and left_boundary
    return _State(frozenset(partial), after_word, matched), best(found), False

  start = _State(frozenset(), False, 0)
  number = {start: 0}
  states, rows = [start], []
  for state in states:
    row = []
    for byte in range(256):
      target, found, separates = step(state, byte)
      if target not in number:
        number[target] = len(states)
        states.append(target)
      row.append((number[target], found, separates))
    rows.append(row)
  table = np.asarray(rows, np.int32)
  at_end = [
    best([i for i, size in state.partial if size == len(strings[i])])
    for state in states
  ]
  return ByteMachine(
    next_state=table[:, :, 0],
    found=table[:, :, 1],
    separates=table[:, :, 2].astype(bool),
    found_at_end=np.asarray(at_end, np.int32),
  )


def match_table(separator: bytes) -> list[list[int]]:
  """Knuth-Morris-Pratt: [bytes matched][next byte] -> bytes matched."""
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
