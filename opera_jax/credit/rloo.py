"""RLOO (arXiv 2402.14740): each sample against the mean of the others."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.credit import evidence as evidence_lib
from opera_jax.credit import group


@dataclasses.dataclass(frozen=True)
class Rule:
  """`A_i = R_i - mean of the others`, on every token."""

  def asks(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, evidence_lib.Ask]:
    """Nothing: rewards suffice."""
    return {}

  def credit(self, evidence: evidence_lib.Evidence) -> evidence_lib.Credit:
    """One advantage a sequence."""
    advantage_BN = group.rloo(evidence.returns())
    return evidence_lib.Credit(evidence.spread(advantage_BN))
