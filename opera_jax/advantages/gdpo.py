"""GDPO (arXiv 2601.05242): each reward term, normalised within its group."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """`A = (S - mean of S) / (std of S + epsilon)` over the step, with
  `S = sum over terms of weight * (R_k - mean_k) / (std_k + epsilon)`, whose
  mean and std are those of the group, on every token.

  Unlike a sum of rewards, it does not let the term of the largest spread
  decide, nor different pairs of rewards fall on the same advantage.
  """

  epsilon: float = 1e-6
  ddof: int = 1
  # False leaves out the normalisation over the step.
  batch: bool = True

  def __post_init__(self):
    """Refuses a non-positive epsilon, which would allow a division by 0."""
    if not self.epsilon > 0 or self.ddof not in (0, 1):
      raise ValueError(
        f"GDPO takes epsilon above 0 and a ddof of 0 or 1, got {self.epsilon} "
        f"and {self.ddof}."
      )

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """No log-probabilities beyond the policy's own."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """One advantage per completion, on all of its tokens.

    Raises:
      ValueError: a KL penalty in the reward, which is no term.
    """
    if any(penalty.any() for penalty in inputs.penalty):
      raise ValueError(
        "GDPO normalises every reward term by itself, and a KL penalty is "
        "none. Set config.rl.kl_in='loss'."
      )
    total_BN = np.zeros_like(inputs.reward_BN)
    for weight, term_BN in inputs.terms.values():
      total_BN += weight * np.asarray(
        group.grpo(term_BN, epsilon=self.epsilon, ddof=self.ddof)
      )
    if self.batch:
      total_BN = group.over_batch(total_BN, epsilon=self.epsilon)
    return inputs_lib.Advantages(inputs.broadcast(total_BN))
