"""SAR, the self-aligned reward (arXiv 2509.05489): does the answer need the
question?

    ppl(a|q) = exp(-lp(a | q)),   ppl(a) = exp(-lp(a | null prompt))
    R_SA = clip((ppl(a) - ppl(a|q)) / ppl(a), -1, 1)
         = clip(1 - exp(-mean_j v_j), -1, 1)
    v_j  = log p(a_j | q, a_<j) - log p(a_j | a_<j)

The null prompt is the same chat template with an empty user turn. The end of
turn is part of the answer; wrong and truncated answers are paid too.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opera_jax import structs

FORMS = ("ratio", "difference", "log")
_MOST = 700.0  # nats whose exponential float64 holds


@dataclasses.dataclass(frozen=True)
class Reward:
  """R_SA of every sample.

  Attributes:
    form: "ratio" is the paper's; "difference" is `clip(ppl(a) - ppl(a|q))`;
      "log" is `clip(mean v)`; all clipped to -1..1.
  """

  form: str = "ratio"

  def __post_init__(self):
    """Refuses an unknown form."""
    if self.form not in FORMS:
      raise ValueError(f"Unknown form {self.form!r}. Use one of {FORMS}.")

  def logprob_request(
    self, rollouts: structs.Rollouts
  ) -> structs.LogprobRequest:
    """Every completion after the null prompt."""
    return structs.LogprobRequest(
      prefixes=rollouts.after([""] * len(rollouts.completions))
    )

  def rewards(
    self, rollouts: structs.Rollouts, result: structs.LogprobResult
  ) -> dict[str, np.ndarray]:
    """R_SA and `gain`, the mean v in nats a token, float32 [B, N]."""
    null = [
      logprob[len(logprob) - len(row) :]
      for logprob, row in zip(result.prefix_logprob, result.completion_logprob)
    ]
    reward_R = self_aligned(result.completion_logprob, null, form=self.form)
    gain_R = np.asarray(
      [
        np.mean(row - bare) if len(row) else 0.0
        for row, bare in zip(result.completion_logprob, null)
      ]
    )
    shape = (len(rollouts.prompts), rollouts.samples)
    return {
      "total": reward_R.reshape(shape),
      "gain": gain_R.reshape(shape).astype(np.float32),
    }


def self_aligned(
  given: Sequence[np.ndarray],
  null: Sequence[np.ndarray],
  *,
  form: str = "ratio",
) -> np.ndarray:
  """The formula above.

  Args:
    given: [R] of float32 [C_r], log p of the answer's tokens after q.
    null: the same after the null prompt.
    form: see `Reward`.

  Returns:
    float32 [R]; 0 for an answer without tokens.
  """
  out = np.zeros(len(given), np.float32)
  for row, (with_q, without) in enumerate(zip(given, null)):
    if not len(with_q):
      continue
    with_q, without = (
      np.mean(with_q, dtype=float),
      np.mean(without, dtype=float),
    )
    value = {
      "ratio": -np.expm1(min(without - with_q, _MOST)),
      # Bounded, for the difference of two infinite perplexities is NaN.
      "difference": np.exp(min(-without, _MOST)) - np.exp(min(-with_q, _MOST)),
      "log": with_q - without,
    }[form]
    out[row] = np.clip(value, -1, 1)
  return out
