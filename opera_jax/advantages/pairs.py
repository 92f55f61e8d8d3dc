"""Preference pairs for DPO: the best of a group against the worst."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """+1 on the tokens of the best completion, -1 on those of the worst.

  On ties the first completion counts. All others get 0, and so does every
  completion of a group whose rewards are equal.
  """

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """No log-probabilities beyond the policy's own."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """+1, -1 or 0 per completion, on all of its tokens."""
    reward_BN = inputs.returns()
    sign_BN = np.zeros(reward_BN.shape, np.float32)
    prompts = np.arange(len(reward_BN))
    sign_BN[prompts, reward_BN.argmax(axis=1)] = 1
    sign_BN[prompts, reward_BN.argmin(axis=1)] = -1
    sign_BN[~np.asarray(group.has_different_rewards(reward_BN))] = 0
    return inputs_lib.Advantages(inputs.broadcast(sign_BN))
