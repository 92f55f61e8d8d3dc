"""Exponents of log-probability differences, kept where float32 is finite.

`exp` overflows float32 from 88.7 on, and an infinite ratio times an advantage
of 0 is NaN. A difference of 20 nats is already a ratio of 5e8: no estimate
made of such a token is worth its variance.
"""

import jax
import jax.numpy as jnp

BOUND = 20.0  # nats


def bounded(difference: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Clips a difference of log-probabilities to [-BOUND, BOUND].

  An infinite difference stays as it is: it comes of a broken model, and the
  loss must show it.

  Args:
    difference: float32, nats; any shape.

  Returns:
    The clipped difference, whose gradient is 0 where it was clipped, and bool
    flags of the same shape that say where.
  """
  beyond = (jnp.abs(difference) > BOUND) & jnp.isfinite(difference)
  return jnp.where(
    beyond, jnp.clip(difference, -BOUND, BOUND), difference
  ), beyond
