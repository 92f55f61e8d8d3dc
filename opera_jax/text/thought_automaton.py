"""Compiles the automaton that finds steps and reflection keywords in a thought.

Event codes are sets of bits. The separators that end in a token divide it into
a head (up to the first separator), whole steps between separators, and a tail
(after the last separator). `thought.from_codes` decodes the events.
"""

import os
from collections.abc import Sequence

import numpy as np

from opera_jax.text import automaton, byte_machine, table_cache, vocab_fold

OPEN = 1  # the token completes the first <think>
CLOSE = 2  # the token completes the </think> that ends the thought
HEAD_CONTENT = 4  # the head has a byte that is not white space
HEAD_KEYWORD = 8  # a keyword match is confirmed in the head
SEPARATOR = 16  # the token completes a separator
TAIL_CONTENT = 32
TAIL_KEYWORD = 64
CLOSE_BEGINS = 128  # a </think> that is not complete before begins in it
# The bits from here on are 0 without whole steps; otherwise a 1, followed by
# one bit for each whole step, which tells whether it has a keyword.
MIDDLE_SHIFT = 8
MAX_MIDDLE = 16


def compile(
  keywords: Sequence[str],
  separator: str,
  match: str,
  vocab_bytes: Sequence[bytes | None],
  think_open: int | str,
  think_close: int | str,
  cache_dir: str | os.PathLike | None = None,
  *,
  opened: bool = False,
) -> automaton.Automaton:
  """Compiles the automaton for the first closed thought of a completion.

  `thought.define` is the definition in plain Python. Events are 0 before the
  first <think> and after the </think> that ends it.

  Args:
    keywords: reflection keywords; the case of ASCII letters is ignored.
    separator: ASCII white space that separates the steps of a thought.
    match: "word" (no [A-Za-z0-9_] next to the keyword) or "substring".
    vocab_bytes: [V] bytes of each token, None for special tokens.
    think_open: id of <think>, or the string if it is no token.
    think_close: likewise of </think>; both are ids, or both are strings.
    cache_dir: folder where compiled tables are cached; None does not cache.
    opened: the prompt has opened the thought, so that a completion begins in
      it.

  Raises:
    ValueError: a keyword, a separator or a tag that breaks these rules, or a
      token with more than 16 whole steps.
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
  ids: tuple[int, int] | None = None
  if isinstance(think_open, int) and isinstance(think_close, int):
    ids = think_open, think_close
    _check_ids(ids, vocab_bytes)
  else:
    for tag in (think_open, think_close):
      _check_tag(tag)

  def build() -> dict[str, np.ndarray]:
    whole_word = match == "word"
    machine = byte_machine.build(
      folded,
      left_boundary=whole_word,
      right_boundary=[whole_word] * len(folded),
      ignore_case=True,
      separator=cut,
    )
    if ids is not None:
      return _tables(machine, vocab_bytes, ids, opened)
    tags = str(think_open).encode(), str(think_close).encode()
    return _string_tables(machine, vocab_bytes, tags, opened, whole_word)

  key = ["thought", *folded, b"cut", cut, match, think_open, think_close]
  key.append(opened)
  tables = table_cache.cached(
    build, cache_dir=cache_dir, key=key, vocab_bytes=vocab_bytes
  )
  return automaton.Automaton(**tables)


def _check_ids(
  ids: tuple[int, int], vocab_bytes: Sequence[bytes | None]
) -> None:
  for name, index in zip(("<think>", "</think>"), ids):
    if not 0 <= index < len(vocab_bytes) or vocab_bytes[index] is not None:
      raise ValueError(
        f"Id {index} of {name} is no special token among the"
        f" {len(vocab_bytes)} of this vocabulary. Take the ids and the bytes"
        " from one Tokenizer."
      )


def _check_tag(tag: int | str) -> None:
  """Refuses tags of which two occurrences could overlap, or that are text."""
  fine = isinstance(tag, str) and tag != "" and tag.count(tag[0]) == 1
  first = str(tag)[:1]
  fine = fine and first.isascii() and not first.isalnum() and first != "_"
  if not fine or byte_machine.SPACE.intersection(str(tag).encode()):
    raise ValueError(
      f"The think tag {tag!r} is matched as a string: it must begin with an"
      " ASCII sign that is no letter, digit or underscore and that does not"
      " occur in it again, and hold no white space, such as '<think>' and"
      " '</think>'. Change config.tokenizer.think."
    )


def _tables(
  machine: byte_machine.ByteMachine,
  vocab_bytes: Sequence[bytes | None],
  ids: tuple[int, int],
  opened: bool,
) -> dict[str, np.ndarray]:
  """Folds the byte automaton over the vocabulary; the tags are tokens.

  State 0 is before the thought, 1 after it, 2 + s is state s of the byte
  automaton inside the thought. If the prompt opened the thought, states 0 and 2
  change places.
  """
  content_B = np.asarray([b not in byte_machine.SPACE for b in range(256)])
  states, width = machine.next_state.shape
  content = np.broadcast_to(content_B[None, :], (states, width))
  recorder = _Recorder(
    content=content,
    keyword=machine.found > 0,
    separates=machine.separates,
  )
  per_byte = np.stack(
    [machine.next_state, machine.found, machine.separates, content], -1
  )
  tokens, index = vocab_fold.distinct_tokens(per_byte, vocab_bytes)
  special = bytes([byte_machine.SPECIAL])
  next_inside, code_inside = vocab_fold.fold(
    machine.next_state, [*tokens, special], recorder.record
  )
  # Columns: the distinct tokens, the special tokens, <think>, </think>.
  states, columns = len(next_inside) + 2, len(tokens) + 3
  next_state = np.zeros((states, columns), np.int32)
  code = np.zeros_like(next_state)
  next_state[2:, :-2], code[2:, :-2] = next_inside + 2, code_inside
  next_state[1] = 1
  opens, closes = columns - 2, columns - 1
  # Inside the thought, <think> counts as any special token.
  next_state[:, opens], code[:, opens] = next_state[:, -3], code[:, -3]
  next_state[0, opens], code[0, opens] = 2, OPEN
  pending = np.where(machine.found_at_end > 0, HEAD_KEYWORD, 0)
  next_state[2:, closes] = 1
  code[2:, closes] = CLOSE | CLOSE_BEGINS | pending
  index = np.where(index < 0, len(tokens), index)
  index[ids[0]], index[ids[1]] = opens, closes
  end_event = np.concatenate([[0, 0], pending])
  if opened:
    order = np.arange(states, dtype=np.int32)
    order[[0, 2]] = 2, 0
    next_state, code = order[next_state[order]], code[order]
    end_event = end_event[order]
  return vocab_fold.compress(next_state, code, index=index, end_event=end_event)


def _string_tables(
  machine: byte_machine.ByteMachine,
  vocab_bytes: Sequence[bytes | None],
  tags: tuple[bytes, bytes],
  opened: bool,
  whole_word: bool,
) -> dict[str, np.ndarray]:
  """Folds the byte automaton over the vocabulary; the tags are strings."""
  table = _string_machine(machine, tags, opened, whole_word)
  recorder = _Recorder(**{k: v for k, v in table.items() if k != "next_state"})
  per_byte = np.stack(list(table.values()), -1).astype(np.int32)
  tokens, index = vocab_fold.distinct_tokens(per_byte, vocab_bytes)
  special = bytes([byte_machine.SPECIAL])
  next_state, code = vocab_fold.fold(
    table["next_state"], [*tokens, special], recorder.record
  )
  return vocab_fold.compress(
    next_state,
    code,
    index=np.where(index < 0, len(tokens), index),
    # A thought that does not end has no steps.
    end_event=np.zeros(len(next_state), np.int32),
  )


def _string_machine(
  machine: byte_machine.ByteMachine,
  tags: tuple[bytes, bytes],
  opened: bool,
  whole_word: bool,
) -> dict[str, np.ndarray]:
  """The byte automaton of a completion whose tags are strings.

  A state is (phase, bytes of the phase's tag that matched, state of `machine`
  in the thought, whether a keyword was found in those bytes). What stands in
  the first bytes of a </think> counts once they turn out to be no tag.

  Returns:
    Tables [S, 256]: the next state, and what `_Recorder` takes.
  """
  restarts = [byte_machine.match_table(tag) for tag in tags]
  after = ("after", 0, 0, False)
  names = ("content", "keyword", "separates", "opens", "closes", "begins")

  def step(state: tuple, byte: int) -> tuple[tuple, dict[str, bool]]:
    phase, matched, inner, waits = state
    if phase == "after":
      return after, {}
    if phase == "before":
      now = restarts[0][matched][byte]
      if now == len(tags[0]):
        return ("inside", 0, 0, False), {"opens": True}
      return ("before", now, 0, False), {}
    now = restarts[1][matched][byte]
    target = int(machine.next_state[inner, byte])
    found = bool(machine.found[inner, byte])
    # With a boundary, a keyword is found at the byte after it.
    ended_before = found and whole_word
    if now == len(tags[1]):
      first = matched == 0
      return after, {
        "closes": True, "begins": first, "keyword": ended_before and first,
      }  # fmt: skip
    if not now:
      events = {
        "content": matched > 0 or byte not in byte_machine.SPACE,
        "keyword": found or waits,
        "separates": bool(machine.separates[inner, byte]),
      }
      return ("inside", 0, target, False), events
    if now > 1:
      return ("inside", now, target, waits or found), {}
    events = {
      "begins": True,
      "content": matched > 0,
      "keyword": ended_before or waits,
    }
    return ("inside", 1, target, found and not whole_word), events

  start = ("inside" if opened else "before", 0, 0, False)
  number, states = {start: 0}, [start]
  next_rows, event_rows = [], []
  for state in states:
    targets, events = [], []
    for byte in range(256):
      target, event = step(state, byte)
      if target not in number:
        number[target] = len(states)
        states.append(target)
      targets.append(number[target])
      events.append([event.get(name, False) for name in names])
    next_rows.append(targets)
    event_rows.append(events)
  table = np.asarray(event_rows, bool)
  no_tag = np.asarray([s[0] == "inside" and not s[1] for s in states])
  next_state = np.asarray(next_rows, np.int32)
  return {
    "next_state": next_state,
    **{name: table[:, :, k] for k, name in enumerate(names)},
    "breaks": no_tag[next_state],  # what began as a tag is none
  }


class _Recorder:
  """Collects the event code of each token from tables over [states, bytes]."""

  def __init__(
    self,
    *,
    content: np.ndarray,
    keyword: np.ndarray,
    separates: np.ndarray,
    opens: np.ndarray | None = None,
    closes: np.ndarray | None = None,
    begins: np.ndarray | None = None,
    breaks: np.ndarray | None = None,
  ):
    bits = np.where(content, HEAD_CONTENT, 0)
    self._bits = (bits + np.where(keyword, HEAD_KEYWORD, 0)).reshape(-1)
    self._separates = separates.reshape(-1)
    self._tags = [
      None if table is None else table.reshape(-1)
      for table in (opens, closes, begins, breaks)
    ]

  def record(self, flat: np.ndarray, code: np.ndarray) -> None:
    """See `vocab_fold.fold`."""
    # The tail's bits are the head's, shifted left by three.
    code |= self._bits[flat] << np.where(code & (SEPARATOR | OPEN), 3, 0)
    where = np.nonzero(self._separates[flat])
    code[where] = _after_separator(code[where])
    opens, closes, begins, breaks = self._tags
    if opens is None or closes is None or begins is None or breaks is None:
      return
    code |= np.where(opens[flat], OPEN, 0)
    # A step that began after a separator in this very token is a whole step.
    tail = code & (SEPARATOR | OPEN) > 0
    where = np.nonzero(closes[flat] & tail)
    code[where] = _after_separator(code[where])
    code |= np.where(closes[flat], CLOSE, 0)
    code &= np.where(breaks[flat], ~CLOSE_BEGINS, -1)
    code |= np.where(begins[flat], CLOSE_BEGINS, 0)


def _after_separator(code: np.ndarray) -> np.ndarray:
  """Codes [n] after a separator: the tail becomes a whole step.

  A tail of white space is no step, and before the first separator, or the
  <think>, there is no tail.
  """
  middle = code >> MIDDLE_SHIFT
  grown = np.maximum(middle, 1) << 1 | (code & TAIL_KEYWORD > 0)
  has_tail = code & (SEPARATOR | OPEN) > 0
  is_step = has_tail & (code & TAIL_CONTENT > 0)
  middle = np.where(is_step, grown, middle)
  if np.any(middle >> (MAX_MIDDLE + 1)):
    raise ValueError(
      f"A token holds more than {MAX_MIDDLE} whole steps. Choose a longer"
      " separator, or a vocabulary with shorter tokens."
    )
  kept = code & (OPEN | HEAD_CONTENT | HEAD_KEYWORD | CLOSE_BEGINS)
  return kept | SEPARATOR | middle << MIDDLE_SHIFT
