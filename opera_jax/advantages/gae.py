"""Generalised advantage estimation (arXiv 1506.02438), for PPO's critic."""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.advantages import inputs as inputs_lib


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
  """Token advantages from a critic's values.

  The reward falls on the last token; a KL penalty, where the run takes it off
  the reward, on each. `whiten` brings the step's advantages to mean 0 and
  deviation 1, as PPO implementations do.
  """

  gamma: float = 1.0
  lam: float = 1.0
  whiten: bool = True

  def __post_init__(self):
    """Refuses discounts outside of 0..1."""
    if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
      raise ValueError(
        f"GAE takes gamma and lam from 0 to 1, got {self.gamma}, {self.lam}."
      )

  def scoring_requests(
    self, rollouts: structs.Rollouts, reward_BN: np.ndarray
  ) -> dict[str, inputs_lib.ScoringRequest]:
    """Nothing: the critic's values come with the inputs."""
    return {}

  def advantages(
    self, inputs: inputs_lib.AdvantageInputs
  ) -> inputs_lib.Advantages:
    """Advantages, and the returns that the critic should predict.

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
      paid = -penalty.astype(np.float64)
      paid[-1:] += reward
      mine = estimate(paid, value, gamma=self.gamma, lam=self.lam)
      advantage.append(mine)
      returns.append((mine + value).astype(np.float32))
    if self.whiten:
      every = np.concatenate(advantage)
      mean, scale = every.mean(), every.std() + 1e-8
      advantage = [(a - mean) / scale for a in advantage]
    return inputs_lib.Advantages(
      [a.astype(np.float32) for a in advantage], returns=returns
    )


def estimate(
  reward_T: np.ndarray, value_T: np.ndarray, *, gamma: float, lam: float
) -> np.ndarray:
  """`A_t = d_t + gamma lam A_{t+1}`, `d_t = r_t + gamma V_{t+1} - V_t`.

  Args:
    reward_T: float [T], what is paid at each token.
    value_T: float [T], the critic's value before each token; 0 at the end.
    gamma: discount of rewards.
    lam: 0 trusts the critic, 1 the returns.

  Returns:
    float64 [T].
  """
  ahead_T = np.append(value_T[1:], 0.0)[: len(value_T)]
  delta_T = reward_T + gamma * ahead_T - value_T
  advantage_T, after = np.zeros(len(delta_T)), 0.0
  for t in reversed(range(len(delta_T))):
    after = delta_T[t] + gamma * lam * after
    advantage_T[t] = after
  return advantage_T
