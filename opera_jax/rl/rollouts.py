"""Samples and scores one RL step, and resamples groups with equal rewards.

Dynamic sampling is DAPO's (arXiv 2503.14476): a group whose samples are all
right or all wrong has no gradient, so other prompts are sampled in its place,
from at most as many batches as given. If groups are still missing then, such
groups fill the step. One named reward term decides, not the weighted sum: a
shaping term, such as a penalty on length, makes the sums differ in a group in
which every answer is wrong. A prompt is used twice in a step only if there are
too few others.

Shape key: B prompts, N samples per prompt.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.advantages import group as group_lib
from opera_jax.rl import score as score_lib
from opera_jax.rollout import engine as engine_lib
from opera_jax.rollout import sampling


@dataclasses.dataclass(frozen=True)
class Collected:
  """A step's groups, with counts of tokens and seconds."""

  samples: list[list[structs.Sample]]  # [B][N]
  scored: score_lib.Scored
  batches: int  # number of sampled batches, 1 + resamples
  sampled_tokens: int  # in all batches, including dropped groups
  rollout_seconds: float
  reward_seconds: float
  unused: list[score_lib.Scored]  # the groups that were dropped

  def metrics(self) -> dict[str, float]:
    """Metrics of sampling, by name."""
    return {
      "rollout/tokens": float(self.sampled_tokens),
      "rollout/resamples": float(self.batches - 1),
    }


def collect(
  engine: engine_lib.Engine,
  reward_scorer: score_lib.RewardScorer,
  batches: Sequence[tuple[Sequence[structs.Prompt], Sequence[np.ndarray]]],
  *,
  params: Any,
  rollout_params: Any,
  settings: sampling.Sampling,
  key: jax.Array,
  samples: int,
  filter_reward: str = "",
  advance: Callable[[int], None] | None = None,
  phase: Callable[[str], None] = lambda name: None,
) -> Collected:
  """Samples and scores a batch of prompts, and further batches if needed.

  Args:
    engine: samples completions.
    reward_scorer: computes rewards.
    batches: prompts and their tokens, all batches of one size; if there is
      only one batch, all its groups are kept.
    params: the policy before this step's update, in the TRAIN layout.
    rollout_params: the same in the ROLLOUT layout.
    settings: sampling settings.
    key: random key of this step.
    samples: N.
    filter_reward: a group is kept if this reward term differs among its
      samples; "" means the weighted sum.
    advance: progress callback, called with the number of tokens sampled or
      scored; an exception from it aborts the step, which has not changed any
      state yet.
    phase: called with "sampling" and "scoring" as they start.

  Raises:
    ValueError: `filter_reward` is not a reward term.
  """
  kept: list[tuple[score_lib.Scored, list[int]]] = []
  equal: list[tuple[score_lib.Scored, list[int]]] = []
  repeated: list[tuple[score_lib.Scored, list[int]]] = []
  seen_ids: set[str] = set()
  tokens, seconds, wanted, found = 0, [0.0, 0.0], 0, 0
  for at, (batch, ids) in enumerate(batches):
    begin = time.monotonic()
    phase("sampling")
    groups = engine.sample(
      rollout_params,
      ids,
      settings,
      key if at == 0 else jax.random.fold_in(key, at),
      samples=samples,
      ids=[p.id for p in batch],
      advance=advance,
    )
    sampled = time.monotonic()
    phase("scoring")
    scored = reward_scorer.score(params, batch, ids, groups, advance=advance)
    seconds[0] += sampled - begin
    seconds[1] += time.monotonic() - sampled
    tokens += sum(len(s.tokens) for group in groups for s in group)
    wanted = len(batch)
    if len(batches) == 1:
      kept, found = [(scored, list(range(wanted)))], wanted
      break
    differs_B = np.asarray(
      group_lib.has_different_rewards(_filter_values(scored, filter_reward))
    )
    new_B = np.asarray([p.id not in seen_ids for p in batch])
    taken = np.flatnonzero(differs_B & new_B)[: wanted - found].tolist()
    kept.append((scored, taken))
    equal.append((scored, np.flatnonzero(~differs_B & new_B).tolist()))
    repeated.append((scored, np.flatnonzero(~new_B).tolist()))
    seen_ids.update(p.id for p in batch)
    found += len(taken)
    if found == wanted:
      break
  for scored, rest in (*equal, *repeated) if found < wanted else ():
    filled = rest[: wanted - found]
    kept.append((scored, filled))
    found += len(filled)
  joined = score_lib.join(kept)
  used: dict[int, set[int]] = {}
  for scored, chosen in kept:
    used.setdefault(id(scored), set()).update(chosen)
  every = {id(scored): scored for scored, _ in kept}.values()
  dropped = [
    (scored, sorted(set(range(wanted)) - used[id(scored)])) for scored in every
  ]
  flat = joined.rollouts.completions
  return Collected(
    samples=[list(flat[i : i + samples]) for i in range(0, len(flat), samples)],
    scored=joined,
    batches=at + 1,
    sampled_tokens=tokens,
    rollout_seconds=seconds[0],
    reward_seconds=seconds[1],
    unused=[score_lib.join([pair]) for pair in dropped if pair[1]],
  )


def _filter_values(scored: score_lib.Scored, name: str) -> np.ndarray:
  """The reward that decides which groups are kept, float32 [B, N]."""
  if not name:
    return scored.total_BN
  if name not in scored.terms:
    raise ValueError(
      f"config.rl.filter_reward is {name!r}, and this run has the terms "
      f"{sorted(scored.terms)}. Name one of the terms of config.reward.terms, "
      'or "" for their weighted sum.'
    )
  return scored.terms[name]
