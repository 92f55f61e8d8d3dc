"""Chooses the prompts of each RL batch: in shuffled passes, or by pass rate.

`config.rl.sampling = "pass_rate"` draws a prompt with probability proportional
to

    v + config.rl.sampling_floor,

where v is the variance of the rewards of the prompt's last group: p (1 - p) if
they are 0 or 1 and a share p of them is 1. A group that always passes or always
fails has v = 0 and no gradient. Maths prompts are measured by the term
`correct`, others by the weighted sum. v is at most 1/4, the largest variance of
numbers in 0..1, and a prompt that has not been sampled yet counts as that.

That variance bounds the expected improvement from below ("Online Difficulty
Filtering", arXiv 2504.03380). Kimi k1.5 (arXiv 2501.12599) draws by 1 - p
instead, which prefers prompts that never pass.

A batch is a function of (seed, number of the batch, last variances), and the
variances are in the checkpoint, so a resumed run draws the same prompts.

Shape key: N prompts to draw from, B prompts of a batch.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from opera_jax import structs
from opera_jax.data import batching, mixture
from opera_jax.rl import score as score_lib

METHODS = ("uniform", "pass_rate")
UNSEEN = 0.25  # variance of a prompt without a group: the largest possible


def variances(scored: score_lib.Scored) -> dict[str, float]:
  """Variance of the rewards in each group, at most `UNSEEN`, by prompt id."""
  reward_BN = scored.total_BN
  if "correct" in scored.terms:
    reward_BN = np.where(
      scored.open_ended_B[:, None], reward_BN, scored.terms["correct"]
    )
  variance_B = np.minimum(reward_BN.var(axis=1, dtype=np.float64), UNSEEN)
  return {
    prompt.id: float(variance)
    for prompt, variance in zip(scored.rollouts.prompts, variance_B)
  }


def draw(weight_N: np.ndarray, count: int, seed: Sequence[int]) -> np.ndarray:
  """Draws distinct items with probability proportional to weight, int64.

  An exponential race: item i arrives after a time of rate w_i, and the first
  `count` are taken. So each is drawn in proportion to the weights of those that
  are left.

  Args:
    weight_N: positive.
    count: at most N.
    seed: ints from 0 on.
  """
  uniform_N = np.random.default_rng(seed).random(len(weight_N))
  return np.argsort(-np.log1p(-uniform_N) / weight_N, kind="stable")[:count]


@dataclasses.dataclass
class PromptSampler:
  """The prompts of each batch of an RL run."""

  ids: Sequence[str]  # [N]
  # The prompts of each batch, or None to draw them by pass rate.
  order: Sequence[np.ndarray] | None
  sets: np.ndarray  # [batches, B], the set of each prompt of each batch
  set_of_prompt: np.ndarray  # [N], as numbered in `sets`
  floor: float
  seed: int
  variances: dict[str, float]  # of the last group, by prompt id

  def batch(self, index: int) -> np.ndarray:
    """The prompts of a batch, int64 [B]."""
    if self.order is not None:
      return self.order[index]
    weight_N = self.floor + np.asarray(
      [self.variances.get(name, UNSEEN) for name in self.ids]
    )
    sets_B = self.sets[index]
    out = np.zeros(len(sets_B), np.int64)
    for s in np.unique(sets_B):
      items = np.flatnonzero(self.set_of_prompt == s)
      mine = sets_B == s
      seed = (self.seed, index, int(s))
      out[mine] = items[draw(weight_N[items], int(mine.sum()), seed)]
    return out

  def observe(self, scored: score_lib.Scored) -> None:
    """Notes the rewards of sampled groups."""
    if self.order is None:
      self.variances |= variances(scored)


def build(
  method: str,
  prompts: Sequence[structs.Prompt],
  weights: Mapping[str, float],
  *,
  batch_size: int,
  batches: int,
  seed: int,
  floor: float,
  seen: Mapping[str, float],
) -> PromptSampler:
  """Builds the sampler of an RL run.

  Args:
    method: of `METHODS`.
    prompts: to draw from.
    weights: of their sets, see `data.mixture`; {} for one set.
    batch_size: B.
    batches: number of batches of the run.
    seed: an int from 0 on.
    floor: added to every variance, above 0.
    seen: variances from a checkpoint.

  Raises:
    ValueError: too few prompts for a batch, of a set or in all.
  """
  sets = [prompt.set for prompt in prompts] if weights else [""] * len(prompts)
  weights = weights or {"": 1.0}
  order: Sequence[np.ndarray] | None = None
  if method == "uniform" and len(weights) > 1:
    order = mixture.mixed_order(sets, weights, batch_size, batches, seed)
  elif method == "uniform":
    epochs = -(-batches * batch_size // max(len(prompts), 1))
    order = batching.batch_order(len(prompts), batch_size, epochs, seed)
  names = list(weights)
  return PromptSampler(
    ids=[prompt.id for prompt in prompts],
    order=order,
    sets=mixture.batch_sets(sets, weights, batch_size, batches),
    set_of_prompt=np.asarray([names.index(name) for name in sets]),
    floor=floor,
    seed=seed,
    variances=dict(seen),
  )
