"""REINFORCE (Williams, 1992) with a baseline of the batch, or none."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib

BASELINES = ("none", "batch")


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """`A = R - b`, on every token.

  `baseline` "batch" takes the mean of all OTHER samples of the step for b, so
  that the gradient stays unbiased; "none" takes 0.
  """

  baseline: str = "batch"

  def __post_init__(self):
    """Refuses an unknown baseline."""
    if self.baseline not in BASELINES:
      raise ValueError(
        f"Unknown baseline {self.baseline!r}. Use one of {BASELINES}."
      )

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """Nothing: rewards suffice."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """One advantage a sequence; a lone sample gets its reward."""
    return_BN = inputs.returns()
    if self.baseline == "batch" and return_BN.size > 1:
      others_BN = (return_BN.sum() - return_BN) / (return_BN.size - 1)
      return_BN = return_BN - others_BN
    return inputs_lib.Advantages(inputs.broadcast(return_BN))
