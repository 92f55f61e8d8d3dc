"""On-policy distillation: a teacher's word on every sampled token.

    A_t = log p_teacher(y_t | x, y_<t) - log p_student(y_t | x, y_<t)

whose expectation is minus the gradient of KL(student || teacher). OPPO with a
constant state weight is the same up to scale.
"""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.credit import evidence as evidence_lib


@dataclasses.dataclass(frozen=True)
class Rule:
  """The teacher of `config.rl.teacher`, on the student's own samples."""

  def asks(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, evidence_lib.Ask]:
    """The completions after their own prompts, by the teacher."""
    turns = [
      rollouts.prompts[rollouts.owner(r)].prompt
      for r in range(len(rollouts.completions))
    ]
    return {"teacher": evidence_lib.Ask("teacher", turns)}

  def credit(self, evidence: evidence_lib.Evidence) -> evidence_lib.Credit:
    """The log-ratio of each token."""
    gap = [
      (teacher - student).astype(np.float32)
      for teacher, student in zip(evidence.prices["teacher"], evidence.logprob)
    ]
    mean = float(np.concatenate(gap).mean()) if gap else 0.0
    return evidence_lib.Credit(gap, {"kl": -mean})
