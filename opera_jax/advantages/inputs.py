"""The inputs and outputs of advantage estimators, and their weighted sum.

An estimator is one file of this package with a frozen dataclass
`AdvantageEstimator`. The fields are its settings; it has two methods:

    scoring_requests(rollouts, reward_BN) -> dict[str, ScoringRequest]
    advantages(inputs) -> Advantages

The first returns the log-probabilities that the estimator needs beyond the
policy's own. The second computes one advantage per token from rewards and
log-probabilities.

`config.rl.advantage` names estimators and their weights, as in "grpo" or
"grpo + 0.5*oppo". Weighted advantages are summed token by token, so sequence
and token estimators combine.

Shape key: B prompts, N samples of a prompt, R = B * N completions
(prompt-major), C_r tokens of completion r.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs

MODELS = ("policy", "teacher", "ema")


@dataclasses.dataclass(frozen=True)
class ScoringRequest:
  """Asks one model to score every completion after a given user turn.

  Attributes:
    model: "policy", the policy before this step's update; "teacher", the frozen
      model of `config.rl.teacher`; or "ema", the moving average of the policy.
    turns: [R] user turns, one per completion.
  """

  model: str
  turns: Sequence[str]

  def __post_init__(self):
    """Refuses an unknown model."""
    if self.model not in MODELS:
      raise ValueError(
        f"An advantage estimator asks the model {self.model!r}. Use one of "
        f"{MODELS}."
      )


@dataclasses.dataclass(frozen=True)
class AdvantageInputs:
  """Rewards and log-probabilities of a step's completions; host arrays.

  Attributes:
    rollouts: the completions.
    reward_BN: float32.
    success_BN: float in 0..1: 1 or 0 where the answer can be checked, else the
      reward.
    logprob: [R] of float32 [C_r], under the policy before the update.
    penalty: [R] of float32 [C_r], KL penalty to subtract from the rewards.
    logprobs: [R] of float32 [C_r] for each name of `scoring_requests`.
    value: [R] of float32 [C_r], the critic's value before each token; None
      without a critic.
    terms: the weight, a number or [B, 1], and the float32 [B, N] values of each
      reward that the sum `reward_BN` is made of.
  """

  rollouts: structs.Rollouts
  reward_BN: np.ndarray
  success_BN: np.ndarray
  logprob: Sequence[np.ndarray]
  penalty: Sequence[np.ndarray]
  logprobs: Mapping[str, Sequence[np.ndarray]]
  value: Sequence[np.ndarray] | None = None
  terms: Mapping[str, tuple[float | np.ndarray, np.ndarray]] = (
    dataclasses.field(default_factory=dict)
  )

  def returns(self) -> np.ndarray:
    """Reward minus the completion's summed penalty, float32 [B, N]."""
    penalty_R = np.asarray([p.sum() for p in self.penalty], np.float32)
    return self.reward_BN - penalty_R.reshape(self.reward_BN.shape)

  def broadcast(self, advantage_BN: np.ndarray | jax.Array) -> list[np.ndarray]:
    """Repeats one number per completion on all its tokens, [R] of [C_r]."""
    return [
      np.full(len(tokens), a, np.float32)
      for a, tokens in zip(np.asarray(advantage_BN).reshape(-1), self.logprob)
    ]


@dataclasses.dataclass(frozen=True)
class Advantages:
  """An advantage for every token.

  Attributes:
    advantage: [R] of float32 [C_r].
    metrics: to log.
    returns: [R] of float32 [C_r], the critic's targets, if it is trained.
  """

  advantage: Sequence[np.ndarray]
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  returns: Sequence[np.ndarray] | None = None


def combine(estimates: Mapping[str, tuple[float, Advantages]]) -> Advantages:
  """`A_t = sum over estimators of weight * A_t`, with metrics by estimator.

  Args:
    estimates: estimator name -> (weight, its advantages); at least one.

  Returns:
    The sum. The critic's targets are those of the only estimator that has some.

  Raises:
    ValueError: an advantage that is not finite, or two estimators with targets
      for the critic.
  """
  metrics: dict[str, Any] = {}
  returns = None
  for name, (_, estimate) in estimates.items():
    for index, advantage in enumerate(estimate.advantage):
      if not np.isfinite(advantage).all():
        raise ValueError(
          f"Advantage estimator {name!r} gives completion {index} an advantage "
          "that is not finite. Look at that completion's reward and "
          "log-probabilities."
        )
    metrics |= {f"advantage/{name}/{k}": v for k, v in estimate.metrics.items()}
    if estimate.returns is not None:
      if returns is not None:
        raise ValueError(
          f"Two of the advantage estimators {sorted(estimates)} train a "
          "critic. Keep one."
        )
      returns = estimate.returns
  weights = [weight for weight, _ in estimates.values()]
  by_completion = zip(*(e.advantage for _, e in estimates.values()))
  total = [
    sum(w * a for w, a in zip(weights, advantages)).astype(np.float32)
    for advantages in by_completion
  ]
  return Advantages(advantage=total, metrics=metrics, returns=returns)
