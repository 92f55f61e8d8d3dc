"""The perplexity-reduction reward by its definition: a loop over slots.

Shape key: R rows, M tokens of a row, S slots, B prompts, N samples of a prompt.
"""

import jax
import jax.numpy as jnp


def perplexity_reward(
  logprob_RM: jax.Array,
  continuation_RM: jax.Array,
  previous_RS: jax.Array,
  *,
  tau: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """mean, gain, count and tanh(count / tau); see `api.perplexity_reward`."""
  S = previous_RS.shape[1]
  means, filled = [], []
  for slot in range(S):
    mine_RM = continuation_RM == slot
    size_R = jnp.sum(mine_RM, axis=1)
    total_R = jnp.sum(jnp.where(mine_RM, logprob_RM, 0.0), axis=1)
    means.append(total_R / jnp.maximum(size_R, 1))
    filled.append(size_R > 0)
  mean_RS = jnp.stack(means, axis=1)
  filled_RS = jnp.stack(filled, axis=1)
  before_RS = jnp.clip(previous_RS, 0, S - 1)
  compared_RS = (
    (previous_RS >= 0)
    & (previous_RS < S)
    & filled_RS
    & jnp.take_along_axis(filled_RS, before_RS, axis=1)
  )
  change_RS = mean_RS - jnp.take_along_axis(mean_RS, before_RS, axis=1)
  gain_RS = jnp.where(compared_RS, change_RS, 0.0)
  count_R = jnp.sum(gain_RS > 0, axis=1, dtype=jnp.int32)
  return mean_RS, gain_RS, count_R, jnp.tanh(count_R / tau)


def group_rank(score_BN: jax.Array) -> jax.Array:
  """#{k != i: score_k < score_i} / (N - 1)."""
  below_BNN = score_BN[:, None, :] < score_BN[:, :, None]
  return jnp.sum(below_BNN, axis=-1) / (score_BN.shape[1] - 1)
