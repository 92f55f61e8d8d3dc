"""The device mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from opera_jax.sharding import rules


def create(
  shape: dict[str, int] | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Creates a mesh of the devices with the axes `rules.MESH_AXES`.

  Args:
    shape: size of each axis; one may be -1 for all remaining devices. None puts
      every device on `fsdp`.
    devices: defaults to all of `jax.devices()`.

  Raises:
    ValueError: an unknown axis, or sizes whose product is not the number of
      devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = dict(shape or {"fsdp": -1})
  unknown = set(shape) - set(rules.MESH_AXES)
  if unknown:
    raise ValueError(
      f"Unknown mesh axis {sorted(unknown)}; axes are {rules.MESH_AXES}."
    )
  sizes = [shape.get(axis, 1) for axis in rules.MESH_AXES]
  if sizes.count(-1) > 1:
    raise ValueError(f"At most one mesh axis may be -1, got {shape}.")
  known = int(np.prod([s for s in sizes if s != -1]))
  if -1 in sizes and known and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if int(np.prod(sizes)) != len(devices) or min(sizes) < 1:
    raise ValueError(
      f"The mesh {shape} needs the product of its axes to be the number of "
      f"devices, {len(devices)}. Change config.mesh."
    )
  return Mesh(
    np.asarray(devices).reshape(sizes),
    rules.MESH_AXES,
    axis_types=(AxisType.Auto,) * len(rules.MESH_AXES),
  )


def num_data_shards(mesh: Mesh) -> int:
  """Number of shards that a batch is split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def local_mesh(mesh: Mesh) -> Mesh | None:
  """This process's part of the mesh, if it holds a whole model; otherwise None.

  It does if only the axis "data", along which parameters are replicated, spans
  several hosts.
  """
  local = mesh.local_mesh
  split = [axis for axis in mesh.shape if axis != "data"]
  whole = all(local.shape[axis] == mesh.shape[axis] for axis in split)
  return local if whole else None
