"""Steps and reflective states of a thought: the definition, and on the device.

A completion is read as bytes. Its thought lies between the first <think>
token and the first </think> token after it; without both there are no steps.
The separator cuts the thought into pieces; a piece stripped of ASCII white
space is a step, unless nothing is left. A step is reflective if it holds a
keyword. Any other token without bytes (special, unused, a second <think>)
counts as one byte that is content and no word character.

Shape key: R rows, T tokens, J steps kept.
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

KEYWORDS = ("But", "Wait", "Hmm", "However", "Let me think")
SEPARATOR = "\n\n"


@dataclasses.dataclass(frozen=True)
class Step:
  """One step of a thought."""

  text: bytes  # stripped; b"\xff" stands for a token without bytes
  end: int  # tokens of the completion once the step is complete
  reflective: bool


def is_reflective(
  step: bytes, keywords: Sequence[str] = KEYWORDS, match: str = "word"
) -> bool:
  """Whether a step holds a keyword, whatever the case of its ASCII letters.

  Args:
    step: its bytes.
    keywords: the reflection keywords.
    match: "word" asks that no [A-Za-z0-9_] touches the keyword; "substring"
      does not, so that "attribute" holds "but".
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
  think_open_id: int,
  think_close_id: int,
  keywords: Sequence[str] = KEYWORDS,
  separator: str = SEPARATOR,
  match: str = "word",
) -> list[Step]:
  """The definition, in plain Python: the steps of one completion.

  A step ends after the token that completes the separator behind it, or
  before </think> if no separator follows. Steps inside one token share a
  position.

  Args:
    tokens: token ids of the completion.
    vocab_bytes: [V] bytes of each token, None where special.
    think_open_id: id of <think>.
    think_close_id: id of </think>.
    keywords: the reflection keywords.
    separator: what cuts the thought into steps.
    match: "word" or "substring".

  Returns:
    The steps in order; none where the thought is not closed.
  """
  tokens = [int(token) for token in tokens]
  if think_open_id not in tokens:
    return []
  start = tokens.index(think_open_id) + 1
  if think_close_id not in tokens[start:]:
    return []
  stop = tokens.index(think_close_id, start)
  text, ends = automaton_lib.spell(tokens[start:stop], vocab_bytes)
  cut = separator.encode()
  pieces = text.split(cut)
  steps, offset = [], 0
  for index, piece in enumerate(pieces):
    offset += len(piece) + len(cut)
    followed = index + 1 < len(pieces)
    end = start + 1 + int(np.searchsorted(ends, offset)) if followed else stop
    if piece.strip():
      reflective = is_reflective(piece.strip(), keywords, match)
      steps.append(Step(piece.strip(), end, reflective))
  return steps


@functools.partial(jax.jit, static_argnames="max_steps")
def find(
  tokens_RT: jax.Array,
  length_R: jax.Array,
  automaton: automaton_lib.Automaton,
  max_steps: int,
) -> structs.Thoughts:
  """Finds the steps of completions on the device, equal to `define`.

  Args:
    tokens_RT: [R, T] int completions, right-padded.
    length_R: [R] int, real tokens of each.
    automaton: from `automaton.compile`.
    max_steps: J, slots for steps. Steps beyond it are left out and `count`
      is at most J; `total_steps` (or `check_total`) tells.

  Returns:
    The thoughts, [R] and [R, J].
  """
  codes_RT = automaton_lib.run(automaton, tokens_RT, length_R)
  return from_codes(codes_RT, max_steps)


@functools.partial(jax.jit, static_argnames="max_steps")
def from_codes(codes_RT: jax.Array, max_steps: int) -> structs.Thoughts:
  """`find`, from the event codes [R, T] of `automaton.run`."""
  return jax.vmap(lambda code_T: _row(code_T, max_steps))(codes_RT)


@jax.jit
def total_steps(codes_RT: jax.Array) -> jax.Array:
  """Steps of each row, however many: [R] int32; 0 where not closed."""

  def row(code_T):
    ended_T, _, _ = _ended(code_T)
    return jnp.where(_bit(code_T, automaton_lib.CLOSE).any(), ended_T.sum(), 0)

  return jax.vmap(row)(codes_RT)


def check_total(total_R: np.ndarray, max_steps: int) -> None:
  """Raises where a thought holds more steps than there are slots.

  Args:
    total_R: [R] int from `total_steps`.
    max_steps: slots given to `find`.

  Raises:
    ValueError: some row has more than max_steps steps.
  """
  total_R = np.asarray(total_R)
  over = np.flatnonzero(total_R > max_steps)
  if over.size:
    raise ValueError(
      f"{over.size} of {total_R.size} thoughts have more than {max_steps}"
      f" steps; row {over[0]} has {total_R[over[0]]}. Raise max_steps to at"
      f" least {total_R.max()}."
    )


def _bit(code: jax.Array, bit: int) -> jax.Array:
  return (code & bit) > 0


def _ended(code_T: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Steps that end at each token: (how many, whether the first of them began
  before the token's first separator, whether that one is reflective)."""
  lib = automaton_lib
  # Three moments a token: its head, its separators (or the <think>), its tail.
  moment_T = 3 * jnp.arange(code_T.shape[0], dtype=jnp.int32)

  def latest(head: int, tail: int) -> jax.Array:
    """The last moment before each token at which a bit was set."""
    now_T = jnp.where(_bit(code_T, head), moment_T, -1)
    now_T = jnp.where(_bit(code_T, tail), moment_T + 2, now_T)
    return jnp.pad(jax.lax.cummax(now_T), (1, 0), constant_values=-1)[:-1]

  cut_T = jnp.where(_bit(code_T, lib.SEPARATOR | lib.OPEN), moment_T + 1, -1)
  cut_T = jnp.pad(jax.lax.cummax(cut_T), (1, 0), constant_values=-1)[:-1]
  content_T = latest(lib.HEAD_CONTENT, lib.TAIL_CONTENT) > cut_T
  keyword_T = latest(lib.HEAD_KEYWORD, lib.TAIL_KEYWORD) > cut_T
  ends_T = _bit(code_T, lib.SEPARATOR | lib.CLOSE)
  head_T = ends_T & (content_T | _bit(code_T, lib.HEAD_CONTENT))
  reflective_T = keyword_T | _bit(code_T, lib.HEAD_KEYWORD)
  ended_T = head_T.astype(jnp.int32) + _bit_length(code_T)
  return ended_T, head_T, reflective_T


def _bit_length(code_T: jax.Array) -> jax.Array:
  """Number of whole steps inside each token."""
  middle_T = code_T >> automaton_lib.MIDDLE_SHIFT
  return jnp.maximum(31 - jax.lax.clz(middle_T), 0)


def _row(code_T: jax.Array, max_steps: int) -> structs.Thoughts:
  lib = automaton_lib
  ended_T, head_T, reflective_T = _ended(code_T)
  done_T = jnp.cumsum(ended_T)
  closed = _bit(code_T, lib.CLOSE).any()
  close = jnp.argmax(_bit(code_T, lib.CLOSE)).astype(jnp.int32)
  start = jnp.argmax(_bit(code_T, lib.OPEN)).astype(jnp.int32) + 1
  total = jnp.where(closed, done_T[-1], 0)
  step_J = jnp.arange(max_steps, dtype=jnp.int32)
  real_J = step_J < total
  token_J = jnp.searchsorted(done_T, step_J, side="right")
  token_J = jnp.minimum(token_J, code_T.shape[0] - 1).astype(jnp.int32)
  # Place of the step among those that end at its token; -1 is the head.
  place_J = step_J - (done_T[token_J] - ended_T[token_J])
  place_J = place_J - head_T[token_J].astype(jnp.int32)
  whole_J = _bit_length(code_T[token_J])
  middle_J = code_T[token_J] >> lib.MIDDLE_SHIFT
  shift_J = jnp.clip(whole_J - 1 - place_J, 0, 31)
  inside_J = ((middle_J >> shift_J) & 1) > 0
  reflective_J = jnp.where(place_J < 0, reflective_T[token_J], inside_J)
  end_J = token_J + jnp.where(_bit(code_T[token_J], lib.CLOSE), 0, 1)
  return structs.Thoughts(
    closed=closed,
    start=jnp.where(closed, start, 0),
    end=jnp.where(closed, close, 0),
    count=jnp.minimum(total, max_steps),
    step_end=jnp.where(real_J, end_J, 0),
    reflective=real_J & reflective_J,
  )
