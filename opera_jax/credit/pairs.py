"""Preference pairs for DPO: the best of a group against the worst."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.credit import evidence as evidence_lib
from opera_jax.credit import group


@dataclasses.dataclass(frozen=True)
class Rule:
  """+1 on the tokens of the first best sample, -1 on the first worst's.

  The rest, and a group without spread, get 0: they are in no pair.
  """

  def asks(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, evidence_lib.Ask]:
    """Nothing: rewards suffice."""
    return {}

  def credit(self, evidence: evidence_lib.Evidence) -> evidence_lib.Credit:
    """Which samples are in a pair, and on which side."""
    reward_BN = evidence.returns()
    side_BN = np.zeros(reward_BN.shape, np.float32)
    prompts = np.arange(len(reward_BN))
    side_BN[prompts, reward_BN.argmax(axis=1)] = 1
    side_BN[prompts, reward_BN.argmin(axis=1)] = -1
    side_BN[~np.asarray(group.has_spread(reward_BN))] = 0
    return evidence_lib.Credit(evidence.spread(side_BN))
