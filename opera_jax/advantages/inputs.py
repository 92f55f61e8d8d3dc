"""What an advantage estimator reads, and what it gives back.

An estimator is one file of this package with a frozen dataclass
`AdvantageEstimator`, whose fields are its settings, and two methods:

    scoring_requests(rollouts, reward_BN) -> dict[str, ScoringRequest]
    advantages(inputs) -> Advantages

The first says which log-probabilities the estimator needs beyond the policy's
own; the second turns rewards and log-probabilities into one advantage a token.

`config.rl.advantage` names estimators and their weights, as in "grpo" or
"grpo + 0.5*oppo"; weighted advantages add up token by token, so sequence
and token estimators combine.

Shape key: B prompts, N samples a prompt, R = B * N rows (prompt-major), C_r
tokens of the completion of row r.
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
  """Every completion scored after a user's turn of its own, by one model.

  "policy" is the policy before this step's update, "teacher" the frozen model
  of `config.rl.teacher`, "ema" the moving mean of the policy.
  """

  model: str
  turns: Sequence[str]  # [R]

  def __post_init__(self):
    """Refuses a model that no run has."""
    if self.model not in MODELS:
      raise ValueError(
        f"An advantage estimator asks the model {self.model!r}. Use one of "
        f"{MODELS}."
      )


@dataclasses.dataclass(frozen=True)
class AdvantageInputs:
  """Rewards and log-probabilities of a step's samples; host arrays."""

  rollouts: structs.Rollouts
  reward_BN: np.ndarray  # float32
  success_BN: np.ndarray  # float in 0..1: right or wrong, else the reward
  logprob: Sequence[np.ndarray]  # [R] of float32 [C_r], old policy
  penalty: Sequence[np.ndarray]  # [R] of float32 [C_r], KL taken off rewards
  # By name of a ScoringRequest, [R] of [C_r].
  logprobs: Mapping[str, Sequence[np.ndarray]]
  value: Sequence[np.ndarray] | None = None  # [R] of [C_r], before each token

  def returns(self) -> np.ndarray:
    """Reward less the sequence's penalty, float32 [B, N]."""
    taken_R = np.asarray([p.sum() for p in self.penalty], np.float32)
    return self.reward_BN - taken_R.reshape(self.reward_BN.shape)

  def broadcast(self, advantage_BN: np.ndarray | jax.Array) -> list[np.ndarray]:
    """One number a sequence, repeated on each of its tokens, [R] of [C_r]."""
    return [
      np.full(len(tokens), a, np.float32)
      for a, tokens in zip(np.asarray(advantage_BN).reshape(-1), self.logprob)
    ]


@dataclasses.dataclass(frozen=True)
class Advantages:
  """Advantages of every token, and what else came of them."""

  advantage: Sequence[np.ndarray]  # [R] of float32 [C_r]
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  returns: Sequence[np.ndarray] | None = None  # what a critic should predict


def combine(parts: Mapping[str, tuple[float, Advantages]]) -> Advantages:
  """`A_t = sum over rules of weight * A_t`, metrics by rule.

  Args:
    parts: rule name -> (weight, its advantages); at least one.

  Returns:
    The sum. The critic's targets are those of the one rule that has some.

  Raises:
    ValueError: an advantage that is not finite, or two rules with targets.
  """
  metrics: dict[str, Any] = {}
  returns = None
  for name, (_, estimate) in parts.items():
    for row, advantage in enumerate(estimate.advantage):
      if not np.isfinite(advantage).all():
        raise ValueError(
          f"Advantage estimator {name!r} gives row {row} an advantage that is "
          "not finite. Look at that row's reward and log-probabilities."
        )
    metrics |= {f"advantage/{name}/{k}": v for k, v in estimate.metrics.items()}
    if estimate.returns is not None:
      if returns is not None:
        raise ValueError(
          f"Two of the advantage estimators {sorted(parts)} train a critic. "
          "Keep one."
        )
      returns = estimate.returns
  rows = zip(*(estimate.advantage for _, estimate in parts.values()))
  weights = [weight for weight, _ in parts.values()]
  total = [
    sum(w * a for w, a in zip(weights, row)).astype(np.float32) for row in rows
  ]
  return Advantages(total, metrics, returns)
