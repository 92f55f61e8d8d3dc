"""The training state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
  """Parameters and optimizer after `step` updates; `key` never changes.

  A random key of update i is `jax.random.fold_in(state.key, i)`, so a resumed
  run uses the same keys as an uninterrupted one.
  """

  step: Any  # [] int32, updates made so far
  params: Any  # tree of arrays
  opt_state: optax.OptState
  key: Any  # [] typed PRNG key


def create(
  params: Any, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """The state before the first update; `params` are referenced, not copied."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=key,
  )
