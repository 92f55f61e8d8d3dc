"""Divides the prompt slots among workers, each with a thread of its own.

Waking a core for its share of one small matmul costs more than the matmul:
decoding a small model was no faster on two CPU cores than on one. Instead each
core runs whole decode steps on its own prompt slots. This changes no sample's
numbers, because `small_batch_matmul` computes a token the same way whatever is
beside it.

With n workers, prompt slot p is prompt slot p // n of worker p % n.
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
  """A context manager; leaving it waits for the steps that are running."""

  def __init__(self, workers: Sequence[prompt_slots_lib.PromptSlots]):
    """Takes over workers with empty slots, equally many in each."""
    self._workers = workers
    self.num_prompt_slots = len(workers) * workers[0].num_prompt_slots
    self.slots_per_prompt = workers[0].slots_per_prompt
    self._idle = set(range(len(workers)))
    self._running: dict[concurrent.futures.Future, int] = {}
    # A single worker needs no thread.
    self._executor = (
      concurrent.futures.ThreadPoolExecutor(len(workers))
      if len(workers) > 1
      else _InlineExecutor()
    )

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *_: object) -> None:
    self._executor.shutdown()

  def step(
    self,
    *,
    stop_after: Callable[[int], int],
    kept: Sequence[tuple[int, int, np.ndarray]] = (),
    contexts: Sequence[tuple[int, str, np.ndarray]] = (),
    finished: Sequence[int] = (),
    forks: Sequence[prompt_slots_lib.Fork] = (),
  ) -> list[prompt_slots_lib.Piece]:
    """Starts a step of every idle worker; waits until at least one is done.

    An idle worker without a live slot and without a fork takes no step. Pass
    `kept`, `contexts` and `forks` only for prompt slots of idle workers that
    take a step. A worker is idle from when its pieces are returned.

    Args:
      stop_after: for a number of live slots (or prompt slots), how many of
        them must end for the step to return early; see `PromptSlots.decode`.
      kept: see `PromptSlots.extend_prefix`.
      contexts: see `PromptSlots.prefill`.
      finished: see `PromptSlots.retire`; pass all of them at every call,
        because those of workers that take no step are ignored.
      forks: see `PromptSlots.fork`.

    Returns:
      What the workers sampled whose steps are done.

    Raises:
      ValueError: no slot is live, or something is passed for a prompt slot
        whose worker is running or has no live slot.
      FloatingPointError: logits that are not finite.
    """
    n = len(self._workers)
    forked = {fork.prompt_slot % n for fork in forks}
    starting = {
      w for w in self._idle if w in forked or self._workers[w].num_live()
    }
    passed = [prompt_slot for prompt_slot, *_ in (*kept, *contexts)]
    passed += [fork.prompt_slot for fork in forks]
    wrong = sorted({p for p in passed if p % n not in starting})
    if wrong:
      raise ValueError(
        f"Prompt slots {wrong} cannot change: their workers are running, or "
        "have no live slot. Wait for one of their pieces, and fork a sample."
      )
    for worker in sorted(starting):
      future = self._executor.submit(
        _run_step,
        self._workers[worker],
        stop_after=stop_after,
        kept=[(p // n, slot, t) for p, slot, t in kept if p % n == worker],
        contexts=[
          (p // n, name, t) for p, name, t in contexts if p % n == worker
        ],
        finished=[p // n for p in finished if p % n == worker],
        forks=[
          dataclasses.replace(fork, prompt_slot=fork.prompt_slot // n)
          for fork in forks
          if fork.prompt_slot % n == worker
        ],
      )
      self._running[future] = worker
    self._idle -= starting
    if not self._running:
      raise ValueError("No slot is live; fork a sample first.")
    with clock.waiting():
      done, _ = concurrent.futures.wait(
        self._running, return_when=concurrent.futures.FIRST_COMPLETED
      )
    completed = sorted((self._running.pop(future), future) for future in done)
    self._idle.update(worker for worker, _ in completed)
    return [
      dataclasses.replace(piece, prompt_slot=piece.prompt_slot * n + worker)
      for worker, future in completed
      for piece in future.result()
    ]

  def prefill_batch_size(self, P: int) -> int:
    """How many contexts of a bucket a worker prefills at once."""
    return self._workers[0].prefill_batch_size(P)


def num_workers(prompt_slots: int, slots: int) -> int:
  """How many workers divide the prompt slots evenly, on the mesh in force.

  At most one per core, and each has at least a matmul block of slots. An
  accelerator or a mesh of several devices has one worker.

  Args:
    prompt_slots: in all.
    slots: of each prompt slot.
  """
  if not prompt_slots_lib.compacts_active_slots():
    return 1
  blocks = prompt_slots * slots // small_batch_matmul.BLOCK_TOKENS
  most = max(1, min(num_cores(), prompt_slots, blocks))
  return max(n for n in range(1, most + 1) if prompt_slots % n == 0)


def num_cores() -> int:
  """CPU cores that this process may use."""
  affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def _run_step(
  worker: prompt_slots_lib.PromptSlots,
  *,
  stop_after: Callable[[int], int],
  kept: Sequence[tuple[int, int, np.ndarray]],
  contexts: Sequence[tuple[int, str, np.ndarray]],
  finished: Sequence[int],
  forks: Sequence[prompt_slots_lib.Fork],
) -> list[prompt_slots_lib.Piece]:
  worker.extend_prefix(kept)
  worker.prefill(contexts)
  worker.retire(finished)
  worker.fork(forks)
  return worker.decode(stop_after(worker.num_live()))


class _InlineExecutor(concurrent.futures.Executor):
  """Runs what is submitted at once, in the calling thread."""

  def submit(
    self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any
  ) -> concurrent.futures.Future:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_result(function(*arguments, **keywords))
    return future
