"""One sharding table per purpose: logical axis -> mesh axis.

TRAIN shards parameters over fsdp, sequence and tensor. ROLLOUT shards them over
tensor only, because gathering weights in every decode step is too slow.
ACTIVATIONS splits rows over data and fsdp, and their length over sequence.
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Axis = str | tuple[str, ...] | None

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

TRAIN = {
  "layers": None,
  "vocab": "tensor",
  "embed": ("fsdp", "sequence"),
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "norm": None,
  "rank": None,
}
ROLLOUT = {**TRAIN, "embed": None}
ACTIVATIONS = {
  "batch": ("data", "fsdp"),
  "length": "sequence",
  "heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",
  "features": TRAIN["embed"],
  None: None,
}


def spec(axes: tuple[str | None, ...], rules: dict[Any, Any]) -> PartitionSpec:
  """The PartitionSpec of one array with logical `axes`."""
  return PartitionSpec(*(rules[name] for name in axes))


def shardings(axes_tree: Any, mesh: jax.sharding.Mesh, rules: dict[str, Any]):
  """A tree of NamedShardings from a tree of logical axes."""
  return jax.tree.map(
    lambda axes: NamedSharding(mesh, spec(axes, rules)),
    axes_tree,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def is_single_device() -> bool:
  """Whether the mesh in context has at most one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def num_shards(axis: Axis, mesh: Mesh | AbstractMesh) -> int:
  """Number of shards along one mesh axis, or along several together."""
  names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
  return math.prod(mesh.shape[name] for name in names)


def activation_axis(name: str | None, size: int) -> Axis:
  """The mesh axes of an activation's axis; None if they do not divide it."""
  axis = ACTIVATIONS[name]
  shards = num_shards(axis, jax.sharding.get_abstract_mesh())
  return axis if size % shards == 0 else None


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Constrains an activation's sharding on the mesh in context, if there is
  one.

  An axis that the mesh does not divide is replicated.
  """
  if is_single_device():
    return x
  parts = [activation_axis(name, size) for size, name in zip(x.shape, axes)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))
