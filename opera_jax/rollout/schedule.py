"""Which sample sits in which slot: the host's side of continuous batching.

Prompts wait in order. A row takes the next prompt when its slots are empty and
its own prompt has no sample left to begin; a free slot takes the next sample
of its row's prompt. Host only; every process of a run does the same.

Shape key: B rows, S slots a row.
"""

import collections
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class _Row:
  prompt: int = -1  # none yet
  waiting: int = 0  # samples of the prompt not begun
  begun: int = 0
  slots: list[int | None] = dataclasses.field(default_factory=list)


class Schedule:
  """Slots by row; a sample is named (prompt, sample)."""

  def __init__(
    self,
    rows: int,
    slots: int,
    prompts: Sequence[int],
    samples: int,
  ):
    """Nothing sits anywhere yet.

    Args:
      rows: B.
      slots: S.
      prompts: indices of the prompts, in the order they are to begin.
      samples: of each prompt.
    """
    self._queue = collections.deque(prompts)
    self._samples = samples
    self._rows = [_Row(slots=[None] * slots) for _ in range(rows)]

  def admit(self) -> list[tuple[int, int]]:
    """Gives waiting prompts to rows that are through; (row, prompt) pairs."""
    admitted = []
    for index, row in enumerate(self._rows):
      through = not row.waiting and all(s is None for s in row.slots)
      if through and self._queue:
        row.prompt, row.begun = self._queue.popleft(), 0
        row.waiting = self._samples
        admitted.append((index, row.prompt))
    return admitted

  def assign(self) -> list[tuple[int, int, int, int]]:
    """Fills free slots; (row, slot, prompt, sample) of each new sample."""
    assigned = []
    for index, row in enumerate(self._rows):
      for slot, taken in enumerate(row.slots):
        if taken is None and row.waiting:
          row.slots[slot] = row.begun
          assigned.append((index, slot, row.prompt, row.begun))
          row.begun += 1
          row.waiting -= 1
    return assigned

  def sitting(self) -> list[tuple[int, int, int, int]]:
    """(row, slot, prompt, sample) of every sample under way."""
    return [
      (index, slot, row.prompt, sample)
      for index, row in enumerate(self._rows)
      for slot, sample in enumerate(row.slots)
      if sample is not None
    ]

  def idle(self) -> list[int]:
    """Rows that have nothing to do any more."""
    if self._queue:
      return []
    return [
      index
      for index, row in enumerate(self._rows)
      if not row.waiting and all(s is None for s in row.slots)
    ]

  def release(self, row: int, slot: int) -> None:
    """Frees a slot whose sample has ended."""
    self._rows[row].slots[slot] = None

  def waiting(self) -> bool:
    """Whether some sample has not begun."""
    return bool(self._queue) or any(row.waiting for row in self._rows)
