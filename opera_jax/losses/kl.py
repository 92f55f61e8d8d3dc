"""Estimators of KL(policy || reference) at sampled tokens, per token.

All three are from J. Schulman, "Approximating KL divergence" (2020). With
`d = ref_logprob - logprob`: k1 is unbiased and signed, k2 is biased and never
negative, k3 is unbiased and never negative.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def k1(logprob: jax.Array, ref_logprob: jax.Array) -> jax.Array:
  """`-d`; any shape, float32, nats."""
  return logprob - ref_logprob


def k2(logprob: jax.Array, ref_logprob: jax.Array) -> jax.Array:
  """`d**2 / 2`; any shape, float32, nats."""
  return 0.5 * jnp.square(ref_logprob - logprob)


def k3(logprob: jax.Array, ref_logprob: jax.Array) -> jax.Array:
  """`exp(d) - d - 1`; any shape, float32, nats."""
  delta = ref_logprob - logprob
  return jnp.expm1(delta) - delta


_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def estimator(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The estimator called `name`: "k1", "k2" or "k3".

  Raises:
    ValueError: no estimator has that name.
  """
  if name not in _ESTIMATORS:
    raise ValueError(
      f"Unknown KL estimator {name!r}. Use one of {sorted(_ESTIMATORS)}."
    )
  return _ESTIMATORS[name]
