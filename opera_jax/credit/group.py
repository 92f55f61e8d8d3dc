"""Advantages of a group of samples of one prompt, relative to each other.

Shape key: B prompts, N samples a prompt.
"""

import jax
import jax.numpy as jnp
import numpy as np


def grpo(
  reward_BN: jax.Array | np.ndarray,
  *,
  epsilon: float = 1e-6,
  ddof: int = 1,
  scale_by_std: bool = True,
) -> jax.Array:
  """GRPO (arXiv 2402.03300): `A = (R - mean) / (std + epsilon)` by prompt.

  Args:
    reward_BN: float rewards.
    epsilon: added to the standard deviation.
    ddof: 1 divides the variance by N - 1, 0 by N.
    scale_by_std: False leaves out the division (Dr.GRPO).

  Returns:
    float32 [B, N]. A group of equal rewards gets exactly 0.

  Raises:
    ValueError: fewer than 2 samples, or a reward that is not finite.
  """
  reward_BN = _checked(reward_BN)
  if ddof not in (0, 1):
    raise ValueError(f"ddof must be 0 or 1, got {ddof}.")
  spread_B1 = _spread(reward_BN)
  centred_BN = jnp.where(spread_B1, _centred(reward_BN), 0.0)
  if not scale_by_std:
    return centred_BN
  samples = reward_BN.shape[1]
  squares_B1 = jnp.sum(jnp.square(centred_BN), axis=1, keepdims=True)
  # sqrt has no gradient at 0; equal groups take the root of 1 instead.
  variance_B1 = jnp.where(spread_B1, squares_B1 / (samples - ddof), 1.0)
  return centred_BN / (jnp.sqrt(variance_B1) + epsilon)


def dr_grpo(reward_BN: jax.Array | np.ndarray) -> jax.Array:
  """Dr.GRPO (arXiv 2503.20783): `A = R - mean`, float32 [B, N].

  Raises:
    ValueError: fewer than 2 samples, or a reward that is not finite.
  """
  return grpo(reward_BN, scale_by_std=False)


def rloo(reward_BN: jax.Array | np.ndarray) -> jax.Array:
  """RLOO (arXiv 2402.14740): `A_i = R_i - mean of the others`, float32 [B, N].

  Raises:
    ValueError: fewer than 2 samples, or a reward that is not finite.
  """
  centred_BN = dr_grpo(reward_BN)
  samples = centred_BN.shape[1]
  return centred_BN * (samples / (samples - 1))


def _centred(reward_BN: jax.Array) -> jax.Array:
  return reward_BN - jnp.mean(reward_BN, axis=1, keepdims=True)


def _spread(reward_BN: jax.Array) -> jax.Array:
  """Whether a group's rewards differ at all, bool [B, 1].

  The mean of equal numbers is rounded, and dividing the rounding error by
  `epsilon` would make an advantage of it.
  """
  highest_B1 = jnp.max(reward_BN, axis=1, keepdims=True)
  return highest_B1 > jnp.min(reward_BN, axis=1, keepdims=True)


def _checked(reward_BN: jax.Array | np.ndarray) -> jax.Array:
  if reward_BN.ndim != 2:
    raise ValueError(
      f"Rewards come as [prompts, samples], got shape {reward_BN.shape}."
    )
  if reward_BN.shape[1] < 2:
    raise ValueError(
      "Group-relative advantage needs at least 2 samples a prompt, got "
      f"{reward_BN.shape[1]}. Raise config.rl.samples."
    )
  if not isinstance(reward_BN, jax.core.Tracer):
    wrong = np.argwhere(~np.isfinite(np.asarray(reward_BN, np.float32)))
    if wrong.size:
      prompt, sample = wrong[0]
      raise ValueError(
        f"The reward of prompt {prompt}, sample {sample} is "
        f"{float(reward_BN[prompt, sample])}; rewards must be finite. Look "
        "at that sample's log-probabilities and at the reference it was "
        "priced on."
      )
  return jnp.asarray(reward_BN, jnp.float32)
