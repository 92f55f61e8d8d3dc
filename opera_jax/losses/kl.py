"""Estimators of KL(policy || reference) at sampled tokens, per token.

All three are from J. Schulman, "Approximating KL divergence" (2020). With
`d = ref_logprob - logprob`: k1 is unbiased and signed, k2 is biased and never
negative, k3 is unbiased and never negative.

These statements are about values. In a loss, the gradient at fixed samples
matters: that of k2 is an unbiased estimate of the gradient of KL(policy ||
reference), that of k3 estimates the gradient of KL(reference || policy), and
that of k1 is `grad logprob`, independent of the reference, with mean 0. So k1
can only be used as a penalty in the reward, see `estimator`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opera_jax.losses import exponent


def k1(logprob: jax.Array, ref_logprob: jax.Array) -> jax.Array:
  """`-d`; any shape, float32, nats."""
  return logprob - ref_logprob


def k2(logprob: jax.Array, ref_logprob: jax.Array) -> jax.Array:
  """`d**2 / 2`; any shape, float32, nats."""
  return 0.5 * jnp.square(ref_logprob - logprob)


def k3(logprob: jax.Array, ref_logprob: jax.Array) -> jax.Array:
  """`exp(d) - d - 1`; any shape, float32, nats.

  `d` is clipped by `exponent.bounded`: a token beyond the bound has a finite
  value and no gradient.
  """
  delta, _ = exponent.bounded(ref_logprob - logprob)
  return jnp.expm1(delta) - delta


_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
NAMES = tuple(_ESTIMATORS)


def estimator(
  name: str, *, in_loss: bool = False
) -> Callable[[Any, Any], jax.Array]:
  """The estimator called `name`: "k1", "k2" or "k3".

  Args:
    name: of the estimator.
    in_loss: whether its gradient is used; otherwise only its value.

  Raises:
    ValueError: no estimator has that name, or k1 in a loss.
  """
  if name not in _ESTIMATORS:
    raise ValueError(
      f"Unknown KL estimator {name!r}. Use one of {sorted(_ESTIMATORS)}."
    )
  if in_loss and name == "k1":
    raise ValueError(
      "The gradient of the KL estimator k1 is that of the log-probability and "
      "does not depend on the reference, so it is useless in a loss. "
      'Use config.rl.kl_estimator="k2" or "k3", or put k1 into the reward '
      'with config.rl.kl_in="reward".'
    )
  return _ESTIMATORS[name]
