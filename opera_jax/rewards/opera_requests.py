"""Plans which continuations OPERA's reward needs scored.

The reference is a continuation that forks from a completion at the ends of its
reflective steps, at the positions these are compared with, and at the end of
the whole completion. `rewards.opera` has the equations.

Shape key: R completions (prompt-major), J steps of a thought, S slots of a
completion (its distinct continuations), Q continuations in all.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from opera_jax import structs

COMPARE = ("previous", "reflective", "start")
NONE = -1


@dataclasses.dataclass(frozen=True)
class ContinuationIndex:
  """Maps continuations to completions and steps; host arrays, -1 is "none".

  Attributes:
    completion: [Q] int32, completion of continuation q.
    slot: [Q] int32, slot of continuation q in its completion.
    baseline: [R, S] int32, slot whose log-probability slot s must exceed to
      count as productive.
    last: [R] int32, slot at the end of the whole completion.
    before: [R, J] int32, slot at the start of step j.
    after: [R, J] int32, slot at the end of step j.
  """

  completion: np.ndarray
  slot: np.ndarray
  baseline: np.ndarray
  last: np.ndarray
  before: np.ndarray
  after: np.ndarray


def plan(
  thoughts: structs.Thoughts,
  prompt_length_R: np.ndarray,
  completion_length_R: np.ndarray,
  reference_ids: Sequence[np.ndarray],
  *,
  bridge_ids: Sequence[int] = (),
  all_steps: bool = False,
  compare: str = "previous",
  prefixes: Sequence[int] | None = None,
) -> tuple[list[structs.Continuation], ContinuationIndex]:
  """Plans the continuations of every completion, each position once.

  A prefix is prompt + completion. A completion is scored at the ends of its
  reflective steps and of the steps before them (for the first step at the start
  of the thought), and once at its end, after thought, answer and the
  end-of-turn token if one was sampled. A completion without a closed thought is
  scored only at its end.

  Args:
    thoughts: steps of each completion, in completion positions.
    prompt_length_R: int, tokens of the prompt, generation prefix included.
    completion_length_R: int, tokens of the completion, stop token included.
    reference_ids: [R] int32 arrays, tokens of y_ref, tokenised on its own.
    bridge_ids: tokens between a partial thought and the reference; they are
      context and are not scored. The whole completion gets no bridge.
    all_steps: also score the end of every step, for figures; the reward is
      unchanged.
    compare: the position that a reflective step is compared with: "previous",
      the end of the step before it, reflective or not (the paper);
      "reflective", the end of the last reflective step; "start", the start of
      the thought.
    prefixes: index of each completion in the scorer's list of prefixes; default
      0 .. R - 1.

  Returns:
    The continuations, and the index that `opera_reward.rewards` needs to read
    their log-probabilities.

  Raises:
    ValueError: arguments of different lengths, an empty reference, a step
      outside its completion, or an unknown `compare`.
  """
  if compare not in COMPARE:
    raise ValueError(f"Unknown comparison {compare!r}. Use one of {COMPARE}.")
  # One transfer of whole arrays instead of one per entry.
  thoughts = jax.tree.map(np.asarray, thoughts)
  completions = len(prompt_length_R)
  prefixes = range(completions) if prefixes is None else prefixes
  lengths = {
    "thoughts": len(thoughts.count),
    "completion_length_R": len(completion_length_R),
    "reference_ids": len(reference_ids),
    "prefixes": len(prefixes),
  }
  for name, length in lengths.items():
    if length != completions:
      raise ValueError(
        f"{name} has {length} entries, prompt_length_R has {completions}; give "
        "one entry a completion."
      )
  steps = thoughts.step_end.shape[1]
  before_RJ = np.full((completions, steps), NONE, np.int32)
  after_RJ = np.full((completions, steps), NONE, np.int32)
  last_R = np.zeros(completions, np.int32)
  continuations: list[structs.Continuation] = []
  completion_of: list[int] = []
  slot_of: list[int] = []
  baselines: list[list[int]] = []
  for r in range(completions):
    reference = np.asarray(reference_ids[r], np.int32)
    if not reference.size:
      raise ValueError(
        f"The reference of completion {r} has no tokens; a reward needs at "
        "least 1. Drop that prompt, or check the tokenizer."
      )
    bridged = np.concatenate([np.asarray(bridge_ids, np.int32), reference])
    slots: dict[int, int] = {}  # position in the completion -> slot
    end_J, reflective_J = _steps_of(thoughts, r, completion_length_R[r])
    start = int(thoughts.start[r])
    # For each way to compare, the position that the next step is compared with.
    base = {"previous": start, "reflective": start, "start": start}
    baseline: dict[int, int] = {}
    for j, end in enumerate(end_J):
      if reflective_J[j] or all_steps:
        before_RJ[r, j] = slots.setdefault(base[compare], len(slots))
        after_RJ[r, j] = slots.setdefault(end, len(slots))
      if reflective_J[j] and end != base[compare]:
        baseline[int(after_RJ[r, j])] = int(before_RJ[r, j])
      base["previous"] = end
      if reflective_J[j]:
        base["reflective"] = end
    for position in slots:
      continuations.append(
        structs.Continuation(
          prefix=int(prefixes[r]),
          fork=int(prompt_length_R[r]) + position,
          tokens=bridged,
          skip=len(bridge_ids),
        )
      )
    last_R[r] = len(slots)
    continuations.append(
      structs.Continuation(
        prefix=int(prefixes[r]),
        fork=int(prompt_length_R[r]) + int(completion_length_R[r]),
        tokens=reference,
      )
    )
    completion_of += [r] * (len(slots) + 1)
    slot_of += range(len(slots) + 1)
    baselines.append([baseline.get(s, NONE) for s in range(len(slots) + 1)])
  max_slots = padded_size(max(map(len, baselines), default=1))
  baseline_RS = np.full((completions, max_slots), NONE, np.int32)
  for r, baseline_S in enumerate(baselines):
    baseline_RS[r, : len(baseline_S)] = baseline_S
  return continuations, ContinuationIndex(
    completion=np.asarray(completion_of, np.int32),
    slot=np.asarray(slot_of, np.int32),
    baseline=baseline_RS,
    last=last_R,
    before=before_RJ,
    after=after_RJ,
  )


def padded_size(size: int) -> int:
  """The next power of two, at least 8, so that few shapes are compiled."""
  return 1 << max(3, (size - 1).bit_length())


def _steps_of(
  thoughts: structs.Thoughts, completion: int, completion_length: int
) -> tuple[list[int], np.ndarray]:
  """Ends and reflective flags of a completion's steps; none if not closed."""
  count = int(thoughts.count[completion]) if thoughts.closed[completion] else 0
  end_J = [int(end) for end in thoughts.step_end[completion, :count]]
  bounds = [int(thoughts.start[completion]), *end_J, int(completion_length)]
  if count and (bounds[0] < 0 or bounds != sorted(bounds)):
    raise ValueError(
      f"Completion {completion}: its thought starts at {bounds[0]} and its "
      f"steps end at {end_J}, of {completion_length} tokens; steps must rise "
      "within the completion. Mark the steps on the sampled tokens themselves."
    )
  return end_J, np.asarray(thoughts.reflective[completion, :count])
