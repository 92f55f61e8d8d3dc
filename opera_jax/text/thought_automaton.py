"""Compiles the automaton that finds steps and reflection keywords in a thought.

Event codes are sets of bits. The separators that end in a token divide it into
a head (up to the first separator), whole steps between separators, and a tail
(after the last separator). `thought.from_codes` decodes the events.
"""

import os
from collections.abc import Sequence

import numpy as np

from opera_jax.text import automaton, byte_machine, table_cache, vocab_fold

OPEN = 1  # the token is the first <think>
CLOSE = 2  # the token is the </think> that ends the thought
HEAD_CONTENT = 4  # the head has a byte that is not white space
HEAD_KEYWORD = 8  # a keyword match is confirmed in the head
SEPARATOR = 16  # the token completes a separator
TAIL_CONTENT = 32
TAIL_KEYWORD = 64
# The bits from here on are 0 without whole steps; otherwise a 1, followed by
# one bit for each whole step, which tells whether it has a keyword.
MIDDLE_SHIFT = 7
MAX_MIDDLE = 16


def compile(
  keywords: Sequence[str],
  separator: str,
  match: str,
  vocab_bytes: Sequence[bytes | None],
  think_open_id: int,
  think_close_id: int,
  cache_dir: str | os.PathLike | None = None,
) -> automaton.Automaton:
  """Compiles the automaton for the first closed thought of a completion.

  `thought.define` is the definition in plain Python. Events are 0 before the
  first <think> and after the </think> that ends it.

  Args:
    keywords: reflection keywords; the case of ASCII letters is ignored.
    separator: ASCII white space that separates the steps of a thought.
    match: "word" (no [A-Za-z0-9_] next to the keyword) or "substring".
    vocab_bytes: [V] bytes of each token, None for special tokens.
    think_open_id: id of <think>.
    think_close_id: id of </think>.
    cache_dir: folder where compiled tables are cached; None does not cache.

  Raises:
    ValueError: a keyword or a separator that breaks these rules, or a token
      with more than 16 whole steps.
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
      folded,
      left_boundary=whole_word,
      right_boundary=whole_word,
      ignore_case=True,
      separator=cut,
    )
    return _tables(
      machine,
      vocab_bytes,
      think_open_id=think_open_id,
      think_close_id=think_close_id,
    )

  key = ["thought", *folded, b"cut", cut, match, think_open_id, think_close_id]
  tables = table_cache.cached(
    build, cache_dir=cache_dir, key=key, vocab_bytes=vocab_bytes
  )
  return automaton.Automaton(**tables)


def _tables(
  machine: byte_machine.ByteMachine,
  vocab_bytes: Sequence[bytes | None],
  *,
  think_open_id: int,
  think_close_id: int,
) -> dict[str, np.ndarray]:
  """Folds the byte automaton over the vocabulary.

  State 0 is before the thought, 1 after it, 2 + s is state s of the byte
  automaton inside the thought.
  """
  content_B = np.asarray([b not in byte_machine.SPACE for b in range(256)])
  keyword = (machine.found > 0).reshape(-1)
  separates = machine.separates.reshape(-1)

  def record(flat: np.ndarray, code: np.ndarray) -> None:
    bits = np.where(content_B[flat & 255], HEAD_CONTENT, 0)
    bits += np.where(keyword[flat], HEAD_KEYWORD, 0)
    # The tail's bits are the head's, shifted left by three.
    code |= bits << np.where(code & SEPARATOR, 3, 0)
    where = np.nonzero(separates[flat])
    code[where] = _after_separator(code[where])

  per_byte = np.stack(
    [machine.next_state, machine.found, machine.separates], -1
  )
  states, width = per_byte.shape[:2]
  content = np.broadcast_to(content_B[None, :, None], (states, width, 1))
  per_byte = np.concatenate([per_byte, content], -1)
  tokens, index = vocab_fold.distinct_tokens(per_byte, vocab_bytes)
  special = bytes([byte_machine.SPECIAL])
  next_inside, code_inside = vocab_fold.fold(
    machine.next_state, [*tokens, special], record
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
  next_state[2:, closes], code[2:, closes] = 1, CLOSE | pending
  index = np.where(index < 0, len(tokens), index)
  index[think_open_id], index[think_close_id] = opens, closes
  return vocab_fold.compress(
    next_state,
    code,
    index=index,
    end_event=np.concatenate([[0, 0], pending]),
  )


def _after_separator(code: np.ndarray) -> np.ndarray:
  """Codes [n] after a separator: the tail becomes a whole step.

  A tail of white space is no step, and before the first separator there is no
  tail.
  """
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
