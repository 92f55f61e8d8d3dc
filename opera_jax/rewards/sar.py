"""SAR, the self-aligned reward (arXiv 2509.05489): how much the question helps
to predict the answer.

    ppl(a|q) = exp(-lp(a | q)),   ppl(a) = exp(-lp(a | null prompt))
    R_SA = clip((ppl(a) - ppl(a|q)) / ppl(a), -1, 1)
         = clip(1 - exp(-mean_j v_j), -1, 1)
    v_j  = log p(a_j | q, a_<j) - log p(a_j | a_<j)

The null prompt is the same chat template with an empty user turn. The
end-of-turn token is part of the answer. Wrong and truncated answers are
rewarded too.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opera_jax import structs

FORMS = ("ratio", "difference", "log")
_MAX_NATS = 700.0  # exp of more overflows float64


@dataclasses.dataclass(frozen=True)
class Reward:
  """R_SA of every completion.

  Attributes:
    form: "ratio" is the paper's R_SA; "difference" is ppl(a) - ppl(a|q); "log"
      is mean v. All are clipped to -1..1.
  """

  form: str = "ratio"

  def __post_init__(self):
    """Refuses an unknown form."""
    if self.form not in FORMS:
      raise ValueError(f"Unknown form {self.form!r}. Use one of {FORMS}.")

  def logprob_request(
    self, rollouts: structs.Rollouts
  ) -> structs.LogprobRequest:
    """Requests every completion after the null prompt."""
    return structs.LogprobRequest(
      prefixes=rollouts.after([""] * len(rollouts.completions))
    )

  def rewards(
    self, rollouts: structs.Rollouts, result: structs.LogprobResult
  ) -> dict[str, np.ndarray]:
    """R_SA as `total`, and `gain`, the mean v in nats per token; float32
    [B, N]."""
    after_null = [
      logprob[len(logprob) - len(completion) :]
      for logprob, completion in zip(
        result.prefix_logprob, result.completion_logprob
      )
    ]
    reward_R = self_aligned(
      result.completion_logprob, after_null, form=self.form
    )
    gain_R = np.asarray(
      [
        np.mean(with_q - without_q) if len(with_q) else 0.0
        for with_q, without_q in zip(result.completion_logprob, after_null)
      ]
    )
    shape = (len(rollouts.prompts), rollouts.samples)
    return {
      "total": reward_R.reshape(shape),
      "gain": gain_R.reshape(shape).astype(np.float32),
    }


def self_aligned(
  with_question: Sequence[np.ndarray],
  without_question: Sequence[np.ndarray],
  *,
  form: str = "ratio",
) -> np.ndarray:
  """Computes R_SA.

  Args:
    with_question: [R] of float32 [C_r], log p(a_j | q, a_<j).
    without_question: [R] of float32 [C_r], log p(a_j | a_<j).
    form: see `Reward`.

  Returns:
    float32 [R]; 0 for an answer without tokens.
  """
  out = np.zeros(len(with_question), np.float32)
  for r, (with_q, without_q) in enumerate(zip(with_question, without_question)):
    if not len(with_q):
      continue
    lp_with = np.mean(with_q, dtype=float)
    lp_without = np.mean(without_q, dtype=float)
    value = {
      "ratio": -np.expm1(min(lp_without - lp_with, _MAX_NATS)),
      # Bounded, as the difference of two infinite perplexities is NaN.
      "difference": np.exp(min(-lp_without, _MAX_NATS))
      - np.exp(min(-lp_with, _MAX_NATS)),
      "log": lp_with - lp_without,
    }[form]
    out[r] = np.clip(value, -1, 1)
  return out
