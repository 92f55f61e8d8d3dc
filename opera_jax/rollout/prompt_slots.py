"""Drives prompt slots from the host: prefill, fork, decode, extend the prefix.

A prompt slot starts with a context, which is prefilled once. Samples fork from
the end of the context, each in a slot of its own. The tokens of a sample can be
appended to the context without being recomputed. The caller decides what runs
in which slot; every process of a run makes the same calls.

Shape key: B prompt slots, S slots of each, R contexts prefilled at once, P
their padded length.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.kernels import target
from opera_jax.models import decode_model
from opera_jax.rollout import decode_loop as decode_loop_lib
from opera_jax.rollout import sampling as sampling_lib
from opera_jax.rollout import slots as slots_lib
from opera_jax.scoring import packing as packing_lib
from opera_jax.sharding import layout, rules
from opera_jax.text import automaton

FINISH_REASONS = {
  0: "length",
  slots_lib.STOPPED: "stop",
  slots_lib.LOOPED: "loop",
}
NO_EARLY_RETURN = 2**31 - 1  # a `stop_after` that is never reached
# Fewer prompt slots or active slots than these get no program of their own.
MIN_PROMPT_SLOTS = 16
MIN_ACTIVE_SLOTS = 8
SHRINK_FACTOR = 4  # between two numbers of prompt slots that get one


@dataclasses.dataclass(frozen=True)
class Fork:
  """A sample to start at the end of its prompt slot's context."""

  prompt_slot: int
  slot: int
  key: np.ndarray  # [words] uint32, random key data
  budget: int  # most tokens to sample, at least 1
  state: int = 0  # where the stop strings' automaton starts


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one slot sampled in one decode call."""

  prompt_slot: int
  slot: int
  tokens: np.ndarray  # [n] int32
  logprob: np.ndarray  # [n] float32, at the sampling temperature
  # [n] float32, at temperature 1; None if not requested
  model_logprob: np.ndarray | None
  live: bool  # the sample continues in the next call
  ended: int  # a key of FINISH_REASONS
  # [n] float32, under the truncated distribution; None without one
  truncated: np.ndarray | None = None


class PromptSlots:
  """B prompt slots of S slots, with one policy and one way to sample."""

  def __init__(
    self,
    programs: dict[str, Any],
    params: Any,
    layers: list[decode_model.Layer] | None,
    slots: slots_lib.Slots,
    settings: sampling_lib.Sampling,
    stops: automaton.Automaton | None,
    *,
    mesh: jax.sharding.Mesh,
    prompt_buckets: Sequence[int],
    prefix_buckets: Sequence[int],
    cache_buckets: Sequence[int],
    steps: int,
    per_prompt_slot: bool = False,
    with_model_logprob: bool = False,
  ):
    """Takes over empty slots, whose buffers it donates to the programs.

    Args:
      programs: of `rollout.decode_loop`.
      params: parameters, in the ROLLOUT layout.
      layers: from the program `unstack_layers`; None if the slots' caches
        have stacked layers.
      slots: without prompts and samples.
      settings: how to sample; each fork has its own `budget` of tokens.
      stops: automaton of stop strings, or None.
      mesh: over which the slots are sharded.
      prompt_buckets: padded lengths of contexts, ascending; beyond the last,
        its multiples.
      prefix_buckets: lengths of the prefix cache, whole attention blocks,
        likewise.
      cache_buckets: lengths of the slots' caches, whole attention blocks,
        likewise.
      steps: most tokens that a slot samples in one call.
      per_prompt_slot: `decode` returns early for finished prompt slots, not
        for finished slots.
      with_model_logprob: pieces have log-probabilities at temperature 1.
    """
    self._programs, self._params, self._slots = programs, params, slots
    self._layers, self._stops, self._mesh = layers, stops, mesh
    self._prompt_buckets, self._cache_buckets = prompt_buckets, cache_buckets
    self._prefix_buckets = prefix_buckets
    self._num_data_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    self._steps, self._per_prompt_slot = steps, per_prompt_slot
    self._static: dict[str, Any] = {
      "settings": settings,
      "steps": steps,
      "per_prompt_slot": per_prompt_slot,
      "with_model_logprob": with_model_logprob,
    }
    shape = slots.num_generated.shape
    self.num_prompt_slots, self.slots_per_prompt = shape
    self._num_generated = np.zeros(shape, int)
    self._budget = np.zeros(shape, int)
    self._live = np.zeros(shape, bool)
    self._context_length = np.ones(shape[0], int)
    self._last_token = np.zeros(shape[0], np.int32)  # of each context
    self._name = [""] * shape[0]
    # On one CPU, finished prompt slots are evicted from the device's arrays.
    with jax.set_mesh(mesh):
      self._compacts = compacts_active_slots()
    self._resident = np.arange(shape[0])  # the prompt slot at each index
    self._index = np.arange(shape[0])  # the index of each prompt slot
    self._finished: set[int] = set()

  def prefill(self, contexts: Sequence[tuple[int, str, np.ndarray]]) -> None:
    """Computes contexts, in batches of one padded length.

    Args:
      contexts: (prompt slot, name, int32 tokens), at least one token; no slot
        of the prompt slot is live. The name is for error messages.
    """
    by_bucket: dict[int, list[tuple[int, np.ndarray]]] = {}
    for prompt_slot, name, tokens in contexts:
      P = packing_lib.bucket(len(tokens), self._prompt_buckets)
      by_bucket.setdefault(P, []).append((prompt_slot, tokens))
      self._context_length[prompt_slot] = len(tokens)
      self._last_token[prompt_slot] = tokens[-1]
      self._name[prompt_slot] = name
    for P, pairs in sorted(by_bucket.items()):
      self._grow_prefix(P)
      R = self.prefill_batch_size(P)
      for start in range(0, len(pairs), R):
        self._prefill_batch(pairs[start : start + R], R, P)

  def prefill_batch_size(self, P: int) -> int:
    """How many contexts of a bucket are prefilled at once.

    The number depends on the bucket alone: a prompt's numbers must not depend
    on the prompts that are prefilled with it.
    """
    with jax.set_mesh(self._mesh):
      return self._num_data_shards * decode_loop_lib.prefill_batch_size(P)

  def retire(self, prompt_slots: Sequence[int]) -> None:
    """Evicts prompt slots that get no further sample, where that saves work."""
    self._finished.update(prompt_slots)
    if not self._compacts:
      return
    unfinished = [p for p in self._resident if p not in self._finished]
    counts = prompt_slot_counts(self.num_prompt_slots)
    size = min(n for n in counts if n >= len(unfinished))
    if size < len(self._resident):
      finished = [p for p in self._resident if p in self._finished]
      resident = np.asarray((unfinished + finished)[:size])
      self._slots = self._call(
        "gather", self._slots, self._index[resident].astype(np.int32)
      )
      self._resident = resident
      self._index[resident] = np.arange(size)

  def fork(self, forks: Sequence[Fork]) -> None:
    """Starts samples in slots that are not live."""
    if not forks:
      return
    shape = (self.num_prompt_slots, self.slots_per_prompt)
    starts_BS = np.zeros(shape, bool)
    token_BS, state_BS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    key_BS = np.zeros((*shape, *forks[0].key.shape), forks[0].key.dtype)
    for fork in forks:
      where = fork.prompt_slot, fork.slot
      starts_BS[where] = self._live[where] = True
      token_BS[where] = self._last_token[fork.prompt_slot]
      state_BS[where] = fork.state
      key_BS[where] = fork.key
      self._num_generated[where], self._budget[where] = 0, fork.budget
    arrays = starts_BS, token_BS, self._budget.astype(np.int32), state_BS
    starts_BS, token_BS, budget_BS, state_BS = layout.to_devices(
      [x[self._resident] for x in arrays], layout.batch_sharding(self._mesh)
    )
    # Without the caches one program serves all their sizes.
    slots = self._slots
    started = self._call(
      "start_samples",
      slots.replace(prefix=None, cache=None),
      starts_BS=starts_BS,
      token_BS=token_BS,
      budget_BS=budget_BS,
      key_BS=self._replicate(key_BS[self._resident]),
      state_BS=state_BS,
    )
    self._slots = started.replace(prefix=slots.prefix, cache=slots.cache)

  def decode(self, stop_after: int) -> list[Piece]:
    """Samples up to `steps` tokens in every live slot.

    Args:
      stop_after: returns early once so many slots (or prompt slots) have
        ended.

    Returns:
      A piece for each slot that was live, in order.

    Raises:
      FloatingPointError: logits that are not finite.
    """
    need = int(self._num_generated[self._live].max()) + self._steps
    need = min(need, int(self._budget[self._live].max()))
    if need > self._slots.cache.capacity:
      slots = self._slots
      grown = self._call(
        "grow",
        slots.replace(prefix=None),
        capacity=packing_lib.bucket(need, self._cache_buckets),
      )
      self._slots = grown.replace(prefix=slots.prefix)
    self._slots, sampled = self._call(
      "decode",
      self._params,
      self._slots,
      stops=self._stops,
      stop_after=np.int32(stop_after),
      layers=self._layers,
      slot_M=self._active_slots(),
      **self._static,
    )
    sampled = layout.to_host(sampled)
    self._num_generated[self._resident] += sampled.count
    pieces = [
      self._piece(sampled, int(prompt_slot), int(slot))
      for prompt_slot, slot in zip(*np.nonzero(self._live))
    ]
    self._live[self._resident] = sampled.live
    return pieces

  def num_live(self) -> int:
    """How many slots (or prompt slots) are live."""
    live = self._live.any(1) if self._per_prompt_slot else self._live
    return int(live.sum())

  def extend_prefix(self, kept: Sequence[tuple[int, int, np.ndarray]]) -> None:
    """Appends the tokens of samples to their prompt slots' contexts.

    Args:
      kept: (prompt slot, slot, the first tokens that the slot sampled), at most
        one per prompt slot, at least one token each; no slot of the prompt slot
        is live.
    """
    if not kept:
      return
    slot_B = np.zeros(self.num_prompt_slots, np.int32)
    count_B = np.zeros(self.num_prompt_slots, np.int32)
    for prompt_slot, slot, tokens in kept:
      slot_B[prompt_slot], count_B[prompt_slot] = slot, len(tokens)
      self._context_length[prompt_slot] += len(tokens)
      self._last_token[prompt_slot] = tokens[-1]
    slot_B, count_B = slot_B[self._resident], count_B[self._resident]
    self._grow_prefix(int(self._context_length.max()) - 1)
    self._slots = self._call(
      "extend_prefix",
      self._slots,
      *self._replicate((slot_B, count_B)),
      tokens=packing_lib.bucket(int(count_B.max()), self._cache_buckets),
    )

  def _call(self, program: str, *arguments: Any, **keywords: Any) -> Any:
    with jax.set_mesh(self._mesh):
      return self._programs[program](*arguments, **keywords)

  def _prefill_batch(
    self, pairs: Sequence[tuple[int, np.ndarray]], R: int, P: int
  ) -> None:
    """Prefills at most R (prompt slot, context) pairs, padded to [R, P]."""
    token_RP = np.zeros((R, P), np.int32)
    length_R = np.ones(R, np.int32)
    prompt_slot_R = np.full(R, len(self._resident), np.int32)
    for i, (prompt_slot, tokens) in enumerate(pairs):
      token_RP[i, : len(tokens)] = tokens
      length_R[i] = len(tokens)
      prompt_slot_R[i] = self._index[prompt_slot]
    token_RP, length_R = layout.to_devices(
      (token_RP, length_R), layout.batch_sharding(self._mesh)
    )
    prefix, prefix_length = self._call(
      "prefill",
      self._params,
      self._slots.prefix,
      self._slots.prefix_length,
      token_RP=token_RP,
      length_R=length_R,
      prompt_slot_R=self._replicate(prompt_slot_R),
    )
    self._slots = self._slots.replace(
      prefix=prefix, prefix_length=prefix_length
    )

  def _piece(self, sampled: Any, prompt_slot: int, slot: int) -> Piece:
    """One slot's share of a `SampledTokens` on the host, checked for NaN."""
    index = self._index[prompt_slot]
    own = (index, slot, slice(0, int(sampled.count[index, slot])))

    def share(x: np.ndarray | None) -> np.ndarray | None:
      return None if x is None else x[own]

    logprob = sampled.logprob[own]
    if not np.isfinite(logprob).all():
      raise FloatingPointError(
        f"Sampling prompt {self._name[prompt_slot]!r} met logits that are not "
        "finite. The parameters have diverged; lower the learning rate "
        "or resume from an earlier checkpoint."
      )
    return Piece(
      prompt_slot=prompt_slot,
      slot=slot,
      tokens=sampled.token[own],
      logprob=logprob,
      model_logprob=share(sampled.model_logprob),
      truncated=share(sampled.truncated),
      live=bool(sampled.live[index, slot]),
      ended=int(sampled.ended[index, slot]),
    )

  def _active_slots(self) -> np.ndarray | None:
    """The slots to compute, padded to one of a few sizes; None means all."""
    if not self._compacts:
      return None
    live = np.flatnonzero(self._live[self._resident])
    counts = active_slot_counts(len(self._resident), self.slots_per_prompt)
    size = min(n for n in counts if n >= len(live))
    if size == counts[-1]:
      return None
    slot_M = np.full(size, counts[-1], np.int32)
    slot_M[: len(live)] = live
    return slot_M

  def _grow_prefix(self, tokens: int) -> None:
    """Pads the prefix cache if it holds fewer tokens."""
    if tokens > self._slots.prefix.length:
      slots = self._slots
      grown = self._call(
        "grow_prefix",
        slots.replace(cache=None),
        capacity=packing_lib.bucket(tokens, self._prefix_buckets),
      )
      self._slots = grown.replace(cache=slots.cache)

  def _replicate(self, arrays: Any) -> Any:
    return layout.to_devices(arrays, layout.replicated(self._mesh))


def compacts_active_slots() -> bool:
  """Whether only live slots are computed: on one CPU device.

  On an accelerator decoding is bandwidth-bound: the weights are read once,
  however many slots are computed. On a mesh of several devices, slots stay on
  the device that holds their prompt slot.
  """
  return target.platform() == "cpu" and rules.is_single_device()


def prompt_slot_counts(prompt_slots: int) -> list[int]:
  """Numbers of resident prompt slots that get a program, descending."""
  counts = [prompt_slots]
  while (
    counts[-1] % SHRINK_FACTOR == 0
    and counts[-1] // SHRINK_FACTOR >= MIN_PROMPT_SLOTS
  ):
    counts.append(counts[-1] // SHRINK_FACTOR)
  return counts


def active_slot_counts(prompt_slots: int, slots: int) -> list[int]:
  """Numbers of active slots that get a program, ascending.

  Each number is half of the next, up to all slots. The list ends where a
  further program would save little.

  Args:
    prompt_slots: B.
    slots: S.
  """
  counts = [prompt_slots * slots]
  while counts[0] % 2 == 0 and counts[0] // 2 >= MIN_ACTIVE_SLOTS:
    counts.insert(0, counts[0] // 2)
  return counts


def joined(pieces: Sequence[Piece]) -> structs.Sample:
  """Concatenates what a slot sampled in several calls."""
  ended = pieces[-1].ended
  truncated = None
  if pieces[-1].truncated is not None:
    truncated = np.concatenate([piece.truncated for piece in pieces])
  return structs.Sample(
    tokens=np.concatenate([piece.tokens for piece in pieces]),
    logprob=np.concatenate([piece.logprob for piece in pieces]),
    finished=ended == slots_lib.STOPPED,
    reason=FINISH_REASONS[ended],
    truncated_logprob=truncated,
  )
