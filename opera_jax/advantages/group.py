"""Group-relative advantages: rewards compared within the samples of a prompt.

Shape key: B prompts, N samples of a prompt.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Relative rounding error of a reward, which is a float32 sum of a few terms.
_NOISE = 8 * float(np.finfo(np.float32).eps)


def grpo(
  reward_BN: jax.Array | np.ndarray,
  *,
  epsilon: float = 1e-6,
  ddof: int = 1,
  scale_by_std: bool = True,
) -> jax.Array:
  """GRPO (arXiv 2402.03300): `A = (R - mean) / (std + epsilon)` per prompt.

  Args:
    reward_BN: float rewards.
    epsilon: added to the standard deviation.
    ddof: 1 divides the sum of squares by N - 1, 0 by N.
    scale_by_std: False omits the division by the standard deviation (Dr.GRPO).

  Returns:
    float32 [B, N]; each group sums to 0 up to rounding. A group whose rewards
    are equal (see `has_different_rewards`) gets exactly 0.

  Raises:
    ValueError: fewer than 2 samples, or a reward that is not finite.
  """
  reward_BN = _checked(reward_BN)
  if ddof not in (0, 1):
    raise ValueError(f"ddof must be 0 or 1, got {ddof}.")
  spread_B1 = has_different_rewards(reward_BN)[:, None]
  centred_BN = jnp.where(spread_B1, _centred(reward_BN), 0.0)
  if not scale_by_std:
    return centred_BN
  samples = reward_BN.shape[1]
  squares_B1 = jnp.sum(jnp.square(centred_BN), axis=1, keepdims=True)
  # The gradient of sqrt is infinite at 0, so groups of equal rewards use 1.
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


def over_batch(value_BN: np.ndarray, *, epsilon: float = 1e-6) -> np.ndarray:
  """`(A - mean) / (std + epsilon)` over all samples of a step, [B, N].

  The std divides by the number of samples less 1. Equal values become 0.
  """
  if value_BN.size < 2:
    return np.zeros_like(value_BN)
  centred_BN = value_BN - value_BN.mean()
  return centred_BN / (centred_BN.std(ddof=1) + epsilon)


def has_different_rewards(reward_BN: jax.Array | np.ndarray) -> jax.Array:
  """Whether a group's rewards differ by more than their rounding error.

  A reward is a float32 sum of a few terms, so equal rewards may differ in their
  last bits. Divided by their tiny standard deviation, such differences would
  become advantages of order 1.

  Args:
    reward_BN: float rewards.

  Returns:
    bool [B]: whether the range of a group exceeds 8 float32 epsilons of its
    largest absolute reward.
  """
  return _has_different_rewards(jnp.asarray(reward_BN, jnp.float32))


@jax.jit
def _has_different_rewards(reward_BN: jax.Array) -> jax.Array:
  range_B = jnp.max(reward_BN, axis=1) - jnp.min(reward_BN, axis=1)
  noise_B = _NOISE * jnp.max(jnp.abs(reward_BN), axis=1)
  return range_B > noise_B


def _centred(reward_BN: jax.Array) -> jax.Array:
  """Subtracts each group's mean, with a second pass against rounding."""
  # The rounding error of the mean is the same for the whole group. The mean of
  # the differences is small, so its own rounding error does not matter.
  centred_BN = reward_BN - jnp.mean(reward_BN, axis=1, keepdims=True)
  return centred_BN - jnp.mean(centred_BN, axis=1, keepdims=True)


def _checked(reward_BN: jax.Array | np.ndarray) -> jax.Array:
  """Checks shape and values; values only outside of a trace."""
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
        "scored on."
      )
  return jnp.asarray(reward_BN, jnp.float32)
