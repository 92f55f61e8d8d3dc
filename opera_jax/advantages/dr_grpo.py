"""Dr.GRPO (arXiv 2503.20783): GRPO without the standard deviation."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """`A = R - mean` of the group, on every token."""

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """No log-probabilities beyond the policy's own."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """One advantage per completion, on all of its tokens."""
    advantage_BN = group.dr_grpo(inputs.returns())
    return inputs_lib.Advantages(inputs.broadcast(advantage_BN))
