"""RLOO (arXiv 2402.14740): each sample against the mean of the others."""

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
    """Nothing: rewards suffice."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """One advantage a sequence."""
    advantage_BN = group.rloo(inputs.returns())
    return inputs_lib.Advantages(inputs.broadcast(advantage_BN))
