"""Workers: who computes what, who waits for whom, what is raised."""

import threading
import time

import jax
import numpy as np
import pytest

from opera_jax.rollout import prompt_slots, workers
from opera_jax.sharding import mesh


class _PromptSlots:
  """Records its steps; every sample has one token and ends."""

  num_prompt_slots, slots_per_prompt = 3, 2

  def __init__(self, on_decode=None):
    self.steps, self._slots, self._on_decode = [], [], on_decode

  def extend_prefix(self, kept):
    self.steps.append({"kept": kept})

  def prefill(self, contexts):
    self.steps[-1]["contexts"] = contexts

  def retire(self, finished):
    self.steps[-1]["finished"] = finished

  def fork(self, forks):
    self.steps[-1]["forks"] = forks
    self._slots = [(fork.prompt_slot, fork.slot) for fork in forks]

  def num_live(self):
    return len(self._slots)

  def decode(self, stop_after):
    self.steps[-1]["stop_after"] = stop_after
    self.steps[-1]["thread"] = threading.current_thread()
    if self._on_decode is not None:
      self._on_decode()
    slots, self._slots = self._slots, []
    one = np.ones(1)
    return [
      prompt_slots.Piece(prompt_slot, slot, one, one, None, live=False, ended=0)
      for prompt_slot, slot in slots
    ]


def _forks(*places):
  return [
    prompt_slots.Fork(prompt_slot, slot, np.zeros(2), budget=1)
    for prompt_slot, slot in places
  ]


def _one(live):
  return 1


def _slots(pieces):
  return sorted((piece.prompt_slot, piece.slot) for piece in pieces)


def test_prompt_slots_are_dealt_to_the_workers():
  both = threading.Barrier(2, timeout=60)
  fakes = [_PromptSlots(both.wait), _PromptSlots(both.wait)]
  tokens = np.arange(3)
  with workers.Workers(fakes) as running:
    places = [(0, 0), (1, 0), (1, 1), (4, 0)]
    pieces = running.step(
      stop_after=lambda live: 10 * live,
      kept=[(1, 0, tokens)],
      contexts=[(1, "one", tokens), (4, "four", tokens)],
      finished=[2, 3, 5],
      forks=_forks(*places),
    )
    while len(pieces) < len(places):
      pieces += running.step(stop_after=_one)
  assert _slots(pieces) == places
  (even,), (odd,) = (fake.steps for fake in fakes)
  assert (even["kept"], odd["kept"]) == ([], [(0, 0, tokens)])
  assert even["contexts"] == [(2, "four", tokens)]
  assert odd["contexts"] == [(0, "one", tokens)]
  assert (even["finished"], odd["finished"]) == ([1], [1, 2])
  assert [(f.prompt_slot, f.slot) for f in even["forks"]] == [(0, 0), (2, 0)]
  assert [(f.prompt_slot, f.slot) for f in odd["forks"]] == [(0, 0), (0, 1)]
  assert even["stop_after"] == odd["stop_after"] == 20
  threads = {even["thread"], odd["thread"]}
  assert len(threads) == 2 and threading.current_thread() not in threads


def test_a_slow_worker_holds_up_no_other():
  go = threading.Event()
  slow, quick = _PromptSlots(lambda: go.wait(20)), _PromptSlots()
  with workers.Workers([slow, quick]) as running:
    pieces = running.step(stop_after=_one, forks=_forks((0, 0), (1, 0)))
    assert _slots(pieces) == [(1, 0)]
    assert _slots(
      running.step(stop_after=_one, forks=_forks((3, 0), (5, 0)))
    ) == [
      (3, 0),
      (5, 0),
    ]
    for lost in (
      {"forks": _forks((0, 1))},
      {"contexts": [(2, "two", np.ones(1))]},
      {"kept": [(1, 0, np.ones(1))]},  # and no fork
    ):
      with pytest.raises(ValueError, match="cannot change"):
        running.step(stop_after=_one, **lost)
    go.set()
    assert _slots(running.step(stop_after=_one)) == [(0, 0)]
  assert (len(slow.steps), len(quick.steps)) == (1, 2)


def test_a_worker_that_was_idle_is_not_forgotten():
  with workers.Workers([_PromptSlots(), _PromptSlots()]) as running:
    for prompt_slot in (0, 1, 0):
      pieces = running.step(stop_after=_one, forks=_forks((prompt_slot, 0)))
      assert _slots(pieces) == [(prompt_slot, 0)]
    with pytest.raises(ValueError, match="No slot is live"):
      running.step(stop_after=_one)


def test_an_error_is_raised_once_the_other_workers_are_done():
  go, ended = threading.Event(), []

  def finish():
    go.wait(20)
    time.sleep(0.2)  # long past the other's error
    ended.append(True)

  def fail():
    raise FloatingPointError("not finite")

  with (
    pytest.raises(FloatingPointError, match="not finite"),
    workers.Workers([_PromptSlots(finish), _PromptSlots(fail)]) as running,
  ):
    try:
      running.step(stop_after=_one, forks=_forks((0, 0), (1, 0)))
    finally:
      assert not ended
      go.set()
  assert ended


def test_a_single_worker_runs_in_the_calling_thread():
  only = _PromptSlots()
  with workers.Workers([only]) as running:
    pieces = running.step(stop_after=_one, forks=_forks((3, 1)))
  assert _slots(pieces) == [(3, 1)]
  assert only.steps[0]["thread"] is threading.current_thread()


@pytest.mark.parametrize(
  "cores, prompt_slots_, slots, expected",
  [
    (1, 16, 8, 1),
    (2, 16, 1, 2),
    (4, 16, 1, 2),  # no less than eight slots each
    (8, 2, 16, 2),  # whole prompt slots
    (4, 15, 4, 3),  # evenly
    (4, 3, 2, 1),
  ],
)
def test_each_core_gets_prompt_slots_of_its_own(
  one_device, monkeypatch, cores, prompt_slots_, slots, expected
):
  monkeypatch.setattr(workers, "num_cores", lambda: cores)
  with jax.set_mesh(one_device):
    assert workers.num_workers(prompt_slots_, slots) == expected


def test_a_mesh_has_one_worker(monkeypatch):
  monkeypatch.setattr(workers, "num_cores", lambda: 4)
  many = mesh.create({"data": 2, "fsdp": 2, "tensor": 2})
  with jax.set_mesh(many):
    assert workers.num_workers(16, 8) == 1
