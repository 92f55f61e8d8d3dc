"""SDPO: self-distillation from the policy that is shown a successful sample.

    A_t = log p_T(y_t | x, a success, y_<t) - log p_S(y_t | x, y_<t)

p_T is a moving average of the policy. This is the sampled-token form; the form
on the teacher's top-k logits is `losses.distillation.top_k_jensen_shannon`.
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
  """The teacher is shown the group's best other sample, if it succeeded.

  Attributes:
    model: "ema" or "policy".
    threshold: lowest reward of a successful sample.
    prompt: the teacher's user turn.
  """

  model: str = "ema"
  threshold: float = 0.5
  prompt: str = PROMPT

  def __post_init__(self):
    """Refuses an unknown model, and a prompt without its placeholders."""
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
    """Every completion after its prompt with another completion's solution."""
    turns = []
    for index, other in enumerate(self.shown(reward_BN)):
      prompt = rollouts.prompts[rollouts.prompt_index(index)].prompt
      if other >= 0:
        prompt = self.prompt.format(
          prompt=prompt, solution=rollouts.texts[other]
        )
      turns.append(prompt)
    return {"teacher": inputs_lib.ScoringRequest(self.model, turns)}

  def shown(self, reward_BN: np.ndarray) -> np.ndarray:
    """For each completion the one that its teacher is shown, int [R]; -1 if no
    other sample of the group succeeded."""
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
    """Log-ratios of teacher and student; 0 if nothing was shown."""
    shown_R = self.shown(inputs.reward_BN)
    log_ratio = [
      ((teacher - student) * (other >= 0)).astype(np.float32)
      for teacher, student, other in zip(
        inputs.logprobs["teacher"], inputs.logprob, shown_R
      )
    ]
    return inputs_lib.Advantages(
      log_ratio, {"taught": float((shown_R >= 0).mean())}
    )
