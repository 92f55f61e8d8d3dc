"""DPO (arXiv 2305.18290): prefers the better of two samples.

Shape key: P pairs.
"""

import jax
import jax.numpy as jnp


def dpo(
  better_P: jax.Array,
  worse_P: jax.Array,
  better_ref_P: jax.Array,
  worse_ref_P: jax.Array,
  *,
  beta: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
  """`-log sigmoid(beta (log p/p_ref of better - log p/p_ref of worse))`.

  Args:
    better_P: float32, log-probability of the whole preferred completion.
    worse_P: the same for the rejected completion.
    better_ref_P: log-probability of the preferred one under the frozen
      reference.
    worse_ref_P: the same for the rejected completion.
    beta: strength of the reference constraint, positive.

  Returns:
    The loss of each pair and its margin `beta (...)`, float32 [P].

  Raises:
    ValueError: beta of 0 or less.
  """
  if beta <= 0:
    raise ValueError(f"DPO takes a positive beta, got {beta}. 0.1 is usual.")
  gain_P = (better_P - better_ref_P) - (worse_P - worse_ref_P)
  margin_P = beta * gain_P
  return jax.nn.softplus(-margin_P), jax.lax.stop_gradient(margin_P)


def paired_sums(
  value_RT: jax.Array, weight_RT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Sums the tokens of each row; returns the first and the second half of rows.

  Rows hold the better sample of every pair first, then the worse ones in the
  same order.

  Returns:
    float32 [P] each, R = 2 P.

  Raises:
    ValueError: an odd number of rows.
  """
  rows = value_RT.shape[0]
  if rows % 2:
    raise ValueError(
      f"Preference pairs take an even number of rows, got {rows}. Give the "
      "better samples first, then the worse ones."
    )
  kept_RT = jnp.where(weight_RT > 0, value_RT, 0.0).astype(jnp.float32)
  sum_R = jnp.sum(kept_RT, axis=1)
  return sum_R[: rows // 2], sum_R[rows // 2 :]
