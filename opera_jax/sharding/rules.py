"""One table a purpose: logical axis -> mesh axis.

TRAIN shards parameters over fsdp and tensor; ROLLOUT keeps them whole over
fsdp, because a decode step cannot afford to gather weights a token at a time.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

TRAIN = {
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "norm": None,
}
ROLLOUT = {**TRAIN, "embed": None}
ACTIVATIONS = {
  "batch": ("data", "fsdp"),
  "length": None,
  "heads": "tensor",
  "mlp": "tensor",
  None: None,
}


def spec(axes: tuple[str | None, ...], rules: dict[str, Any]) -> PartitionSpec:
  """The PartitionSpec of one array with logical `axes`."""
  return PartitionSpec(*(rules[name] for name in axes))


def shardings(axes_tree: Any, mesh: jax.sharding.Mesh, rules: dict[str, Any]):
  """A tree of NamedShardings from a tree of logical axes."""
  return jax.tree.map(
    lambda axes: NamedSharding(mesh, spec(axes, rules)),
    axes_tree,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def implementation() -> str | None:
  """Which kernel a jitted program may take: None lets the kernel choose.

  The partitioner cannot split a Pallas call, so a program over a mesh of more
  than one device takes the streaming one, which it can.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else "xla"


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Pins an activation's layout on the mesh in force; nothing without one.

  An axis that the mesh does not divide stays whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  parts = []
  for size, name in zip(x.shape, axes):
    axis = ACTIVATIONS[name]
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    ways = 1
    for n in names:
      ways *= mesh.shape[n]
    parts.append(axis if ways and size % ways == 0 else None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))
