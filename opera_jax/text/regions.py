"""Joins several automata into one table with one initial state per automaton.

Slots of one decode loop can then search for different stop strings at the same
time: the initial state of a slot selects its region of the table.

Shape key: S states, C columns, V tokens of the vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from opera_jax.text import automaton, vocab_fold

STOP_TOKEN = 1  # event of a stop token that completes no stop string


def join(
  regions: Sequence[tuple[automaton.Automaton | None, Sequence[int]]],
  vocab_size: int,
) -> tuple[automaton.Automaton, list[int]]:
  """Joins automata.

  Args:
    regions: for each region its automaton (None for no strings), and the ids of
      its stop tokens.
    vocab_size: V, the same for all.

  Returns:
    The joined automaton, and the initial state of each region.

  Raises:
    ValueError: an automaton of another vocabulary, or a stop token outside it.
  """
  empty = automaton.Automaton(
    token_class=np.zeros(vocab_size + 1, np.uint16),
    next_state=np.zeros((1, 1), np.uint8),
    event=np.zeros((1, 1), np.uint8),
    end_event=np.zeros(1, np.uint8),
  )
  tables, behaviours = [], []
  for number, (table, stop_ids) in enumerate(regions):
    table = empty if table is None else table
    if len(table.token_class) != vocab_size + 1:
      raise ValueError(
        f"Region {number} was compiled for {len(table.token_class) - 1} "
        f"tokens, the vocabulary has {vocab_size}. Compile it again."
      )
    wrong = [i for i in stop_ids if not 0 <= i < vocab_size]
    if wrong:
      raise ValueError(
        f"Region {number} stops at {wrong}; token ids lie in [0, {vocab_size})."
        " Check that tokenizer and model agree."
      )
    tables.append(table)
    stops = np.isin(np.arange(vocab_size + 1), stop_ids)
    behaviours += [
      np.asarray(table.token_class, np.int32),
      stops.astype(np.int32),
    ]
  # One column per distinct behaviour over all regions.
  columns, index = np.unique(np.stack(behaviours), axis=1, return_inverse=True)
  sizes = [len(table.next_state) for table in tables]
  starts = [sum(sizes[:number]) for number in range(len(tables))]
  next_state, event = [], []
  for number, table in enumerate(tables):
    column, stops = columns[2 * number : 2 * number + 2]
    found = np.asarray(table.event, np.int32)[:, column]
    event.append(np.where((found == 0) & (stops > 0), STOP_TOKEN, found))
    targets = np.asarray(table.next_state, np.int32)[:, column]
    next_state.append(targets + starts[number])
  joined = vocab_fold.compress(
    np.concatenate(next_state),
    np.concatenate(event),
    index=index.reshape(-1),
    end_event=np.concatenate(
      [np.asarray(t.end_event, np.int32) for t in tables]
    ),
  )
  return automaton.Automaton(**joined), starts
