"""Samples and rewards of one RL step; groups without spread drawn anew.

Dynamic sampling is DAPO's (arXiv 2503.14476): a group whose rewards are all
equal teaches nothing, so other prompts are drawn in its place, in at most
as many draws as given. What is still missing then is filled with such groups.

Shape key: B prompts, N samples a prompt.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.rollout import sampling
from opera_jax.stages import score as score_lib
from opera_jax.stages import setup as setup_lib


@dataclasses.dataclass(frozen=True)
class Collected:
  """A step's groups, and what it took to get them."""

  samples: list[list[structs.Sample]]  # [B][N]
  scored: score_lib.Scored
  draws: int
  sampled_tokens: int  # of all draws, dropped groups included
  rollout_seconds: float
  reward_seconds: float

  def metrics(self) -> dict[str, float]:
    """What it took, by name."""
    return {
      "rollout/tokens": float(self.sampled_tokens),
      "rollout/draws": float(self.draws),
    }


def collect(
  run: setup_lib.Run,
  params: Any,
  draws: Sequence[tuple[Sequence[structs.Prompt], Sequence[np.ndarray]]],
  settings: sampling.Sampling,
  key: jax.Array,
  *,
  samples: int,
  advance: Callable[[int], None] | None = None,
) -> Collected:
  """Samples and scores a batch of prompts; and others, if asked for.

  Args:
    run: engine and scorer.
    params: the policy before this step's update, TRAIN layout.
    draws: prompts and their tokens, all draws of one size; the first alone
      is taken as it is.
    settings: how to sample.
    key: of this step.
    samples: N.
    advance: called with the tokens sampled or priced as they are done; what it
      raises ends the step, which has changed nothing yet.
  """
  kept: list[tuple[score_lib.Scored, list[int]]] = []
  spare: list[tuple[score_lib.Scored, list[int]]] = []
  tokens, spent, wanted, found = 0, [0.0, 0.0], 0, 0
  for at, (batch, ids) in enumerate(draws):
    begin = time.monotonic()
    groups = run.engine.sample(
      run.for_rollout(params),
      ids,
      settings,
      key if at == 0 else jax.random.fold_in(key, at),
      samples=samples,
      ids=[p.id for p in batch],
      advance=advance,
    )
    sampled = time.monotonic()
    scored = run.scorer.score(params, batch, ids, groups, advance=advance)
    spent[0] += sampled - begin
    spent[1] += time.monotonic() - sampled
    tokens += sum(len(s.tokens) for group in groups for s in group)
    wanted = len(batch)
    if len(draws) == 1:
      kept, found = [(scored, list(range(wanted)))], wanted
      break
    spread_B = np.ptp(scored.total_BN, axis=1) > 0
    taken = np.flatnonzero(spread_B)[: wanted - found].tolist()
    kept.append((scored, taken))
    spare.append((scored, np.flatnonzero(~spread_B).tolist()))
    found += len(taken)
    if found == wanted:
      break
  for scored, rest in spare if found < wanted else ():
    filled = rest[: wanted - found]
    kept.append((scored, filled))
    found += len(filled)
  joined = score_lib.join(kept)
  flat = joined.rollouts.completions
  return Collected(
    samples=[list(flat[i : i + samples]) for i in range(0, len(flat), samples)],
    scored=joined,
    draws=at + 1,
    sampled_tokens=tokens,
    rollout_seconds=spent[0],
    reward_seconds=spent[1],
  )
