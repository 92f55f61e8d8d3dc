"""Bounds differences of log-probabilities so that their exponentials are
finite.

`exp` overflows float32 from 88.7 on, and an infinite ratio times an advantage
of 0 is NaN. A difference of 20 nats is already a ratio of 5e8, and an estimate
from such a token has too much variance to be useful.
"""

import jax
import jax.numpy as jnp

BOUND = 20.0  # nats


def bounded(difference: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Clips a difference of log-probabilities to [-BOUND, BOUND].

  An infinite difference is not clipped: it comes from a broken model, and the
  loss must show it.

  Args:
    difference: float32, nats; any shape.

  Returns:
    The clipped difference, with gradient 0 where it was clipped, and bool flags
    of the same shape that mark these places.
  """
  beyond = (jnp.abs(difference) > BOUND) & jnp.isfinite(difference)
  return jnp.where(
    beyond, jnp.clip(difference, -BOUND, BOUND), difference
  ), beyond
