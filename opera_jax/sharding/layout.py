"""Moves trees between layouts, and between the host and the mesh.

Only `to_devices` and `to_host` transfer between host and mesh. On several hosts
each process holds only the shards of its own devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opera_jax.sharding import clock
from opera_jax.sharding import rules as rules_lib


def check(shapes: Any, axes: Any, mesh: Mesh, rules: dict[str, Any]) -> None:
  """Raises one error that names every parameter axis the mesh does not divide.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs.
    axes: tree of logical axes, of the same structure.
    mesh: the mesh.
    rules: TRAIN or ROLLOUT.

  Raises:
    ValueError: lists each indivisible axis with its size.
  """
  wrong = []

  def visit(path: Any, leaf: Any, names: Any) -> None:
    for size, name in zip(leaf.shape, names):
      axis = rules[name]
      if size % rules_lib.num_shards(axis, mesh):
        wrong.append(
          f"{jax.tree_util.keystr(path)}: {name} has {size}, mesh axis "
          f"{axis!r} has {rules_lib.num_shards(axis, mesh)}"
        )

  jax.tree_util.tree_map_with_path(visit, shapes, axes)
  if wrong:
    raise ValueError(
      "A sharded axis must be a multiple of its mesh axis. Change "
      "config.mesh or the model's sizes:\n  " + "\n  ".join(wrong)
    )


def move(
  tree: Any,
  axes: Any,
  mesh: Mesh,
  rules: dict[str, Any],
  *,
  dtype: str | None = None,
) -> Any:
  """Reshards `tree` on `mesh` by `rules`, and casts it to `dtype` if given.

  The cast comes first, so that the communication is in `dtype`.
  """
  if dtype is not None:
    tree = cast(tree, dtype)
  return jax.device_put(tree, rules_lib.shardings(axes, mesh, rules))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: first axis over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of a full copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def to_devices(tree: Any, sharding: NamedSharding) -> Any:
  """Places host arrays on the mesh, without communication.

  Args:
    tree: numpy arrays, scalars, or arrays on one device (random keys too);
      equal on every process; each keeps the shards of its devices.
    sharding: of every leaf, e.g. `batch_sharding(mesh)` or `replicated(mesh)`.

  Returns:
    The tree of global arrays.
  """
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)

  def place(leaf: Any) -> jax.Array:
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
      data = place(jax.random.key_data(leaf))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index]
    )

  return jax.tree.map(place, tree)


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
  """Indices of the rows of a batch of `count` that this process's devices hold,
  ascending."""
  places = batch_sharding(mesh).addressable_devices_indices_map((count,))
  return np.unique(
    np.concatenate([np.arange(count)[index] for index in places.values()])
  )


def from_local_rows(tree: Any, mesh: Mesh, count: int) -> Any:
  """Assembles a batch of `count` rows from each process's `local_rows`."""
  return jax.tree.map(
    lambda leaf: jax.make_array_from_process_local_data(
      batch_sharding(mesh), leaf, (count, *leaf.shape[1:])
    ),
    tree,
  )


def local_copy(tree: Any, mesh: Mesh) -> Any:
  """The copy of a tree on this process's devices, without communication.

  Args:
    tree: arrays on a mesh on which each host has a full copy
      (`mesh.local_mesh`).
    mesh: of this process's devices only.
  """
  return jax.tree.map(
    lambda x: jax.make_array_from_single_device_arrays(
      x.shape,
      NamedSharding(mesh, x.sharding.spec),
      [shard.data for shard in x.addressable_shards],
    ),
    tree,
  )


def to_host(tree: Any) -> Any:
  """Gathers full arrays as numpy on every process; blocks until they are ready.

  Every process must call it with the same arrays in the same order.
  """
  leaves, shape = jax.tree.flatten(tree)
  sharded = [
    i
    for i, x in enumerate(leaves)
    if isinstance(x, jax.Array)
    and not (x.is_fully_addressable or x.is_fully_replicated)
  ]
  if sharded:
    mesh = leaves[sharded[0]].sharding.mesh
    whole = _gather(mesh)([leaves[i] for i in sharded])
    for i, leaf in zip(sharded, whole):
      leaves[i] = leaf
  with clock.waiting():
    leaves = jax.device_get(leaves)
  return jax.tree.unflatten(shape, leaves)


@functools.partial(jax.jit, static_argnames="dtype")
def cast(tree: Any, dtype: str) -> Any:
  """The tree in another dtype, in the same layout."""
  return jax.tree.map(lambda x: x.astype(dtype), tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[list[jax.Array]], list[jax.Array]]:
  return jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))
