"""GRPO (arXiv 2402.03300): how much better than its group, in deviations."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.credit import evidence as evidence_lib
from opera_jax.credit import group


@dataclasses.dataclass(frozen=True)
class Rule:
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

  def asks(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, evidence_lib.Ask]:
    """Nothing: rewards suffice."""
    return {}

  def credit(self, evidence: evidence_lib.Evidence) -> evidence_lib.Credit:
    """One advantage a sequence."""
    advantage_BN = group.grpo(
      evidence.returns(), epsilon=self.epsilon, ddof=self.ddof
    )
    return evidence_lib.Credit(evidence.spread(advantage_BN))
