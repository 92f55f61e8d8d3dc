"""Runs a byte automaton on tokens on the device, with one int of state per
sequence.

`byte_machine` builds the automaton over bytes. `vocab_fold` runs every token's
bytes from every state, which gives the automaton over tokens: the next state
and the event of each pair of state and token. Most tokens behave alike, so the
tables have one column per distinct behaviour, and `token_class` maps a token to
its column: Qwen's 151,669 tokens need a few hundred columns.

`thought_automaton` and `stop_automaton` compile such tables; their events mean
different things.

Shape key: R sequences, T tokens, S states, C columns, V vocabulary.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from opera_jax.text import byte_machine


@struct.dataclass
class Automaton:
  """Transition tables over tokens; numpy arrays as compiled.

  Attributes:
    token_class: [V + 1] uint16 or int32, column of each token; the last entry
      is for ids outside the vocabulary.
    next_state: [S, C], the smallest unsigned int that holds S; 0 is the initial
      state.
    event: [S, C], the smallest unsigned int that holds the event codes; 0 means
      no event.
    end_event: [S], like `event`: the event if the text ends in this state.
  """

  token_class: jax.Array | np.ndarray
  next_state: jax.Array | np.ndarray
  event: jax.Array | np.ndarray
  end_event: jax.Array | np.ndarray


def step(
  automaton: Automaton, state: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Reads one token of each sequence.

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
  """Reads whole sequences.

  Args:
    automaton: the tables.
    tokens_RT: [R, T] int, right-padded.
    length_R: [R] int, tokens of each sequence without padding.

  Returns:
    Event codes [R, T] int32, 0 in the padding.
  """

  def body(
    state_R: jax.Array, token_R: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    return step(automaton, state_R, token_R)

  rows, width = tokens_RT.shape
  start_R = jnp.zeros(rows, jnp.int32)
  _, codes_TR = jax.lax.scan(body, start_R, tokens_RT.T)
  real_RT = jnp.arange(width)[None, :] < length_R[:, None]
  return jnp.where(real_RT, codes_TR.T, 0)


def spell(
  tokens: Iterable[int], vocab_bytes: Sequence[bytes | None]
) -> tuple[bytes, np.ndarray]:
  """Concatenates the bytes of tokens as the automata read them, on the host.

  Args:
    tokens: [T] token ids.
    vocab_bytes: [V] bytes of each token, None for special tokens.

  Returns:
    The bytes, with `byte_machine.SPECIAL` for each token without bytes; and for
    each token the number of bytes up to its end, [T] int64.
  """
  special = bytes([byte_machine.SPECIAL])
  pieces = []
  for token in map(int, tokens):
    known = 0 <= token < len(vocab_bytes)
    piece = vocab_bytes[token] if known else None
    pieces.append(special if piece is None else piece)
  ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
  return b"".join(pieces), ends
