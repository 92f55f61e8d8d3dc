"""Dr.GRPO (arXiv 2503.20783): GRPO without the standard deviation."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.credit import evidence as evidence_lib
from opera_jax.credit import group


@dataclasses.dataclass(frozen=True)
class Rule:
  """`A = R - mean` of the group, on every token."""

  def asks(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, evidence_lib.Ask]:
    """Nothing: rewards suffice."""
    return {}

  def credit(self, evidence: evidence_lib.Evidence) -> evidence_lib.Credit:
    """One advantage a sequence."""
    advantage_BN = group.dr_grpo(evidence.returns())
    return evidence_lib.Credit(evidence.spread(advantage_BN))
