"""Preference pairs for DPO: the best of a group against the worst."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """+1 on the tokens of the first best sample, -1 on the first worst's.

  The rest, and a group without spread, get 0: they are in no pair.
  """

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """Nothing: rewards suffice."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """Which samples are in a pair, and on which side."""
    reward_BN = inputs.returns()
    side_BN = np.zeros(reward_BN.shape, np.float32)
    prompts = np.arange(len(reward_BN))
    side_BN[prompts, reward_BN.argmax(axis=1)] = 1
    side_BN[prompts, reward_BN.argmin(axis=1)] = -1
    side_BN[~np.asarray(group.has_spread(reward_BN))] = 0
    return inputs_lib.Advantages(inputs.broadcast(side_BN))
