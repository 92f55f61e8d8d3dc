"""Parts of the rows, computed at the same time, each in a thread.

A core that is woken for a share of one small product comes too late for it:
decoding a small model was no faster on two CPU cores than on one. Each core
takes rows of its own instead, with turns of its own. No sample's numbers change
by it, since `products.few` computes a token alike whatever stands beside it.

Row r of all is row r // n of part r % n, of n parts.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np

from opera_jax.models import products
from opera_jax.rollout import rows as rows_lib


class Parts:
  """A context manager; leaving it waits for the turns under way."""

  def __init__(self, parts: Sequence[rows_lib.Rows]):
    """Takes rows over of which nothing has begun, as many in every part."""
    self._parts = parts
    self.count, self.width = len(parts) * parts[0].count, parts[0].width
    self._resting = set(range(len(parts)))
    self._running: dict[concurrent.futures.Future, int] = {}
    # One part alone needs no thread.
    self._pool = (
      concurrent.futures.ThreadPoolExecutor(len(parts))
      if len(parts) > 1
      else _Here()
    )

  def __enter__(self) -> "Parts":
    return self

  def __exit__(self, *_) -> None:
    self._pool.shutdown()

  def advance(
    self,
    *,
    free: Callable[[int], int],
    kept: Sequence[tuple[int, int, np.ndarray]] = (),
    contexts: Sequence[tuple[int, str, np.ndarray]] = (),
    through: Sequence[int] = (),
    forks: Sequence[rows_lib.Fork] = (),
  ) -> list[rows_lib.Piece]:
    """Gives every part that rests its turn, and waits for one part or more.

    A part without a live slot takes no turn. What is given is of rows of parts
    that take one: a row's part rests from its piece on.

    Args:
      free: of so many live slots (or rows), how many that end are worth the
        end of a turn; see `Rows.draw`.
      kept: see `Rows.keep`.
      contexts: see `Rows.begin`.
      through: see `Rows.retire`; all such rows, at every call, since those of
        parts that take no turn are passed over.
      forks: see `Rows.fork`.

    Returns:
      What the parts that are back drew; they rest now.

    Raises:
      ValueError: no slot is live, or something is given of a row whose part is
        under way or has no live slot.
      FloatingPointError: logits that are not finite.
    """
    n = len(self._parts)
    forked = {fork.row % n for fork in forks}
    turns = {p for p in self._resting if p in forked or self._parts[p].live()}
    given = [row for row, *_ in (*kept, *contexts)] + [f.row for f in forks]
    lost = sorted({row for row in given if row % n not in turns})
    if lost:
      raise ValueError(
        f"Rows {lost} cannot change: their parts are under way, or have no "
        "live slot. Wait for a piece of theirs, and fork a sample."
      )
    for part in sorted(turns):
      mine = [
        dataclasses.replace(fork, row=fork.row // n)
        for fork in forks
        if fork.row % n == part
      ]
      turn = self._pool.submit(
        _turn,
        self._parts[part],
        free,
        [(row // n, *rest) for row, *rest in kept if row % n == part],
        [(row // n, *rest) for row, *rest in contexts if row % n == part],
        [row // n for row in through if row % n == part],
        mine,
      )
      self._running[turn] = part
    self._resting -= turns
    if not self._running:
      raise ValueError("No slot is live; fork a sample first.")
    done, _ = concurrent.futures.wait(
      self._running, return_when=concurrent.futures.FIRST_COMPLETED
    )
    back = sorted((self._running.pop(turn), turn) for turn in done)
    self._resting.update(part for part, _ in back)
    return [
      dataclasses.replace(piece, row=piece.row * n + part)
      for part, turn in back
      for piece in turn.result()
    ]

  def together(self, P: int) -> int:
    """How many contexts of a bucket a part computes at once."""
    return self._parts[0].together(P)


def count(rows: int, width: int) -> int:
  """Into how many parts the rows are cut, evenly, on the mesh in force."""
  if not rows_lib.packs():
    return 1
  most = min(cores(), rows, rows * width // products.ABREAST)
  return max(n for n in range(1, max(1, most) + 1) if rows % n == 0)


def cores() -> int:
  """CPU cores that this process may use."""
  affinity = getattr(os, "sched_getaffinity", None)  # which Linux has
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def _turn(rows, free, kept, contexts, through, forks) -> list[rows_lib.Piece]:
  rows.keep(kept)
  rows.begin(contexts)
  rows.retire(through)
  rows.fork(forks)
  return rows.draw(free(rows.live()))


class _Here(concurrent.futures.Executor):
  """Runs at once what it is given, in the calling thread."""

  def submit(self, function, /, *arguments):
    future = concurrent.futures.Future()
    future.set_result(function(*arguments))
    return future
