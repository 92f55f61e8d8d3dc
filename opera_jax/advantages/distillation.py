"""On-policy distillation: the teacher scores every sampled token.

    A_t = log p_teacher(y_t | x, y_<t) - log p_student(y_t | x, y_<t)

The expected policy gradient with this advantage is the negative gradient of
KL(student || teacher). OPPO with a constant state weight is the same up to
scale.
"""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """The teacher is `config.rl.teacher`; completions are the student's own."""

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """The teacher scores every completion after its own prompt."""
    turns = [
      rollouts.prompts[rollouts.prompt_index(r)].prompt
      for r in range(len(rollouts.completions))
    ]
    return {"teacher": inputs_lib.ScoringRequest("teacher", turns)}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """The log-ratio of teacher and student at each token."""
    log_ratio = [
      (teacher - student).astype(np.float32)
      for teacher, student in zip(inputs.logprobs["teacher"], inputs.logprob)
    ]
    mean = float(np.concatenate(log_ratio).mean()) if log_ratio else 0.0
    return inputs_lib.Advantages(log_ratio, {"kl": -mean})
