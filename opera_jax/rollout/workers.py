"""Workers of the rows, computed at the same time, each in a thread.

A core that is woken for a share of one small product comes too late for it:
decoding a small model was no faster on two CPU cores than on one. Each core
takes rows of its own instead, with turns of its own. No sample's numbers change
by it, since `small_batch_matmul.few` computes a token alike whatever stands
beside it.

Row r of all is row r // n of worker r % n, of n workers.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opera_jax.models import small_batch_matmul
from opera_jax.rollout import prompt_slots as prompt_slots_lib
from opera_jax.sharding import clock


class Workers:
  """A context manager; leaving it waits for the turns under way."""

  def __init__(self, workers: Sequence[prompt_slots_lib.PromptSlots]):
    """Takes rows over of which nothing has begun, as many in every worker."""
    self._workers = workers
    self.count, self.width = len(workers) * workers[0].count, workers[0].width
    self._resting = set(range(len(workers)))
    self._running: dict[concurrent.futures.Future, int] = {}
    # One worker alone needs no thread.
    self._pool = (
      concurrent.futures.ThreadPoolExecutor(len(workers))
      if len(workers) > 1
      else _Here()
    )

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *_) -> None:
    self._pool.shutdown()

  def step(
    self,
    *,
    free: Callable[[int], int],
    kept: Sequence[tuple[int, int, np.ndarray]] = (),
    contexts: Sequence[tuple[int, str, np.ndarray]] = (),
    finished: Sequence[int] = (),
    forks: Sequence[prompt_slots_lib.Fork] = (),
  ) -> list[prompt_slots_lib.Piece]:
    """Gives every worker that rests its turn, and waits for one worker or more.

    A worker without a live slot takes no turn. What is given is of rows of
    workers
    that take one: a row's worker rests from its piece on.

    Args:
      free: of so many live slots (or rows), how many that end are worth the
        end of a turn; see `PromptSlots.draw`.
      kept: see `PromptSlots.keep`.
      contexts: see `PromptSlots.begin`.
      finished: see `PromptSlots.retire`; all such rows, at every call, since
        those of workers that take no turn are passed over.
      forks: see `PromptSlots.fork`.

    Returns:
      What the workers that are back drew; they rest now.

    Raises:
      ValueError: no slot is live, or something is given of a row whose worker
        is under way or has no live slot.
      FloatingPointError: logits that are not finite.
    """
    n = len(self._workers)
    forked = {fork.row % n for fork in forks}
    calls = {p for p in self._resting if p in forked or self._workers[p].live()}
    given = [row for row, *_ in (*kept, *contexts)] + [f.row for f in forks]
    lost = sorted({row for row in given if row % n not in calls})
    if lost:
      raise ValueError(
        f"Rows {lost} cannot change: their workers are under way, or have no "
        "live slot. Wait for a piece of theirs, and fork a sample."
      )
    for worker in sorted(calls):
      mine = [
        dataclasses.replace(fork, row=fork.row // n)
        for fork in forks
        if fork.row % n == worker
      ]
      call = self._pool.submit(
        _turn,
        self._workers[worker],
        free,
        [(row // n, *rest) for row, *rest in kept if row % n == worker],
        [(row // n, *rest) for row, *rest in contexts if row % n == worker],
        [row // n for row in finished if row % n == worker],
        mine,
      )
      self._running[call] = worker
    self._resting -= calls
    if not self._running:
      raise ValueError("No slot is live; fork a sample first.")
    with clock.waiting():
      done, _ = concurrent.futures.wait(
        self._running, return_when=concurrent.futures.FIRST_COMPLETED
      )
    back = sorted((self._running.pop(call), call) for call in done)
    self._resting.update(worker for worker, _ in back)
    return [
      dataclasses.replace(piece, row=piece.row * n + worker)
      for worker, call in back
      for piece in call.result()
    ]

  def together(self, P: int) -> int:
    """How many contexts of a bucket a worker computes at once."""
    return self._workers[0].together(P)


def count(rows: int, width: int) -> int:
  """Into how many workers the rows are cut, evenly, on the mesh in force."""
  if not prompt_slots_lib.packs():
    return 1
  most = min(cores(), rows, rows * width // small_batch_matmul.BLOCK_TOKENS)
  return max(n for n in range(1, max(1, most) + 1) if rows % n == 0)


def cores() -> int:
  """CPU cores that this process may use."""
  affinity = getattr(os, "sched_getaffinity", None)  # which Linux has
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def _turn(
  rows, free, kept, contexts, finished, forks
) -> list[prompt_slots_lib.Piece]:
  rows.keep(kept)
  rows.begin(contexts)
  rows.retire(finished)
  rows.fork(forks)
  return rows.draw(free(rows.live()))


class _Here(concurrent.futures.Executor):
  """Runs at once what it is given, in the calling thread."""

  def submit(self, function, /, *arguments, **keywords):
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result(function(*arguments, **keywords))
    return future
