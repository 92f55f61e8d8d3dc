"""SDPO: the policy taught by itself, shown a success of its own group.

    A_t = log p_T(y_t | x, a success, y_<t) - log p_S(y_t | x, y_<t)

p_T is a moving mean of the policy. This is the sampled-token form; the form
on the teacher's top logits is `losses.distillation.top_k_jensen_shannon`.
"""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib

PROMPT = (
  "{prompt}\n\nHere is a good solution:\n\n{solution}\n\n"
  "Now solve the problem yourself."
)


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """The teacher is shown the best other sample, if that is a success.

  Attributes:
    model: "ema" or "policy".
    threshold: reward from which a sample is a success.
    prompt: the teacher's user turn.
  """

  model: str = "ema"
  threshold: float = 0.5
  prompt: str = PROMPT

  def __post_init__(self):
    """Refuses an unknown model, and a turn that does not show the solution."""
    if self.model not in ("ema", "policy"):
      raise ValueError(
        f'Unknown model {self.model!r}. SDPO asks "ema" or "policy".'
      )
    if "{prompt}" not in self.prompt or "{solution}" not in self.prompt:
      raise ValueError(
        f"SDPO's prompt is {self.prompt!r}; it must hold {{prompt}} and "
        "{solution}."
      )

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """Each completion after its prompt with another's solution."""
    shown = self.shown(reward_BN)
    turns = []
    for row, other in enumerate(shown):
      prompt = rollouts.prompts[rollouts.prompt_index(row)].prompt
      if other >= 0:
        prompt = self.prompt.format(
          prompt=prompt, solution=rollouts.texts[other]
        )
      turns.append(prompt)
    return {"teacher": inputs_lib.ScoringRequest(self.model, turns)}

  def shown(self, reward_BN: np.ndarray) -> np.ndarray:
    """The row shown to the teacher of each row, int [R]; -1 where no other
    sample of the group succeeded."""
    samples = reward_BN.shape[1]
    out = np.full(reward_BN.shape, -1)
    for b, n in np.ndindex(reward_BN.shape):
      others_N = np.where(np.arange(samples) == n, -np.inf, reward_BN[b])
      best = int(np.argmax(others_N))
      if others_N[best] >= self.threshold:
        out[b, n] = b * samples + best
    return out.reshape(-1)

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """Log-ratios; 0 for rows whose teacher was shown nothing."""
    shown_R = self.shown(inputs.reward_BN)
    gap = [
      ((teacher - student) * (other >= 0)).astype(np.float32)
      for teacher, student, other in zip(
        inputs.logprobs["teacher"], inputs.logprob, shown_R
      )
    ]
    return inputs_lib.Advantages(gap, {"taught": float((shown_R >= 0).mean())})
