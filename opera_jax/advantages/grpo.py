"""GRPO (arXiv 2402.03300): how much better than its group, in deviations."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """`A = (R - mean) / (std + epsilon)` of the group, on every token."""

  epsilon: float = 1e-6
  ddof: int = 1

  def __post_init__(self):
    """Refuses what would divide by nothing."""
    if not self.epsilon > 0 or self.ddof not in (0, 1):
      raise ValueError(
        f"GRPO takes epsilon above 0 and a ddof of 0 or 1, got {self.epsilon} "
        f"and {self.ddof}."
      )

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """Nothing: rewards suffice."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """One advantage a sequence."""
    advantage_BN = group.grpo(
      inputs.returns(), epsilon=self.epsilon, ddof=self.ddof
    )
    return inputs_lib.Advantages(inputs.broadcast(advantage_BN))
