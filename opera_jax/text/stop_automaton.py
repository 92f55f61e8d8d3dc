"""Stop strings, found across token boundaries: compiled to an automaton for the
decode loop, and searched in plain Python on the host.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from opera_jax.text import automaton, byte_machine, table_cache, vocab_fold


@dataclasses.dataclass(frozen=True)
class Match:
  """Where a string was found in a list of tokens; offsets are in bytes."""

  string: int  # index of the string that was found
  first_token: int  # index of the token that holds the match's first byte
  token_after: int  # index of the first token wholly behind the match
  skip: int  # bytes of tokens[first_token] before the match
  rest: int  # bytes of tokens[token_after - 1] behind the match
  start: int  # begin of the match in the concatenated bytes
  stop: int  # end of the match


def find_first(
  tokens: Iterable[int],
  vocab_bytes: Sequence[bytes | None],
  strings: Sequence[str],
  right_boundary: bool | Sequence[bool] = False,
  ignore_case: bool = False,
  left_boundary: bool = False,
) -> Match | None:
  """Finds the first stop string in tokens, on the host.

  It finds the same match as the automaton of `compile`. The text before the
  match is `tokens[:first_token]` and `skip` bytes of the next token. The first
  match is the one that ends first; of matches that end together, the longest.
  The end of `tokens` is a right boundary. A token without bytes counts as one
  byte that is part of no string.

  Args:
    tokens: token ids.
    vocab_bytes: [V] bytes of each token, None for special tokens.
    strings: the stop strings, distinct, not empty.
    right_boundary: no word character [A-Za-z0-9_] may follow the string; of
      all strings, or one value for each.
    ignore_case: ignore the case of ASCII letters.
    left_boundary: no word character may precede the string.

  Returns:
    The match, or None.

  Raises:
    ValueError: no string, an empty one, or a repeated one.
  """
  encoded = _encode(strings, ignore_case)
  bounded = _per_string(right_boundary, len(encoded))
  text, ends = automaton.spell(tokens, vocab_bytes)
  found = []
  for index, string in enumerate(encoded):
    pattern = re.escape(string)
    if left_boundary:
      pattern = rb"(?<![A-Za-z0-9_])" + pattern
    if bounded[index]:
      pattern += rb"(?![A-Za-z0-9_])"
    hit = re.search(pattern, text, re.IGNORECASE if ignore_case else 0)
    if hit:
      found.append((hit.end(), hit.start(), index))
  if not found:
    return None
  stop, start, index = min(found)
  first = int(np.searchsorted(ends, start, side="right"))
  last = int(np.searchsorted(ends, stop, side="left"))
  return Match(
    string=index,
    first_token=first,
    token_after=last + 1,
    skip=start - (int(ends[first - 1]) if first else 0),
    rest=int(ends[last]) - stop,
    start=start,
    stop=stop,
  )


def compile(
  strings: Sequence[str],
  vocab_bytes: Sequence[bytes | None],
  right_boundary: bool | Sequence[bool] = False,
  ignore_case: bool = False,
  left_boundary: bool = False,
  cache_dir: str | os.PathLike | None = None,
) -> automaton.Automaton:
  """Compiles the automaton that finds stop strings in the decode loop.

  The event of a token is 1 + index of the stop string that ends first in it (of
  those that end together, the longest), or 0. With a right boundary, a match is
  only known at the next byte, at a special token, or at the end of the text
  (`end_event`).

  Args:
    strings: the stop strings, distinct, not empty.
    vocab_bytes: [V] bytes of each token, None for special tokens.
    right_boundary: no word character [A-Za-z0-9_] may follow the string; of
      all strings, or one value for each.
    ignore_case: ignore the case of ASCII letters.
    left_boundary: no word character may precede the string.
    cache_dir: folder where compiled tables are cached; None does not cache.

  Raises:
    ValueError: no string, an empty one, a repeated one, or one that no sequence
      of tokens can produce.
  """
  encoded = _encode(strings, ignore_case)
  bounded = _per_string(right_boundary, len(encoded))

  def build() -> dict[str, np.ndarray]:
    machine = byte_machine.build(
      encoded,
      left_boundary=left_boundary,
      right_boundary=bounded,
      ignore_case=ignore_case,
    )
    return _tables(machine, vocab_bytes)

  key = ["stops", *encoded, left_boundary, *bounded, ignore_case]
  tables = table_cache.cached(
    build, cache_dir=cache_dir, key=key, vocab_bytes=vocab_bytes
  )
  reachable = _reachable_events(tables)
  for index, string in enumerate(strings):
    if index + 1 not in reachable:
      raise ValueError(
        f"No sequence of tokens ends in the stop string {string!r}: the"
        " vocabulary cannot spell it, or another stop string always comes"
        " first. Drop it, or use a byte-level vocabulary."
      )
  return automaton.Automaton(**tables)


def _per_string(value: bool | Sequence[bool], count: int) -> list[bool]:
  """One value for each string."""
  return [value] * count if isinstance(value, bool) else list(value)


def _encode(strings: Sequence[str], ignore_case: bool) -> list[bytes]:
  """Encodes and checks stop strings."""
  encoded = [string.encode() for string in strings]
  if ignore_case:
    encoded = [string.lower() for string in encoded]
  if not encoded or not all(encoded) or len(set(encoded)) < len(encoded):
    raise ValueError(
      f"Stop strings are {list(strings)}; there must be at least one, none"
      " empty, none twice."
    )
  return encoded


def _tables(
  machine: byte_machine.ByteMachine, vocab_bytes: Sequence[bytes | None]
) -> dict[str, np.ndarray]:
  """Folds the byte automaton over the vocabulary."""
  flat_found = machine.found.reshape(-1)

  def record(flat: np.ndarray, code: np.ndarray) -> None:
    np.copyto(code, flat_found[flat], where=code == 0)

  per_byte = np.stack([machine.next_state, machine.found], -1)
  tokens, index = vocab_fold.distinct_tokens(per_byte, vocab_bytes)
  special = bytes([byte_machine.SPECIAL])
  next_state, code = vocab_fold.fold(
    machine.next_state, [*tokens, special], record
  )
  index = np.where(index < 0, len(tokens), index)
  return vocab_fold.compress(
    next_state, code, index=index, end_event=machine.found_at_end
  )


def _reachable_events(tables: dict[str, np.ndarray]) -> set[int]:
  """Event codes of all states that some sequence of tokens reaches."""
  used = np.unique(tables["token_class"])
  next_state, event = tables["next_state"][:, used], tables["event"][:, used]
  reached, frontier = {0}, [0]
  for state in frontier:
    new = set(next_state[state].tolist()) - reached
    reached |= new
    frontier += sorted(new)
  states = sorted(reached)
  return set(np.unique(event[states]).tolist()) | set(
    tables["end_event"][states].tolist()
  )
