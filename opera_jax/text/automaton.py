"""Strings matched exactly on tokens, on the device, one int of state a row.

The byte automaton of `byte_machine` is folded over the vocabulary: for every
state and token, where the token's bytes lead and what happens on the way.
Most tokens act alike, so the table has one column for each distinct way to
act, and `token_class` names the column of a token: Qwen's 151,669 tokens make
a few hundred columns.

Shape key: R rows, T tokens, S states, C columns, V tokens of the vocabulary.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opera_jax.text import byte_machine, vocab_fold

# Event bits of a thought automaton. A token falls into a head (up to its first
# separator), whole steps between separators, and a tail (after its last one).
OPEN = 1  # the token is the first <think>
CLOSE = 2  # the token is the </think> that ends the thought
HEAD_CONTENT = 4  # a byte in the head that is not white space
HEAD_KEYWORD = 8  # a keyword is confirmed in the head
SEPARATOR = 16  # the token completes a separator
TAIL_CONTENT = 32
TAIL_KEYWORD = 64
MIDDLE_SHIFT = 7  # above: 0, or a 1 and then a keyword bit for each whole step
MAX_MIDDLE = 16


Table = jax.Array | np.ndarray


@struct.dataclass
class Automaton:
  """Tables over tokens, in numpy as built; state 0 is the start."""

  token_class: (
    jax.Array | np.ndarray
  )  # [V + 1] uint16 or int32; the last: ids beyond V
  next_state: (
    jax.Array | np.ndarray
  )  # [S, C] smallest unsigned int that holds S
  event: (
    jax.Array | np.ndarray
  )  # [S, C] smallest unsigned int that holds the codes
  end_event: (
    jax.Array | np.ndarray
  )  # [S] as event, where the text ends in this state


def step(
  automaton: Automaton, state: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """One token for each row.

  Args:
    automaton: the tables.
    state: [...] int32, zeros before the first token.
    token: [...] int, the same shape; an id outside the vocabulary counts as a
      special token.

  Returns:
    (state [...] int32, event [...] int32) after the token.
  """
  last = automaton.token_class.shape[0] - 1
  known = (token >= 0) & (token < last)
  column = jnp.asarray(automaton.token_class)[jnp.where(known, token, last)]
  next_state = jnp.asarray(automaton.next_state)[state, column]
  event = jnp.asarray(automaton.event)[state, column]
  return next_state.astype(jnp.int32), event.astype(jnp.int32)


@jax.jit
def run(
  automaton: Automaton, tokens_RT: jax.Array, length_R: jax.Array
) -> jax.Array:
  """Event codes of whole rows.

  Args:
    automaton: the tables.
    tokens_RT: [R, T] int, right-padded.
    length_R: [R] int, tokens of each row that are real.

  Returns:
    [R, T] int32, zero in the padding.
  """

  def body(state_R, token_R):
    return step(automaton, state_R, token_R)

  rows, width = tokens_RT.shape
  start_R = jnp.zeros(rows, jnp.int32)
  _, codes_TR = jax.lax.scan(body, start_R, tokens_RT.T)
  real_RT = jnp.arange(width)[None, :] < length_R[:, None]
  return jnp.where(real_RT, codes_TR.T, 0)


@dataclasses.dataclass(frozen=True)
class Match:
  """Where a string lies in a list of tokens; offsets in bytes."""

  string: int  # index of the string that was found
  first_token: int  # index of the token that holds the match's first byte
  token_after: int  # index of the first token wholly past the match
  skip: int  # bytes of tokens[first_token] that precede the match
  rest: int  # bytes of tokens[token_after - 1] that follow the match
  start: int  # of the match in the joined bytes
  stop: int


def find_first(
  tokens: Iterable[int],
  vocab_bytes: Sequence[bytes | None],
  strings: Sequence[str],
  right_boundary: bool = False,
  ignore_case: bool = False,
  left_boundary: bool = False,
) -> Match | None:
  """The first stop string in tokens, on the host: what `compile_stops` finds.

  `tokens[:first_token]`, then `skip` bytes of the next token, is the text
  exactly before the match. First means: ends first; of those that end
  together the longest. The end of `tokens` is a right boundary. A token
  without bytes counts as one byte that no string holds.

  Args:
    tokens: token ids.
    vocab_bytes: [V] bytes of each token, None where special.
    strings: the stop strings, distinct, not empty.
    right_boundary: no word character [A-Za-z0-9_] may follow the string.
    ignore_case: fold ASCII letters.
    left_boundary: no word character may precede the string.

  Returns:
    The match, or None.

  Raises:
    ValueError: no string, an empty one, or one given twice.
  """
  encoded = _check_stops(strings, ignore_case)
  text, ends = spell(tokens, vocab_bytes)
  found = []
  for index, string in enumerate(encoded):
    pattern = re.escape(string)
    if left_boundary:
      pattern = rb"(?<![A-Za-z0-9_])" + pattern
    if right_boundary:
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


def spell(
  tokens: Iterable[int], vocab_bytes: Sequence[bytes | None]
) -> tuple[bytes, np.ndarray]:
  """Joins tokens as the automata read them.

  Args:
    tokens: [T] token ids.
    vocab_bytes: [V] bytes of each token, None where special.

  Returns:
    (the bytes, with `byte_machine.SPECIAL` for each token without bytes; [T]
    int64, the number of bytes up to the end of each token).
  """
  special = bytes([byte_machine.SPECIAL])
  parts = []
  for token in map(int, tokens):
    known = 0 <= token < len(vocab_bytes)
    piece = vocab_bytes[token] if known else None
    parts.append(special if piece is None else piece)
  ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
  return b"".join(parts), ends


def compile(
  keywords: Sequence[str],
  separator: str,
  match: str,
  vocab_bytes: Sequence[bytes | None],
  think_open_id: int,
  think_close_id: int,
  cache_dir: str | os.PathLike | None = None,
) -> Automaton:
  """The automaton that marks steps and keywords of the first closed thought.

  `thought` holds the definition in plain Python. Events are the bits above;
  they are zero before the first <think> and after the </think> that ends it.

  Args:
    keywords: reflection keywords, matched case-insensitively (ASCII letters).
    separator: ASCII white space that cuts the thought into steps.
    match: "word" (no [A-Za-z0-9_] beside the keyword) or "substring".
    vocab_bytes: [V] bytes of each token, None where special.
    think_open_id: id of <think>.
    think_close_id: id of </think>.
    cache_dir: folder of built tables, made when missing; None builds anew.

  Raises:
    ValueError: a keyword or a separator breaks these rules, or a token holds
      more than 16 whole steps.
  """
  if match not in ("word", "substring"):
    raise ValueError(f"match is {match!r}; it must be 'word' or 'substring'.")
  cut = separator.encode()
  if not cut or not byte_machine.SPACE.issuperset(cut):
    raise ValueError(
      f"The separator is {separator!r}; it must be ASCII white space, such"
      " as '\\n\\n'."
    )
  folded = list(dict.fromkeys(word.encode().lower() for word in keywords))
  for word in folded:
    if not word or word != word.strip() or cut in word:
      raise ValueError(
        f"Keyword {word.decode()!r} can never match: a keyword is not empty,"
        " has no white space at its ends and does not hold the separator"
        f" {separator!r}. Change or drop it."
      )
  for name, index in (("<think>", think_open_id), ("</think>", think_close_id)):
    if not 0 <= index < len(vocab_bytes) or vocab_bytes[index] is not None:
      raise ValueError(
        f"Id {index} of {name} is no special token among the"
        f" {len(vocab_bytes)} of this vocabulary. Take the ids and the bytes"
        " from one Tokenizer."
      )

  def build() -> dict[str, np.ndarray]:
    whole_word = match == "word"
    machine = byte_machine.build(
      folded, whole_word, whole_word, ignore_case=True, separator=cut
    )
    return _thought_tables(machine, vocab_bytes, think_open_id, think_close_id)

  key = ["thought", *folded, b"cut", cut, match, think_open_id, think_close_id]
  return Automaton(**vocab_fold.cached(build, cache_dir, key, vocab_bytes))


def compile_stops(
  strings: Sequence[str],
  vocab_bytes: Sequence[bytes | None],
  right_boundary: bool = False,
  ignore_case: bool = False,
  left_boundary: bool = False,
  cache_dir: str | os.PathLike | None = None,
) -> Automaton:
  """The automaton that finds stop strings in a decode loop.

  The event of a token is 1 + index of the stop string that ends first in it
  (of those that end together the longest), 0 for none. With a right boundary
  a string is known at the next byte, special token, or the end of the text
  (`end_event`).

  Args:
    strings: the stop strings, distinct, not empty.
    vocab_bytes: [V] bytes of each token, None where special.
    right_boundary: no word character [A-Za-z0-9_] may follow the string.
    ignore_case: fold ASCII letters.
    left_boundary: no word character may precede the string.
    cache_dir: folder of built tables, made when missing; None builds anew.

  Raises:
    ValueError: no string, an empty one, one given twice, or one that no
      sequence of tokens can bring about.
  """
  encoded = _check_stops(strings, ignore_case)

  def build() -> dict[str, np.ndarray]:
    machine = byte_machine.build(
      encoded, left_boundary, right_boundary, ignore_case
    )
    return _stop_tables(machine, vocab_bytes)

  key = ["stops", *encoded, left_boundary, right_boundary, ignore_case]
  tables = vocab_fold.cached(build, cache_dir, key, vocab_bytes)
  reached = _reachable_events(tables)
  for index, string in enumerate(strings):
    if index + 1 not in reached:
      raise ValueError(
        f"No sequence of tokens ends in the stop string {string!r}: the"
        " vocabulary cannot spell it, or another stop string always comes"
        " first. Drop it, or use a byte-level vocabulary."
      )
  return Automaton(**tables)


def _check_stops(strings: Sequence[str], ignore_case: bool) -> list[bytes]:
  encoded = [string.encode() for string in strings]
  if ignore_case:
    encoded = [string.lower() for string in encoded]
  if not encoded or not all(encoded) or len(set(encoded)) < len(encoded):
    raise ValueError(
      f"Stop strings are {list(strings)}; there must be at least one, none"
      " empty, none twice."
    )
  return encoded


def _stop_tables(
  machine: byte_machine.ByteMachine, vocab_bytes: Sequence[bytes | None]
) -> dict[str, np.ndarray]:
  flat_found = machine.found.reshape(-1)

  def act(flat: np.ndarray, code: np.ndarray) -> None:
    np.copyto(code, flat_found[flat], where=code == 0)

  known = np.stack([machine.next_state, machine.found], -1)
  tokens, index = vocab_fold.distinct_tokens(known, vocab_bytes)
  special = bytes([byte_machine.SPECIAL])
  next_state, code = vocab_fold.fold(
    machine.next_state, [*tokens, special], act
  )
  index = np.where(index < 0, len(tokens), index)
  return vocab_fold.compress(next_state, code, index, machine.found_at_end)


def _thought_tables(
  machine: byte_machine.ByteMachine,
  vocab_bytes: Sequence[bytes | None],
  think_open_id: int,
  think_close_id: int,
) -> dict[str, np.ndarray]:
  """States: 0 before the thought, 1 after it, 2 + s inside it."""
  content_B = np.asarray([b not in byte_machine.SPACE for b in range(256)])
  keyword = (machine.found > 0).reshape(-1)
  separates = machine.separates.reshape(-1)

  def act(flat: np.ndarray, code: np.ndarray) -> None:
    bits = np.where(content_B[flat & 255], HEAD_CONTENT, 0)
    bits += np.where(keyword[flat], HEAD_KEYWORD, 0)
    # The tail's bits are the head's, three higher.
    code |= bits << np.where(code & SEPARATOR, 3, 0)
    where = np.nonzero(separates[flat])
    code[where] = _after_separator(code[where])

  known = np.stack([machine.next_state, machine.found, machine.separates], -1)
  known = np.concatenate(
    [known, np.broadcast_to(content_B[None, :, None], (*known.shape[:2], 1))],
    -1,
  )
  tokens, index = vocab_fold.distinct_tokens(known, vocab_bytes)
  special = bytes([byte_machine.SPECIAL])
  next_inside, code_inside = vocab_fold.fold(
    machine.next_state, [*tokens, special], act
  )
  states, columns = len(next_inside) + 2, len(tokens) + 3
  next_state = np.zeros((states, columns), np.int32)
  code = np.zeros_like(next_state)
  next_state[2:, :-2], code[2:, :-2] = next_inside + 2, code_inside
  next_state[1] = 1
  opens, closes = columns - 2, columns - 1
  next_state[:, opens], code[:, opens] = next_state[:, -3], code[:, -3]
  next_state[0, opens], code[0, opens] = 2, OPEN
  pending = np.where(machine.found_at_end > 0, HEAD_KEYWORD, 0)
  next_state[2:, closes], code[2:, closes] = 1, CLOSE | pending
  index = np.where(index < 0, len(tokens), index)
  index[think_open_id], index[think_close_id] = opens, closes
  return vocab_fold.compress(
    next_state, code, index, np.concatenate([[0, 0], pending])
  )


def _after_separator(code: np.ndarray) -> np.ndarray:
  """Codes [n] once a separator is complete: the tail becomes a whole step."""
  middle = code >> MIDDLE_SHIFT
  grown = np.maximum(middle, 1) << 1 | (code & TAIL_KEYWORD > 0)
  is_step = (code & SEPARATOR > 0) & (code & TAIL_CONTENT > 0)
  middle = np.where(is_step, grown, middle)
  if np.any(middle >> (MAX_MIDDLE + 1)):
    raise ValueError(
      f"A token holds more than {MAX_MIDDLE} whole steps. Choose a longer"
      " separator, or a vocabulary with shorter tokens."
    )
  head = code & (HEAD_CONTENT | HEAD_KEYWORD)
  return head | SEPARATOR | middle << MIDDLE_SHIFT


def _reachable_events(tables: dict[str, np.ndarray]) -> set[int]:
  used = np.unique(tables["token_class"])
  next_state, event = tables["next_state"][:, used], tables["event"][:, used]
  reached, fresh = {0}, [0]
  for state in fresh:
    new = set(next_state[state].tolist()) - reached
    reached |= new
    fresh += sorted(new)
  rows = sorted(reached)
  return set(np.unique(event[rows]).tolist()) | set(
    tables["end_event"][rows].tolist()
  )
