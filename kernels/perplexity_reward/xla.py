"""The perplexity-reduction reward in two fused reductions.

Every slot's sum is a reduction over all tokens of the row, not a scatter: its
order is fixed, so two runs agree on which gains are positive.

Shape key: R rows, M tokens of a row, S slots, B prompts, N samples a prompt.
"""

import jax
import jax.numpy as jnp

from kernels.perplexity_reward import reference


def perplexity_reward(
  logprob_RM: jax.Array,
  branch_RM: jax.Array,
  previous_RS: jax.Array,
  *,
  tau: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Computes `api.perplexity_reward` without a loop over slots."""
  slot_S = jnp.arange(previous_RS.shape[1])
  mine_RSM = branch_RM[:, None, :] == slot_S[None, :, None]
  total_RS = jnp.sum(jnp.where(mine_RSM, logprob_RM[:, None, :], 0.0), axis=-1)
  size_RS = jnp.sum(mine_RSM, axis=-1)
  mean_RS = total_RS / jnp.maximum(size_RS, 1)
  # An empty slot carries NaN, which no comparison takes for a gain.
  known_RS = jnp.where(size_RS > 0, mean_RS, jnp.nan)
  is_previous_RSS = previous_RS[:, :, None] == slot_S[None, None]
  before_RS = jnp.sum(
    jnp.where(is_previous_RSS, known_RS[:, None, :], 0.0), axis=-1
  )
  change_RS = known_RS - before_RS
  compared_RS = jnp.any(is_previous_RSS, axis=-1) & ~jnp.isnan(change_RS)
  gain_RS = jnp.where(compared_RS, change_RS, 0.0)
  count_R = jnp.sum(gain_RS > 0, axis=1, dtype=jnp.int32)
  return mean_RS, gain_RS, count_R, jnp.tanh(count_R / tau)


def group_rank(score_BN: jax.Array) -> jax.Array:
  """The definition: XLA fuses its comparisons into one reduction."""
  return reference.group_rank(score_BN)
