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
