"""The perplexity-reduction reward from one pass over the tokens.

A slot's sum has a fixed order, so two runs agree on which gains are positive:
on a CPU a sequential scatter into 32 lanes a slot, elsewhere, where a scatter
would add in any order, a fused reduction over the row for each slot.

Shape key: R rows, M tokens of a row, S slots, B prompts, N samples a prompt.
"""

import jax
import jax.numpy as jnp

from opera_jax.kernels import target
from opera_jax.kernels.perplexity_reward import reference


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


def _scatter(x_RM, continuation_RM, S):
  """Sums by slot, [R, S]; 32 short sums each keep the rounding small."""
  R, M = x_RM.shape
  row_R1, lane_1M = jnp.arange(R)[:, None], jnp.arange(M)[None] % 32
  slot_RM = jnp.where(continuation_RM < 0, S, continuation_RM)
  lanes_RLS = jnp.zeros((R, 32, S), jnp.float32)
  lanes_RLS = lanes_RLS.at[row_R1, lane_1M, slot_RM].add(x_RM, mode="drop")
  return jnp.sum(lanes_RLS, axis=1)


def _reduce(x_RM, continuation_RM, S):
  """Sums by slot, [R, S], as one fused reduction."""
  mine_RSM = continuation_RM[:, None, :] == jnp.arange(S)[None, :, None]
  return jnp.sum(jnp.where(mine_RSM, x_RM[:, None, :], 0.0), axis=-1)
