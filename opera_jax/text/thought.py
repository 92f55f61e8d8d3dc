"""Finds the steps of a thought and which of them are reflective.

`define` is the definition in plain Python, `find` computes the same on the
device.

A completion is read as bytes. Its thought is the text between the first <think>
and the first </think> after it; without both there are no steps. The tags are
one token each, or strings over several tokens. A prompt may open the thought;
then it begins with the completion.
The separator divides the thought into pieces. A piece, stripped of ASCII white
space, is a step unless it is empty. A step is reflective if it contains a
keyword. Any other token without bytes (a special token, an unused id, a second
<think>) counts as one byte that is neither white space nor a word character.

Shape key: R completions, T tokens, J steps kept.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opera_jax import structs
from opera_jax.text import automaton as automaton_lib
from opera_jax.text import thought_automaton

KEYWORDS = ("But", "Wait", "Hmm", "However", "Let me think")
SEPARATOR = "\n\n"


@dataclasses.dataclass(frozen=True)
class Step:
  """One step of a thought."""

  text: bytes  # stripped; a token without bytes is b"\xff"
  end: int  # tokens of the completion up to the end of the step
  reflective: bool


def is_reflective(
  step: bytes, keywords: Sequence[str] = KEYWORDS, match: str = "word"
) -> bool:
  """Whether a step contains a keyword, ignoring the case of ASCII letters.

  Args:
    step: its bytes.
    keywords: the reflection keywords.
    match: "word" requires that no [A-Za-z0-9_] is next to the keyword;
      "substring" does not, so that "attribute" contains "but".
  """
  if not keywords:
    return False
  pattern = b"|".join(re.escape(word.encode()) for word in keywords)
  if match == "word":
    pattern = rb"(?<![A-Za-z0-9_])(?:" + pattern + rb")(?![A-Za-z0-9_])"
  return re.search(pattern, step, re.IGNORECASE) is not None


def define(
  tokens: Sequence[int],
  vocab_bytes: Sequence[bytes | None],
  think_open: int | str,
  think_close: int | str,
  keywords: Sequence[str] = KEYWORDS,
  separator: str = SEPARATOR,
  match: str = "word",
  *,
  opened: bool = False,
) -> list[Step]:
  """Finds the steps of one completion, in plain Python.

  A step ends after the token that completes the separator after it, or before
  </think> if no separator follows. Steps within one token end at the same
  position. A token that holds a part of a tag belongs to the tag.

  Args:
    tokens: token ids of the completion.
    vocab_bytes: [V] bytes of each token, None for special tokens.
    think_open: id of <think>, or the string if it is no token.
    think_close: likewise of </think>.
    keywords: the reflection keywords.
    separator: separates the steps of a thought.
    match: "word" or "substring".
    opened: the prompt has opened the thought.

  Returns:
    The steps in order; none if the thought is not closed.
  """
  tokens = [int(token) for token in tokens]
  text, ends = automaton_lib.spell(tokens, vocab_bytes)
  begin = start = 0
  if not opened:
    found = _tag(think_open, tokens, text, ends, 0)
    if found is None:
      return []
    begin, start = found[1], found[3]
  found = _tag(think_close, tokens, text, ends, begin)
  if found is None:
    return []
  stop = max(found[2], start)
  cut = separator.encode()
  pieces = text[begin : found[0]].split(cut)
  steps, offset = [], begin
  for index, piece in enumerate(pieces):
    offset += len(piece) + len(cut)
    followed = index + 1 < len(pieces)
    end = min(_count(ends, offset), stop) if followed else stop
    if piece.strip():
      reflective = is_reflective(piece.strip(), keywords, match)
      steps.append(Step(piece.strip(), end, reflective))
  return steps


def _count(ends: np.ndarray, offset: int) -> int:
  """Tokens that hold the first `offset` bytes."""
  return int(np.searchsorted(ends, offset)) + 1


def _tag(
  tag: int | str,
  tokens: Sequence[int],
  text: bytes,
  ends: np.ndarray,
  begin: int,
) -> tuple[int, int, int, int] | None:
  """Finds a tag from a byte on: bytes before and up to its end, tokens wholly
  before it and up to its end; None if it is not there."""
  if isinstance(tag, str):
    first = text.find(tag.encode(), begin)
    if first < 0:
      return None
    last = first + len(tag.encode())
    before = int(np.searchsorted(ends, first, side="right"))
    return first, last, before, _count(ends, last)
  after = int(np.searchsorted(ends, begin, side="right"))
  if tag not in tokens[after:]:
    return None
  place = tokens.index(tag, after)
  return int(ends[place]) - 1, int(ends[place]), place, place + 1


@functools.partial(jax.jit, static_argnames="max_steps")
def find(
  tokens_RT: jax.Array,
  length_R: jax.Array,
  automaton: automaton_lib.Automaton,
  max_steps: int,
) -> structs.Thoughts:
  """Finds the steps of completions on the device, the same as `define`.

  Args:
    tokens_RT: [R, T] int completions, right-padded.
    length_R: [R] int, tokens of each without padding.
    automaton: from `thought_automaton.compile`.
    max_steps: J, entries for steps. Later steps are dropped, and `count` is at
      most J; `total_steps` counts all of them.
  """
  codes_RT = automaton_lib.run(automaton, tokens_RT, length_R)
  return from_codes(codes_RT, max_steps)


@functools.partial(jax.jit, static_argnames="max_steps")
def from_codes(codes_RT: jax.Array, max_steps: int) -> structs.Thoughts:
  """The same as `find`, from the event codes [R, T] of `automaton.run`."""
  return jax.vmap(lambda code_T: _thought(code_T, max_steps))(codes_RT)


@jax.jit
def total_steps(codes_RT: jax.Array) -> jax.Array:
  """Counts all steps of each thought: [R] int32; 0 if not closed."""

  def count(code_T: jax.Array) -> jax.Array:
    ended_T, _, _ = _ended_steps(code_T)
    closed = _bit(code_T, thought_automaton.CLOSE).any()
    return jnp.where(closed, ended_T.sum(), 0)

  return jax.vmap(count)(codes_RT)


def check_total(total_R: np.ndarray, max_steps: int) -> None:
  """Refuses thoughts with more steps than `find` keeps.

  Args:
    total_R: [R] int from `total_steps`.
    max_steps: J of `find`.

  Raises:
    ValueError: a thought with more than `max_steps` steps.
  """
  total_R = np.asarray(total_R)
  too_long = np.flatnonzero(total_R > max_steps)
  if too_long.size:
    raise ValueError(
      f"{too_long.size} of {total_R.size} thoughts have more than {max_steps}"
      f" steps; completion {too_long[0]} has {total_R[too_long[0]]}. Raise"
      f" max_steps to at least {total_R.max()}."
    )


def _bit(code: jax.Array, bit: int) -> jax.Array:
  return (code & bit) > 0


def _ended_steps(
  code_T: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Finds the steps that end at each token.

  A token can end several steps. The first of them, the head step, began before
  the token or in its head; the others are whole steps inside the token.

  Returns:
    The number of steps that end at each token [T] int32, whether a head step
    is among them [T] bool, and whether that head step is reflective [T] bool.
  """
  lib = thought_automaton
  # Each token has three moments, in order: its head, its separators (or the
  # <think>), its tail.
  moment_T = 3 * jnp.arange(code_T.shape[0], dtype=jnp.int32)

  def last_before(head: int, tail: int) -> jax.Array:
    """The last moment before each token at which a bit was set; -1 if none."""
    now_T = jnp.where(_bit(code_T, head), moment_T, -1)
    now_T = jnp.where(_bit(code_T, tail), moment_T + 2, now_T)
    return jnp.pad(jax.lax.cummax(now_T), (1, 0), constant_values=-1)[:-1]

  cut_T = jnp.where(_bit(code_T, lib.SEPARATOR | lib.OPEN), moment_T + 1, -1)
  cut_T = jnp.pad(jax.lax.cummax(cut_T), (1, 0), constant_values=-1)[:-1]
  # Content and keywords since the last separator belong to the current step.
  content_T = last_before(lib.HEAD_CONTENT, lib.TAIL_CONTENT) > cut_T
  keyword_T = last_before(lib.HEAD_KEYWORD, lib.TAIL_KEYWORD) > cut_T
  ends_T = _bit(code_T, lib.SEPARATOR | lib.CLOSE)
  head_T = ends_T & (content_T | _bit(code_T, lib.HEAD_CONTENT))
  reflective_T = keyword_T | _bit(code_T, lib.HEAD_KEYWORD)
  ended_T = head_T.astype(jnp.int32) + _whole_steps(code_T)
  return ended_T, head_T, reflective_T


def _whole_steps(code_T: jax.Array) -> jax.Array:
  """Number of whole steps inside each token."""
  middle_T = code_T >> thought_automaton.MIDDLE_SHIFT
  return jnp.maximum(31 - jax.lax.clz(middle_T), 0)


def _thought(code_T: jax.Array, max_steps: int) -> structs.Thoughts:
  """`from_codes` of one completion."""
  lib = thought_automaton
  ended_T, head_T, reflective_T = _ended_steps(code_T)
  done_T = jnp.cumsum(ended_T)
  closed = _bit(code_T, lib.CLOSE).any()
  close = jnp.argmax(_bit(code_T, lib.CLOSE)).astype(jnp.int32)
  opens_T = _bit(code_T, lib.OPEN)
  # Without an OPEN the prompt opened the thought.
  start = jnp.where(opens_T.any(), jnp.argmax(opens_T) + 1, 0)
  start = start.astype(jnp.int32)
  token_T = jnp.arange(code_T.shape[0], dtype=jnp.int32)
  begins_T = jnp.where(_bit(code_T, lib.CLOSE_BEGINS), token_T, -1)
  end = jnp.maximum(jax.lax.cummax(begins_T)[close], start)
  total = jnp.where(closed, done_T[-1], 0)
  step_J = jnp.arange(max_steps, dtype=jnp.int32)
  real_J = step_J < total
  # The token at which each step ends.
  token_J = jnp.searchsorted(done_T, step_J, side="right")
  token_J = jnp.minimum(token_J, code_T.shape[0] - 1).astype(jnp.int32)
  # The step's index among the whole steps of its token; -1 for the head step.
  index_J = step_J - (done_T[token_J] - ended_T[token_J])
  index_J = index_J - head_T[token_J].astype(jnp.int32)
  whole_J = _whole_steps(code_T[token_J])
  middle_J = code_T[token_J] >> lib.MIDDLE_SHIFT
  shift_J = jnp.clip(whole_J - 1 - index_J, 0, 31)
  inside_J = ((middle_J >> shift_J) & 1) > 0
  reflective_J = jnp.where(index_J < 0, reflective_T[token_J], inside_J)
  end_J = jnp.minimum(token_J + 1, end)
  return structs.Thoughts(
    closed=closed,
    start=jnp.where(closed, start, 0),
    end=jnp.where(closed, end, 0),
    count=jnp.minimum(total, max_steps),
    step_end=jnp.where(real_J, end_J, 0),
    reflective=real_J & reflective_J,
  )
