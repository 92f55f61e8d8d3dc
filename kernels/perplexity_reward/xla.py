"""The perplexity-reduction reward in one pass over the tokens.

Each slot is summed in a fixed order, so that two runs agree on which gains are
positive. A CPU scatters the tokens one by one into 32 partial sums per slot.
Elsewhere a scatter would add in any order, so each slot is one fused reduction
over the row.

Shape key: R rows, M tokens of a row, S slots, P partial sums of a slot,
B prompts, N samples of a prompt.
"""

import jax
import jax.numpy as jnp

from opera_jax.kernels import target
from opera_jax.kernels.perplexity_reward import reference

PARTIAL_SUMS = 32


def perplexity_reward(
  logprob_RM: jax.Array,
  continuation_RM: jax.Array,
  previous_RS: jax.Array,
  *,
  tau: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Computes `api.perplexity_reward` without a loop over slots."""
  S = previous_RS.shape[1]
  slot_S = jnp.arange(S)
  add_up = _scatter if target.platform() == "cpu" else _reduce
  total_RS = add_up(logprob_RM, continuation_RM, S)
  size_RS = add_up(jnp.ones_like(logprob_RM), continuation_RM, S)
  mean_RS = total_RS / jnp.maximum(size_RS, 1.0)
  # The mean of an empty slot is NaN, which no comparison counts as a gain.
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
  """The definition; XLA fuses its comparisons into one reduction."""
  return reference.group_rank(score_BN)


def _scatter(x_RM: jax.Array, continuation_RM: jax.Array, S: int) -> jax.Array:
  """Sums by slot, [R, S], from partial sums, which keep the rounding small."""
  R, M = x_RM.shape
  row_R1 = jnp.arange(R)[:, None]
  partial_1M = jnp.arange(M)[None] % PARTIAL_SUMS
  slot_RM = jnp.where(continuation_RM < 0, S, continuation_RM)
  sum_RPS = jnp.zeros((R, PARTIAL_SUMS, S), jnp.float32)
  sum_RPS = sum_RPS.at[row_R1, partial_1M, slot_RM].add(x_RM, mode="drop")
  return jnp.sum(sum_RPS, axis=1)


def _reduce(x_RM: jax.Array, continuation_RM: jax.Array, S: int) -> jax.Array:
  """Sums by slot, [R, S], as one fused reduction."""
  mine_RSM = continuation_RM[:, None, :] == jnp.arange(S)[None, :, None]
  return jnp.sum(jnp.where(mine_RSM, x_RM[:, None, :], 0.0), axis=-1)
