"""An exponential moving average (EMA) of the parameters, in the optimizer
state.

Checkpoints save the optimizer state, so a resumed run has the same EMA.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class EmaState:
  """The state of the wrapped optimizer, and the EMA."""

  inner: optax.OptState
  mean: Any  # a tree like the parameters


def with_ema(
  optimizer: optax.GradientTransformation, rate: float
) -> optax.GradientTransformation:
  """Adds `mean <- (1 - rate) mean + rate params` to every update of
  `optimizer`.

  Args:
    optimizer: an optax transformation.
    rate: weight of the new parameters, in (0, 1].

  Raises:
    ValueError: a rate out of its range.
  """
  if not 0 < rate <= 1:
    raise ValueError(f"The moving mean takes a rate in (0, 1], got {rate}.")

  def init(params: Any) -> EmaState:
    return EmaState(optimizer.init(params), jax.tree.map(jnp.copy, params))

  def update(
    grads: Any, state: EmaState, params: Any = None
  ) -> tuple[Any, EmaState]:
    updates, inner = optimizer.update(grads, state.inner, params)
    mean = jax.tree.map(
      lambda m, p, u: m + rate * (p + u - m), state.mean, params, updates
    )
    return updates, EmaState(inner, mean)

  return optax.GradientTransformation(init, update)
