"""GRPO (arXiv 2402.03300): the reward, normalised within its group.

With `scale` "batch" the spread is that of the whole step, as Lite PPO (arXiv
2508.08221) proposes: the spread of a single group is a poor estimate.
"""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group
from opera_jax.advantages import inputs as inputs_lib

SCALES = ("group", "batch")


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """`A = (R - mean) / (std + epsilon)` of the group, on every token."""

  epsilon: float = 1e-6
  ddof: int = 1
  scale: str = "group"  # whose std: of the group, or of all rewards, "batch"

  def __post_init__(self):
    """Refuses a non-positive epsilon, which would allow a division by 0, and
    an unknown scale."""
    if self.scale not in SCALES:
      raise ValueError(
        f"GRPO divides by a std of scale {self.scale!r}. Use one of {SCALES}."
      )
    if not self.epsilon > 0 or self.ddof not in (0, 1):
      raise ValueError(
        f"GRPO takes epsilon above 0 and a ddof of 0 or 1, got {self.epsilon} "
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
    """One advantage per completion, on all of its tokens."""
    return_BN = inputs.returns()
    if self.scale == "batch":
      advantage_BN = group.grpo(return_BN, scale_by_std=False) / (
        return_BN.std(ddof=self.ddof) + self.epsilon
      )
    else:
      advantage_BN = group.grpo(return_BN, epsilon=self.epsilon, ddof=self.ddof)
    return inputs_lib.Advantages(inputs.broadcast(advantage_BN))
