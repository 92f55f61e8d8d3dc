"""Samples and rewards of one RL step; groups of equal rewards replaced.

Dynamic sampling is DAPO's (arXiv 2503.14476): a group whose samples are all
right or all wrong teaches nothing, so other prompts are sampled in its place,
from at most as many batches as given. What is still missing then is filled with
such groups. A named reward decides, and not the sum: a term that shapes it,
such as a penalty on length, spreads the sum of a group in which every answer is
wrong. No prompt is taken twice in a step, unless there are too few others.

Shape key: B prompts, N samples a prompt.
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
  batches: int  # sampled, 1 + resamples
  sampled_tokens: int  # of all batches, dropped groups included
  rollout_seconds: float
  reward_seconds: float

  def metrics(self) -> dict[str, float]:
    """What it took, by name."""
    return {
      "rollout/tokens": float(self.sampled_tokens),
      "rollout/resamples": float(self.batches - 1),
    }


def collect(
  engine: engine_lib.Engine,
  scorer: score_lib.RewardScorer,
  params: Any,
  rollout_params: Any,
  batches: Sequence[tuple[Sequence[structs.Prompt], Sequence[np.ndarray]]],
  settings: sampling.Sampling,
  key: jax.Array,
  *,
  samples: int,
  filter_reward: str = "",
  advance: Callable[[int], None] | None = None,
) -> Collected:
  """Samples and scores a batch of prompts, and further batches if needed.

  Args:
    engine: samples.
    scorer: gives rewards.
    params: the policy before this step's update, in the TRAIN layout.
    rollout_params: the same in the ROLLOUT layout.
    batches: prompts and their tokens, all batches of one size; where there is
      one alone, all its groups are kept.
    settings: how to sample.
    key: of this step.
    samples: N.
    filter_reward: the reward term whose spread in a group decides whether the
      group is kept; "" is the weighted sum.
    advance: called with the tokens sampled or scored as they are done; what it
      raises ends the step, which has changed nothing yet.

  Raises:
    ValueError: there is no such term.
  """
  kept: list[tuple[score_lib.Scored, list[int]]] = []
  spare: list[tuple[score_lib.Scored, list[int]]] = []
  again: list[tuple[score_lib.Scored, list[int]]] = []
  seen: set[str] = set()
  tokens, spent, wanted, found = 0, [0.0, 0.0], 0, 0
  for at, (batch, ids) in enumerate(batches):
    begin = time.monotonic()
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
    scored = scorer.score(params, batch, ids, groups, advance=advance)
    spent[0] += sampled - begin
    spent[1] += time.monotonic() - sampled
    tokens += sum(len(s.tokens) for group in groups for s in group)
    wanted = len(batch)
    if len(batches) == 1:
      kept, found = [(scored, list(range(wanted)))], wanted
      break
    spread_B = np.asarray(
      group_lib.has_different_rewards(_decides(scored, filter_reward))
    )
    new_B = np.asarray([p.id not in seen for p in batch])
    taken = np.flatnonzero(spread_B & new_B)[: wanted - found].tolist()
    kept.append((scored, taken))
    spare.append((scored, np.flatnonzero(~spread_B & new_B).tolist()))
    again.append((scored, np.flatnonzero(~new_B).tolist()))
    seen.update(p.id for p in batch)
    found += len(taken)
    if found == wanted:
      break
  for scored, rest in (*spare, *again) if found < wanted else ():
    filled = rest[: wanted - found]
    kept.append((scored, filled))
    found += len(filled)
  joined = score_lib.join(kept)
  flat = joined.rollouts.completions
  return Collected(
    samples=[list(flat[i : i + samples]) for i in range(0, len(flat), samples)],
    scored=joined,
    batches=at + 1,
    sampled_tokens=tokens,
    rollout_seconds=spent[0],
    reward_seconds=spent[1],
  )


def _decides(scored: score_lib.Scored, name: str) -> np.ndarray:
  """The reward whose spread makes a group worth keeping, float32 [B, N]."""
  if not name:
    return scored.total_BN
  if name not in scored.terms:
    raise ValueError(
      f"config.rl.filter_reward is {name!r}, and this run measures "
      f"{sorted(scored.terms)}. Name one of the terms of config.reward.terms, "
      'or "" for their weighted sum.'
    )
  return scored.terms[name]
