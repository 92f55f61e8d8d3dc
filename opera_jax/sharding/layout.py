"""Moves a tree of arrays from one table's layout to another's."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opera_jax.sharding import rules as rules_lib


def check(shapes: Any, axes: Any, mesh: Mesh, rules: dict[str, Any]) -> None:
  """Raises one error naming every parameter axis that the mesh cannot split.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs.
    axes: tree of logical axes, of the same structure.
    mesh: the mesh.
    rules: TRAIN or ROLLOUT.

  Raises:
    ValueError: lists each indivisible axis with its size.
  """
  wrong = []

  def visit(path, leaf, names):
    for size, name in zip(leaf.shape, names):
      axis = rules[name]
      if axis is not None and size % mesh.shape[axis]:
        wrong.append(
          f"{jax.tree_util.keystr(path)}: {name} has {size}, mesh axis "
          f"{axis!r} has {mesh.shape[axis]}"
        )

  jax.tree_util.tree_map_with_path(visit, shapes, axes)
  if wrong:
    raise ValueError(
      "A sharded axis must be a multiple of its mesh axis. Change "
      "config.mesh or the model's sizes:\n  " + "\n  ".join(wrong)
    )


def move(tree: Any, axes: Any, mesh: Mesh, rules: dict[str, Any]) -> Any:
  """`tree` laid out on `mesh` by `rules`; values unchanged."""
  return jax.device_put(tree, rules_lib.shardings(axes, mesh, rules))


def rows(mesh: Mesh) -> NamedSharding:
  """The layout of a batch: first axis over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  """One whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())
