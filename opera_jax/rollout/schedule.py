"""Continuous batching on the host: which sample runs in which slot.

Prompts wait in a queue. A prompt slot takes the next prompt once its slots are
free and all samples of its own prompt have started; a free slot takes the next
sample of its prompt. Every process of a run keeps the same schedule.

Shape key: B prompt slots, S slots of each.
"""

import collections
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class _PromptSlot:
  prompt: int = -1  # -1 before the first one
  waiting: int = 0  # samples of the prompt that have not started
  started: int = 0
  slots: list[int | None] = dataclasses.field(default_factory=list)

  def finished(self) -> bool:
    """Whether every sample of the prompt has ended."""
    return not self.waiting and all(s is None for s in self.slots)


class Schedule:
  """Assigns (prompt, sample) pairs to slots."""

  def __init__(
    self,
    prompt_slots: int,
    slots: int,
    prompts: Sequence[int],
    samples: int,
  ):
    """Starts with all slots free.

    Args:
      prompt_slots: B.
      slots: S.
      prompts: indices of the prompts, in the order in which they start.
      samples: of each prompt.
    """
    self._queue = collections.deque(prompts)
    self._samples = samples
    self._prompt_slots = [
      _PromptSlot(slots=[None] * slots) for _ in range(prompt_slots)
    ]

  def admit(self) -> list[tuple[int, int]]:
    """Moves waiting prompts to finished prompt slots.

    Returns:
      (prompt slot, prompt) of each prompt admitted.
    """
    admitted = []
    for index, prompt_slot in enumerate(self._prompt_slots):
      if self._queue and prompt_slot.finished():
        prompt_slot.prompt, prompt_slot.started = self._queue.popleft(), 0
        prompt_slot.waiting = self._samples
        admitted.append((index, prompt_slot.prompt))
    return admitted

  def assign(self) -> list[tuple[int, int, int, int]]:
    """Fills free slots with waiting samples.

    Returns:
      (prompt slot, slot, prompt, sample) of each sample that starts.
    """
    assigned = []
    for index, prompt_slot in enumerate(self._prompt_slots):
      for slot, taken in enumerate(prompt_slot.slots):
        if taken is None and prompt_slot.waiting:
          sample = prompt_slot.started
          prompt_slot.slots[slot] = sample
          assigned.append((index, slot, prompt_slot.prompt, sample))
          prompt_slot.started += 1
          prompt_slot.waiting -= 1
    return assigned

  def running(self) -> list[tuple[int, int, int, int]]:
    """(prompt slot, slot, prompt, sample) of every sample under way."""
    return [
      (index, slot, prompt_slot.prompt, sample)
      for index, prompt_slot in enumerate(self._prompt_slots)
      for slot, sample in enumerate(prompt_slot.slots)
      if sample is not None
    ]

  def idle(self) -> list[int]:
    """Prompt slots that will get no further sample."""
    if self._queue:
      return []
    return [
      index
      for index, prompt_slot in enumerate(self._prompt_slots)
      if prompt_slot.finished()
    ]

  def release(self, prompt_slot: int, slot: int) -> None:
    """Frees the slot of a sample that has ended."""
    self._prompt_slots[prompt_slot].slots[slot] = None

  def waiting(self) -> bool:
    """Whether some sample has not started."""
    return bool(self._queue) or any(p.waiting for p in self._prompt_slots)
