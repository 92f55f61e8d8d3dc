"""Generalised advantage estimation (arXiv 1506.02438), for PPO's critic."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """Token advantages from a critic's values.

  The reward is paid at the last token. If the run subtracts a KL penalty from
  the reward, it is subtracted at every token. `whiten` normalises the step's
  advantages to mean 0 and standard deviation 1, as PPO implementations do.
  """

  gamma: float = 1.0
  lam: float = 1.0
  whiten: bool = True

  def __post_init__(self):
    """Refuses gamma and lam outside 0..1."""
    if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
      raise ValueError(
        f"GAE takes gamma and lam from 0 to 1, got {self.gamma}, {self.lam}."
      )

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """No log-probabilities: the critic's values are part of the inputs."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """GAE per token, and the returns as the critic's targets.

    Raises:
      ValueError: the run has no critic.
    """
    if inputs.value is None:
      raise ValueError(
        "Advantage estimator 'gae' needs a critic's values. Set "
        "config.rl.value_coef above 0."
      )
    reward_R = inputs.reward_BN.reshape(-1)
    advantage, returns = [], []
    for value, penalty, reward in zip(inputs.value, inputs.penalty, reward_R):
      reward_T = -penalty.astype(np.float64)
      reward_T[-1:] += reward
      advantage_T = estimate(reward_T, value, gamma=self.gamma, lam=self.lam)
      advantage.append(advantage_T)
      returns.append((advantage_T + value).astype(np.float32))
    if self.whiten:
      all_tokens = np.concatenate(advantage)
      mean, scale = all_tokens.mean(), all_tokens.std() + 1e-8
      advantage = [(a - mean) / scale for a in advantage]
    return inputs_lib.Advantages(
      [a.astype(np.float32) for a in advantage], returns=returns
    )


def estimate(
  reward_T: np.ndarray, value_T: np.ndarray, *, gamma: float, lam: float
) -> np.ndarray:
  """`A_t = d_t + gamma lam A_{t+1}`, `d_t = r_t + gamma V_{t+1} - V_t`.

  Args:
    reward_T: float [T], reward of each token.
    value_T: float [T], the critic's value of the state before each token; the
      value after the last token is 0.
    gamma: discount factor.
    lam: 0 is the critic's one-step estimate, 1 the Monte Carlo return.

  Returns:
    float64 [T].
  """
  next_value_T = np.append(value_T[1:], 0.0)[: len(value_T)]
  delta_T = reward_T + gamma * next_value_T - value_T
  advantage_T, next_advantage = np.zeros(len(delta_T)), 0.0
  for t in reversed(range(len(delta_T))):
    next_advantage = delta_T[t] + gamma * lam * next_advantage
    advantage_T[t] = next_advantage
  return advantage_T
