"""Parts of the rows: who computes what, who waits for whom, what is raised."""

import threading
import time

import jax
import numpy as np
import pytest

from opera_jax.rollout import prompt_slots, workers
from opera_jax.sharding import mesh


class _Rows:
  """Takes note of its turns; every sample draws one token and ends."""

  count, width = 3, 2

  def __init__(self, draw=None):
    self.turns, self._slots, self._draw = [], [], draw

  def keep(self, kept):
    self.turns.append({"kept": kept})

  def begin(self, contexts):
    self.turns[-1]["contexts"] = contexts

  def retire(self, finished):
    self.turns[-1]["through"] = finished

  def fork(self, forks):
    self.turns[-1]["forks"] = forks
    self._slots = [(fork.row, fork.slot) for fork in forks]

  def live(self):
    return len(self._slots)

  def draw(self, free):
    self.turns[-1] |= {"free": free, "thread": threading.current_thread()}
    if self._draw is not None:
      self._draw()
    slots, self._slots = self._slots, []
    one = np.ones(1)
    return [
      prompt_slots.Piece(row, slot, one, one, None, live=False, ended=0)
      for row, slot in slots
    ]


def _forks(*places):
  return [
    prompt_slots.Fork(row, slot, np.zeros(2), budget=1) for row, slot in places
  ]


def _one(live):
  return 1


def _drawn(pieces):
  return sorted((piece.row, piece.slot) for piece in pieces)


def test_rows_go_round_the_parts():
  together = threading.Barrier(2, timeout=60)
  made = [_Rows(together.wait), _Rows(together.wait)]
  tokens = np.arange(3)
  with workers.Workers(made) as cut:
    places = [(0, 0), (1, 0), (1, 1), (4, 0)]
    drawn = cut.step(
      free=lambda live: 10 * live,
      kept=[(1, 0, tokens)],
      contexts=[(1, "one", tokens), (4, "four", tokens)],
      finished=[2, 3, 5],
      forks=_forks(*places),
    )
    while len(drawn) < len(places):
      drawn += cut.step(free=_one)
  assert _drawn(drawn) == places
  (even,), (odd,) = (rows.turns for rows in made)
  assert (even["kept"], odd["kept"]) == ([], [(0, 0, tokens)])
  assert even["contexts"] == [(2, "four", tokens)]
  assert odd["contexts"] == [(0, "one", tokens)]
  assert (even["through"], odd["through"]) == ([1], [1, 2])
  assert [(f.row, f.slot) for f in even["forks"]] == [(0, 0), (2, 0)]
  assert [(f.row, f.slot) for f in odd["forks"]] == [(0, 0), (0, 1)]
  assert even["free"] == odd["free"] == 20
  threads = {even["thread"], odd["thread"]}
  assert len(threads) == 2 and threading.current_thread() not in threads


def test_a_part_that_is_slow_holds_no_other():
  go = threading.Event()
  slow, quick = _Rows(lambda: go.wait(20)), _Rows()
  with workers.Workers([slow, quick]) as cut:
    got = cut.step(free=_one, forks=_forks((0, 0), (1, 0)))
    assert _drawn(got) == [(1, 0)]
    assert _drawn(cut.step(free=_one, forks=_forks((3, 0), (5, 0)))) == [
      (3, 0),
      (5, 0),
    ]
    for lost in (
      {"forks": _forks((0, 1))},
      {"contexts": [(2, "two", np.ones(1))]},
      {"kept": [(1, 0, np.ones(1))]},  # and no fork
    ):
      with pytest.raises(ValueError, match="cannot change"):
        cut.step(free=_one, **lost)
    go.set()
    assert _drawn(cut.step(free=_one)) == [(0, 0)]
  assert (len(slow.turns), len(quick.turns)) == (1, 2)


def test_a_part_that_had_nothing_to_do_is_not_forgotten():
  with workers.Workers([_Rows(), _Rows()]) as cut:
    for row in (0, 1, 0):
      got = cut.step(free=_one, forks=_forks((row, 0)))
      assert _drawn(got) == [(row, 0)]
    with pytest.raises(ValueError, match="No slot is live"):
      cut.step(free=_one)


def test_what_a_part_raises_is_raised_once_the_others_are_back():
  go, ended = threading.Event(), []

  def finish():
    go.wait(20)
    time.sleep(0.2)  # long past the other's error
    ended.append(True)

  def fail():
    raise FloatingPointError("not finite")

  with (
    pytest.raises(FloatingPointError, match="not finite"),
    workers.Workers([_Rows(finish), _Rows(fail)]) as cut,
  ):
    try:
      cut.step(free=_one, forks=_forks((0, 0), (1, 0)))
    finally:
      assert not ended
      go.set()
  assert ended


def test_one_part_alone_is_computed_where_it_is_called():
  only = _Rows()
  with workers.Workers([only]) as cut:
    got = cut.step(free=_one, forks=_forks((3, 1)))
  assert _drawn(got) == [(3, 1)]
  assert only.turns[0]["thread"] is threading.current_thread()


@pytest.mark.parametrize(
  "cores, count, width, cut",
  [
    (1, 16, 8, 1),
    (2, 16, 1, 2),
    (4, 16, 1, 2),  # no less than eight slots each
    (8, 2, 16, 2),  # whole rows
    (4, 15, 4, 3),  # evenly
    (4, 3, 2, 1),
  ],
)
def test_each_core_takes_rows_of_its_own(
  one_device, monkeypatch, cores, count, width, cut
):
  monkeypatch.setattr(workers, "cores", lambda: cores)
  with jax.set_mesh(one_device):
    assert workers.count(count, width) == cut


def test_a_mesh_is_not_cut(monkeypatch):
  monkeypatch.setattr(workers, "cores", lambda: 4)
  many = mesh.create({"data": 2, "fsdp": 2, "tensor": 2})
  with jax.set_mesh(many):
    assert workers.count(16, 8) == 1
