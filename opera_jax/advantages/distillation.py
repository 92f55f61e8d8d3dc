"""On-policy distillation: a teacher's word on every sampled token.

    A_t = log p_teacher(y_t | x, y_<t) - log p_student(y_t | x, y_<t)

whose expectation is minus the gradient of KL(student || teacher). OPPO with a
constant state weight is the same up to scale.
"""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """The teacher of `config.rl.teacher`, on the student's own samples."""

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """The completions after their own prompts, by the teacher."""
    turns = [
      rollouts.prompts[rollouts.prompt_index(r)].prompt
      for r in range(len(rollouts.completions))
    ]
    return {"teacher": inputs_lib.ScoringRequest("teacher", turns)}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """The log-ratio of each token."""
    gap = [
      (teacher - student).astype(np.float32)
      for teacher, student in zip(inputs.logprobs["teacher"], inputs.logprob)
    ]
    mean = float(np.concatenate(gap).mean()) if gap else 0.0
    return inputs_lib.Advantages(gap, {"kl": -mean})
