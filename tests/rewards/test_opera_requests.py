"""Which prefixes OPERA scores: exactly those the reward reads."""

import numpy as np
import pytest

from opera_jax import structs
from opera_jax.rewards import opera_requests

REFERENCE = np.asarray([7, 8, 9], np.int32)


def _thoughts(rows, steps=5):
  """Rows of (start, ends, reflective), or None for a thought not closed."""
  count = len(rows)
  thoughts = structs.Thoughts(
    closed=np.asarray([row is not None for row in rows]),
    start=np.zeros(count, np.int32),
    end=np.zeros(count, np.int32),
    count=np.zeros(count, np.int32),
    step_end=np.zeros((count, steps), np.int32),
    reflective=np.zeros((count, steps), bool),
  )
  for r, row in enumerate(rows):
    if row is None:
      continue
    start, ends, reflective = row
    thoughts.start[r], thoughts.end[r] = start, ends[-1] if ends else start
    thoughts.count[r] = len(ends)
    thoughts.step_end[r, : len(ends)] = ends
    thoughts.reflective[r, : len(ends)] = reflective
  return thoughts


def _plan(rows, **settings):
  count = len(rows)
  return opera_requests.plan(
    _thoughts(rows),
    np.full(count, 10),
    np.full(count, 50),
    [REFERENCE] * count,
    **settings,
  )


def _forks(continuations):
  """Completion positions scored, by prefix, in order."""
  return [
    [
      continuation.fork - 10
      for continuation in continuations
      if continuation.prefix == prefix
    ]
    for prefix in sorted(
      {continuation.prefix for continuation in continuations}
    )
  ]


@pytest.mark.parametrize(
  "row,forks",
  [
    (None, [50]),
    ((1, [], []), [50]),
    ((1, [5, 9, 20], [0, 0, 0]), [50]),
    ((1, [5, 9, 20], [1, 0, 0]), [1, 5, 50]),
    ((1, [5, 9, 20], [0, 0, 1]), [9, 20, 50]),
    ((1, [5, 9, 20], [0, 1, 1]), [5, 9, 20, 50]),
    ((1, [5, 9, 20], [1, 0, 1]), [1, 5, 9, 20, 50]),
    ((1, [5, 9, 20], [1, 1, 1]), [1, 5, 9, 20, 50]),
  ],
  ids=[
    "truncated",
    "empty thought",
    "no reflection",
    "first step",
    "last step",
    "consecutive",
    "apart",
    "all",
  ],
)
def test_forks_are_reflective_ends_their_predecessors_and_the_end(row, forks):
  continuations, _ = _plan([row])
  assert _forks(continuations) == [forks]
  for continuation in continuations:
    np.testing.assert_array_equal(continuation.tokens, REFERENCE)
    assert continuation.skip == 0


def test_a_thought_cut_off_is_read_as_none_whatever_its_slots_hold():
  thoughts = _thoughts([(1, [5, 9], [1, 1])])
  thoughts = thoughts.replace(closed=np.asarray([False]))
  continuations, _ = opera_requests.plan(
    thoughts, np.asarray([10]), np.asarray([50]), [REFERENCE]
  )
  assert _forks(continuations) == [[50]]


def test_all_steps_scores_every_step_once_and_keeps_the_comparisons():
  rows = [(1, [5, 9, 20, 30], [0, 0, 1, 0]), (2, [6], [0])]
  continuations, index = _plan(rows, all_steps=True)
  assert _forks(continuations) == [[1, 5, 9, 20, 30, 50], [2, 6, 50]]
  assert (index.baseline >= 0).sum() == 1
  assert index.baseline[0, 3] == 2
  np.testing.assert_array_equal(index.before[0], [0, 1, 2, 3, -1])
  np.testing.assert_array_equal(index.after[0], [1, 2, 3, 4, -1])


def test_the_index_reads_back_the_positions():
  rows = [(1, [5, 9, 20], [1, 0, 1]), None, (3, [4, 8], [0, 1])]
  continuations, index = _plan(rows)
  position = {
    (row, slot): continuation.fork - 10
    for row, slot, continuation in zip(
      index.completion, index.slot, continuations
    )
  }
  compared = {
    (row, position[row, slot], position[row, index.baseline[row, slot]])
    for row, slot in zip(*np.nonzero(index.baseline >= 0))
  }
  assert compared == {(0, 5, 1), (0, 20, 9), (2, 8, 4)}
  assert [position[r, index.last[r]] for r in range(3)] == [50, 50, 50]


def test_the_bridge_is_context_of_partial_thoughts_alone():
  continuations, _ = _plan([(1, [5], [1])], bridge_ids=(3, 4))
  assert [continuation.skip for continuation in continuations] == [2, 2, 0]
  assert [list(continuation.tokens) for continuation in continuations] == [
    [3, 4, 7, 8, 9],
    [3, 4, 7, 8, 9],
    [7, 8, 9],
  ]


def test_rows_name_the_prefixes_they_are_given():
  continuations, _ = _plan([None, None], prefixes=[4, 2])
  assert [continuation.prefix for continuation in continuations] == [4, 2]


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="completion 0 has no tokens"):
    opera_requests.plan(
      _thoughts([None]), np.asarray([10]), np.asarray([50]), [REFERENCE[:0]]
    )
  with pytest.raises(ValueError, match="reference_ids has 2 entries"):
    opera_requests.plan(
      _thoughts([None]), np.asarray([10]), np.asarray([50]), [REFERENCE] * 2
    )
  with pytest.raises(ValueError, match="steps must rise within"):
    _plan([(1, [5, 60], [0, 1])])


@pytest.mark.parametrize(
  "compare, beaten",
  [
    ("previous", [(1, 5), (9, 20), (20, 30)]),
    ("reflective", [(1, 5), (5, 20), (20, 30)]),
    ("start", [(1, 5), (1, 20), (1, 30)]),
  ],
)
def test_what_a_reflective_step_must_beat(compare, beaten):
  row = (1, [5, 9, 20, 30], [1, 0, 1, 1])
  continuations, index = _plan([row], compare=compare)
  position = [b.fork - 10 for b in continuations]
  got = [
    (position[before], position[slot])
    for slot, before in enumerate(index.baseline[0])
    if before >= 0
  ]
  assert got == beaten


def test_an_unknown_comparison_is_refused():
  with pytest.raises(ValueError, match="Unknown comparison 'best'"):
    _plan([None], compare="best")
