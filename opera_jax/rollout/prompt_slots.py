"""Rows of slots as the host drives them: begin, fork, draw, keep.

A row begins with a context, which is computed once (its prefix). Samples fork
from the end of the context, each in a slot; what one of them drew can be kept,
and then is context too, without running anything again. Whoever drives the
rows says what sits where; every process of a run says the same.

Shape key: B rows, S slots a row, R contexts computed at once, P their padded
length.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.kernels import target
from opera_jax.rollout import decode_loop as decode_loop_lib
from opera_jax.rollout import sampling as sampling_lib
from opera_jax.rollout import slots as slots_lib
from opera_jax.scoring import packing as packing_lib
from opera_jax.sharding import layout, rules
from opera_jax.text import automaton

REASONS = {0: "length", slots_lib.STOPPED: "stop", slots_lib.LOOPED: "loop"}
NEVER = 2**31 - 1
MIN_PROMPT_SLOTS, MIN_ACTIVE_SLOTS = (
  16,
  8,
)  # that are worth programs of their own,
SHRINK_FACTOR = 4  # as are so many times fewer rows


@dataclasses.dataclass(frozen=True)
class Fork:
  """A sample to begin at the end of its row's context."""

  row: int
  slot: int
  key: np.ndarray  # [words] uint32, random key data
  budget: int  # tokens that may be drawn, at least 1
  state: int = 0  # of the stop strings' automaton, where it starts


@dataclasses.dataclass(frozen=True)
class Piece:
  """What a slot drew in one call."""

  row: int
  slot: int
  tokens: np.ndarray  # [n] int32
  logprob: np.ndarray  # [n] float32, at the sampling temperature
  model_logprob: np.ndarray | None  # [n] float32, at temperature 1, where asked
  live: bool  # goes on in the next call
  ended: int  # a key of REASONS
  truncated: np.ndarray | None = None  # [n] float32, as drawn, where truncated


class PromptSlots:
  """B rows of S slots, with one policy, one way to draw, one set of stops."""

  def __init__(
    self,
    programs: dict[str, Any],
    params: Any,
    layers: Sequence[Any] | None,
    slots: slots_lib.Slots,
    settings: sampling_lib.Sampling,
    stops: automaton.Automaton | None,
    *,
    mesh: jax.sharding.Mesh,
    prompt_buckets: Sequence[int],
    prefix_buckets: Sequence[int],
    cache_buckets: Sequence[int],
    steps: int,
    whole_rows: bool = False,
    with_model_logprob: bool = False,
  ):
    """Takes fresh slots over.

    Args:
      programs: of `rollout.decode_loop`.
      params: parameters, in the ROLLOUT layout.
      layers: what the program `apart` gave, where the slots' layers are apart.
      slots: with nothing in them.
      settings: how to draw; lengths are the forks' own.
      stops: automaton of stop strings, or None.
      mesh: over which the slots lie.
      prompt_buckets: allowed padded lengths of contexts, ascending; past the
        last, its multiples.
      prefix_buckets: lengths of rows' prefixes, whole blocks, likewise.
      cache_buckets: lengths of slots' caches, whole blocks, likewise.
      steps: tokens that a slot draws in one call.
      whole_rows: a call of `draw` leaves early for rows rather than slots.
      with_model_logprob: pieces come with log-probabilities at temperature 1.
    """
    self._programs, self._params, self._slots = programs, params, slots
    self._layers, self._stops, self._mesh = layers, stops, mesh
    self._prompt_buckets, self._cache_buckets = prompt_buckets, cache_buckets
    self._prefix_buckets = prefix_buckets
    self._ways = mesh.shape["data"] * mesh.shape["fsdp"]
    self._static: dict[str, Any] = {
      "settings": settings,
      "steps": steps,
      "whole_rows": whole_rows,
      "with_model_logprob": with_model_logprob,
    }
    shape = slots.num_generated.shape
    self.count, self.width = shape
    self._num_generated, self._budget = (
      np.zeros(shape, int),
      np.zeros(shape, int),
    )
    self._live = np.zeros(shape, bool)
    self._length = np.ones(shape[0], int)  # tokens of each row's context
    self._last = np.zeros(shape[0], np.int32)  # the last of them
    self._name = [""] * shape[0]
    # One CPU computes live slots alone, and lets rows go that are through.
    with jax.set_mesh(mesh):
      self._packed = packs()
    self._order = np.arange(shape[0])  # the row that lies at each place
    self._place = np.arange(shape[0])  # the place of each row
    self._finished: set[int] = set()

  def begin(self, contexts: Sequence[tuple[int, str, np.ndarray]]) -> None:
    """Computes contexts, a few of like length at a time.

    Args:
      contexts: (row, name, int32 tokens), at least one token; no slot of the
        row is live. The name is for error messages.
    """
    by_bucket: dict[int, list[tuple[int, np.ndarray]]] = {}
    for row, name, tokens in contexts:
      P = packing_lib.bucket(len(tokens), self._prompt_buckets)
      by_bucket.setdefault(P, []).append((row, tokens))
      self._length[row], self._last[row] = len(tokens), tokens[-1]
      self._name[row] = name
    for P, pairs in sorted(by_bucket.items()):
      self._make_room(P)
      R = self.together(P)
      for start in range(0, len(pairs), R):
        self._begin(pairs[start : start + R], R, P)

  def together(self, P: int) -> int:
    """How many contexts of a bucket are computed at once.

    It goes by the bucket alone: what a prompt computes must not depend on who
    came with it.
    """
    with jax.set_mesh(self._mesh):
      return self._ways * decode_loop_lib.prompts_at_once(P)

  def retire(self, rows: Sequence[int]) -> None:
    """Takes note of rows in which nothing will begin or go on any more."""
    self._finished.update(rows)
    if not self._packed:
      return
    going = [row for row in self._order if row not in self._finished]
    size = min(n for n in row_counts(self.count) if n >= len(going))
    if size < len(self._order):
      others = [row for row in self._order if row in self._finished]
      order = np.asarray((going + others)[:size])
      self._slots = self._call(
        "gather", self._slots, self._place[order].astype(np.int32)
      )
      self._order = order
      self._place[order] = np.arange(size)

  def fork(self, forks: Sequence[Fork]) -> None:
    """Begins samples in slots that are not live."""
    if not forks:
      return
    shape = (self.count, self.width)
    fresh_BS = np.zeros(shape, bool)
    token_BS, state_BS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    key_BS = np.zeros((*shape, *forks[0].key.shape), forks[0].key.dtype)
    for fork in forks:
      place = fork.row, fork.slot
      fresh_BS[place] = self._live[place] = True
      token_BS[place], state_BS[place] = self._last[fork.row], fork.state
      key_BS[place] = fork.key
      self._num_generated[place], self._budget[place] = 0, fork.budget
    arrays = fresh_BS, token_BS, self._budget.astype(np.int32), state_BS
    fresh_BS, token_BS, budget_BS, state_BS = layout.to_devices(
      [x[self._order] for x in arrays], layout.rows(self._mesh)
    )
    key_BS = key_BS[self._order]
    # The caches stay out of it, so that one program serves all their sizes.
    slots = self._slots
    rest = self._call(
      "assign",
      slots.replace(prefix=None, cache=None),
      *(fresh_BS, token_BS, budget_BS, self._everywhere(key_BS), state_BS),
    )
    self._slots = rest.replace(prefix=slots.prefix, cache=slots.cache)

  def draw(self, free: int) -> list[Piece]:
    """Draws some tokens in every live slot.

    Args:
      free: how many slots (or rows) that end are worth an early return.

    Returns:
      A piece for each slot that was live, in order.

    Raises:
      FloatingPointError: logits that are not finite.
    """
    need = int(self._num_generated[self._live].max()) + self._static["steps"]
    need = min(need, int(self._budget[self._live].max()))
    if need > self._slots.cache.capacity:
      slots = self._slots
      longer = self._call(
        "grow",
        slots.replace(prefix=None),
        capacity=packing_lib.bucket(need, self._cache_buckets),
      )
      self._slots = longer.replace(prefix=slots.prefix)
    self._slots, drawn = self._call(
      "decode",
      self._params,
      self._slots,
      self._stops,
      np.int32(free),
      self._layers,
      self._lanes(),
      **self._static,
    )
    drawn = layout.to_host(drawn)
    self._num_generated[self._order] += drawn.count
    pieces = []
    for row, slot in zip(*np.nonzero(self._live)):
      place = self._place[row]
      own = (place, slot, slice(0, int(drawn.count[place, slot])))
      piece = Piece(
        row=int(row),
        slot=int(slot),
        tokens=drawn.token[own],
        logprob=drawn.logprob[own],
        model_logprob=None
        if drawn.model_logprob is None
        else drawn.model_logprob[own],
        truncated=None if drawn.truncated is None else drawn.truncated[own],
        live=bool(drawn.live[place, slot]),
        ended=int(drawn.ended[place, slot]),
      )
      if not np.isfinite(piece.logprob).all():
        raise FloatingPointError(
          f"Sampling prompt {self._name[row]!r} met logits that are not "
          "finite. The parameters have diverged; lower the learning rate "
          "or resume from an earlier checkpoint."
        )
      pieces.append(piece)
    self._live[self._order] = drawn.live
    return pieces

  def live(self) -> int:
    """How many slots (or rows) are live."""
    live = self._live.any(1) if self._static["whole_rows"] else self._live
    return int(live.sum())

  def keep(self, kept: Sequence[tuple[int, int, np.ndarray]]) -> None:
    """Makes what slots drew part of their rows' contexts.

    Args:
      kept: (row, slot, the first tokens that the slot drew), one a row at
        most, at least one token each; no slot of the row is live.
    """
    if not kept:
      return
    slot_B, count_B = (np.zeros(self.count, np.int32) for _ in range(2))
    for row, slot, tokens in kept:
      slot_B[row], count_B[row] = slot, len(tokens)
      self._length[row] += len(tokens)
      self._last[row] = tokens[-1]
    slot_B, count_B = slot_B[self._order], count_B[self._order]
    self._make_room(int(self._length.max()) - 1)
    most = packing_lib.bucket(int(count_B.max()), self._cache_buckets)
    self._slots = self._call(
      "keep", self._slots, *self._everywhere((slot_B, count_B)), tokens=most
    )

  def _call(self, program: str, *arguments, **static):
    with jax.set_mesh(self._mesh):
      return self._programs[program](*arguments, **static)

  def _begin(self, pairs, R, P):
    token_RP = np.zeros((R, P), np.int32)
    length_R = np.ones(R, np.int32)
    row_R = np.full(R, len(self._order), np.int32)
    for place, (row, tokens) in enumerate(pairs):
      token_RP[place, : len(tokens)] = tokens
      length_R[place], row_R[place] = len(tokens), self._place[row]
    arrays = layout.to_devices((token_RP, length_R), layout.rows(self._mesh))
    prefix, prefix_length = self._call(
      "admit",
      self._params,
      self._slots.prefix,
      self._slots.prefix_length,
      *arrays,
      self._everywhere(row_R),
    )
    self._slots = self._slots.replace(
      prefix=prefix, prefix_length=prefix_length
    )

  def _lanes(self) -> np.ndarray | None:
    """The slots to compute, a few sizes for all numbers of live ones.

    None is all of them.
    """
    if not self._packed:
      return None
    live = np.flatnonzero(self._live[self._order])
    rows = len(self._order)
    every = rows * self.width
    size = min(
      n for n in active_slot_counts(rows, self.width) if n >= len(live)
    )
    if size == every:
      return None
    active_slots = np.full(size, every, np.int32)
    active_slots[: len(live)] = live
    return active_slots

  def _make_room(self, tokens: int) -> None:
    """Lengthens the prefixes where they do not hold so many tokens."""
    if tokens > self._slots.prefix.length:
      slots = self._slots
      longer = self._call(
        "grow_prefix",
        slots.replace(cache=None),
        capacity=packing_lib.bucket(tokens, self._prefix_buckets),
      )
      self._slots = longer.replace(cache=slots.cache)

  def _everywhere(self, arrays):
    return layout.to_devices(arrays, layout.replicated(self._mesh))


def packs() -> bool:
  """Whether live slots alone are computed: on one device that is a CPU.

  An accelerator reads its weights for few tokens as for many; and over several
  devices slots lie where their rows do.
  """
  return target.platform() == "cpu" and rules.alone()


def row_counts(rows: int) -> list[int]:
  """How many rows may be left of so many once the others are through."""
  counts = [rows]
  while (
    counts[-1] % SHRINK_FACTOR == 0
    and counts[-1] // SHRINK_FACTOR >= MIN_PROMPT_SLOTS
  ):
    counts.append(counts[-1] // SHRINK_FACTOR)
  return counts


def active_slot_counts(rows: int, width: int) -> list[int]:
  """How many active slots may be computed, ascending: all slots, half of them,
  ...

  Each is a program of its own, so that they end where one more would save
  little.
  """
  counts = [rows * width]
  while counts[0] % 2 == 0 and counts[0] // 2 >= MIN_ACTIVE_SLOTS:
    counts.insert(0, counts[0] // 2)
  return counts


def joined(pieces: Sequence[Piece]) -> structs.Sample:
  """The sample that a slot drew in several calls."""
  ended = pieces[-1].ended
  truncated = None
  if pieces[-1].truncated is not None:
    truncated = np.concatenate([piece.truncated for piece in pieces])
  return structs.Sample(
    tokens=np.concatenate([piece.tokens for piece in pieces]),
    logprob=np.concatenate([piece.logprob for piece in pieces]),
    finished=ended == slots_lib.STOPPED,
    reason=REASONS[ended],
    truncated_logprob=truncated,
  )
