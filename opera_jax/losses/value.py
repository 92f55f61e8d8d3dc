"""The critic's loss of PPO, per token.

Shape key: R rows, T tokens of a row.
"""

import jax
import jax.numpy as jnp


def clipped_value(
  value_RT: jax.Array,
  old_value_RT: jax.Array,
  return_RT: jax.Array,
  *,
  clip: float = 0.2,
) -> jax.Array:
  """`max((v - G)^2, (old + clip(v - old, -c, c) - G)^2) / 2`.

  PPO's clipped value loss (arXiv 1707.06347, as implemented there).

  Args:
    value_RT: float32, the critic's value before each token.
    old_value_RT: the same, before this step's updates.
    return_RT: float32, the critic's target.
    clip: c, positive.

  Returns:
    float32 [R, T].

  Raises:
    ValueError: a bound of 0 or less.
  """
  if clip <= 0:
    raise ValueError(f"The value clip must be positive, got {clip}.")
  near_RT = old_value_RT + jnp.clip(value_RT - old_value_RT, -clip, clip)
  return 0.5 * jnp.maximum(
    jnp.square(value_RT - return_RT), jnp.square(near_RT - return_RT)
  )
