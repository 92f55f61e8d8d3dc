"""Steps of one token at a time are runs over whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np

from opera_jax.text import automaton, stop_automaton, thought, thought_automaton


def test_step_is_run_one_token_at_a_time(small):
  table = thought_automaton.compile(
    thought.KEYWORDS,
    "\n\n",
    "word",
    small.vocab_bytes,
    small.think_open_id,
    small.think_close_id,
  )
  rows = np.random.default_rng(0).integers(0, small.vocab_size, (5, 40))
  rows[:, 0] = small.think_open_id
  codes = automaton.run(table, rows, np.full(5, 40))
  state = jnp.zeros(5, jnp.int32)
  one = jax.jit(automaton.step)
  for t in range(40):
    state, event = one(table, state, jnp.asarray(rows[:, t]))
    assert np.array_equal(event, codes[:, t])


def test_ids_beyond_the_vocabulary_are_special():
  table = stop_automaton.compile(["ab"], [b"a", b"b", None])
  rows = np.asarray([[0, 1], [0, 2], [0, 99], [0, -3]])
  rows = np.concatenate([rows, np.full((4, 1), 1)], 1)
  events = automaton.run(table, rows, np.full(4, 3))
  assert events.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
