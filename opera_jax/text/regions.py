"""Several automata in one table, each a region that a row starts in.

Rows of one decode loop then look for different stop strings at the same time.

Shape key: S states, C columns, V tokens of the vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from opera_jax.text import automaton, vocab_fold

STOP_TOKEN = 1  # event of a region's stop tokens, where nothing else is found


def join(
  parts: Sequence[tuple[automaton.Automaton | None, Sequence[int]]],
  vocab_size: int,
) -> tuple[automaton.Automaton, list[int]]:
  """Puts automata side by side.

  Args:
    parts: (automaton or None for no strings, ids of tokens that are an event
      in this region whatever the strings) of each region.
    vocab_size: V of all of them.

  Returns:
    The automaton, and the state in which each region starts.

  Raises:
    ValueError: an automaton of another vocabulary, an id outside it.
  """
  nothing = automaton.Automaton(
    token_class=np.zeros(vocab_size + 1, np.uint16),
    next_state=np.zeros((1, 1), np.uint8),
    event=np.zeros((1, 1), np.uint8),
    end_event=np.zeros(1, np.uint8),
  )
  tables, kinds = [], []
  for number, (table, stop_ids) in enumerate(parts):
    table = nothing if table is None else table
    if len(table.token_class) != vocab_size + 1:
      raise ValueError(
        f"Region {number} was compiled for {len(table.token_class) - 1} "
        f"tokens, the vocabulary has {vocab_size}. Compile it anew."
      )
    wrong = [i for i in stop_ids if not 0 <= i < vocab_size]
    if wrong:
      raise ValueError(
        f"Region {number} stops at {wrong}; token ids lie in [0, {vocab_size})."
        " Check that tokenizer and model agree."
      )
    tables.append(table)
    stops = np.isin(np.arange(vocab_size + 1), stop_ids)
    kinds += [np.asarray(table.token_class, np.int32), stops.astype(np.int32)]
  # One column for each way in which a token acts in all regions together.
  columns, index = np.unique(np.stack(kinds), axis=1, return_inverse=True)
  sizes = [len(table.next_state) for table in tables]
  starts = [sum(sizes[:number]) for number in range(len(tables))]
  next_state, event = [], []
  for number, table in enumerate(tables):
    column, stops = columns[2 * number : 2 * number + 2]
    found = np.asarray(table.event, np.int32)[:, column]
    event.append(np.where((found == 0) & (stops > 0), STOP_TOKEN, found))
    to = np.asarray(table.next_state, np.int32)[:, column]
    next_state.append(to + starts[number])
  joined = vocab_fold.compress(
    np.concatenate(next_state),
    np.concatenate(event),
    index.reshape(-1),
    np.concatenate([np.asarray(t.end_event, np.int32) for t in tables]),
  )
  return automaton.Automaton(**joined), starts
