"""RLOO (arXiv 2402.14740): the baseline is the mean of the others."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """`A_i = R_i - mean of the others`, on every token."""

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """No log-probabilities beyond the policy's own."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """One advantage per completion, on all of its tokens."""
    advantage_BN = group.rloo(inputs.returns())
    return inputs_lib.Advantages(inputs.broadcast(advantage_BN))
