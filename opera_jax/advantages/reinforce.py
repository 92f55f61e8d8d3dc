"""REINFORCE (Williams, 1992), with a batch baseline or without a baseline, and
REINFORCE++ (arXiv 2501.03262), normalised over the step.
"""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group
from opera_jax.advantages import inputs as inputs_lib

BASELINES = ("none", "batch")


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """`A = R - b`, on every token.

  With `baseline` "batch", b is the mean reward of all OTHER completions of the
  step, so that the gradient stays unbiased; with "none", b is 0. `normalise`
  then subtracts the step's mean and divides by its std: REINFORCE++.
  """

  baseline: str = "batch"
  normalise: bool = False

  def __post_init__(self):
    """Refuses an unknown baseline."""
    if self.baseline not in BASELINES:
      raise ValueError(
        f"Unknown baseline {self.baseline!r}. Use one of {BASELINES}."
      )

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """No log-probabilities beyond the policy's own."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """One advantage per completion; a single completion has baseline 0."""
    return_BN = inputs.returns()
    if self.baseline == "batch" and return_BN.size > 1:
      others_BN = (return_BN.sum() - return_BN) / (return_BN.size - 1)
      return_BN = return_BN - others_BN
    if self.normalise:
      return_BN = group.over_batch(return_BN)
    return inputs_lib.Advantages(inputs.broadcast(return_BN))
