"""The training state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec


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


def shardings(
  opt_state: optax.OptState, params: Any, whole: NamedSharding
) -> Any:
  """The sharding of every leaf of an optimizer's state.

  An array like a parameter lies where the parameter does. Adafactor's sums over
  an axis lie like the parameter without that axis. Counters and the rest are
  replicated. These are the layouts that the compiler chooses for the state of
  an update, so that a state that starts there stays there.

  Args:
    opt_state: arrays or ShapeDtypeStructs.
    params: the trained parameters, with NamedShardings.
    whole: replicated on every device.

  Returns:
    A tree like `opt_state`.
  """
  by_path = {
    tuple(map(str, path)): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }

  def visit(path: Any, leaf: Any) -> NamedSharding:
    names = tuple(map(str, path))
    for start in range(len(names)):
      like = by_path.get(names[start:])
      if like is not None:
        return _like(leaf.shape, like, names[start - 1], whole)
    return whole

  return jax.tree_util.tree_map_with_path(visit, opt_state)


def _like(
  shape: tuple[int, ...], parameter: Any, field: str, whole: NamedSharding
) -> NamedSharding:
  """The sharding of an array that belongs to a parameter."""
  if shape == parameter.shape:
    return parameter.sharding
  if len(parameter.shape) < 2:
    return whole
  # Adafactor factors the two largest axes: rows lack the largest.
  *_, second, largest = np.argsort(parameter.shape)
  lacking = largest if field == ".v_row" else second
  rank = len(parameter.shape)
  if shape != tuple(np.delete(parameter.shape, lacking)):
    return whole  # a placeholder where adafactor keeps another sum
  spec = [*parameter.sharding.spec, *[None] * rank][:rank]
  del spec[lacking]
  return NamedSharding(parameter.sharding.mesh, PartitionSpec(*spec))
