"""The device mesh, laid on the torus of a TPU slice."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from opera_jax.sharding import rules

# Sides of a slice that are a multiple of it close to rings; elsewhere 4.
_RINGS = {"TPU v5 lite": 16, "TPU v6 lite": 16}


def create(
  shape: dict[str, int] | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Creates a mesh of the devices with the axes `rules.MESH_AXES`.

  On a TPU slice whose sides close to rings the axes take whole sides, where
  they divide so. Elsewhere the devices keep JAX's order, host by host: the last
  axis is then a block of neighbours, two chips wide, around which a ring closes
  (of 8 chips: two links each), while a row that ends has one link. With several
  slices `data` spans them, since it alone sends nothing in a forward pass.

  Args:
    shape: size of each axis; one may be -1 for all remaining devices. None puts
      every device on `fsdp`.
    devices: defaults to all of `jax.devices()`.

  Raises:
    ValueError: an unknown axis, sizes whose product is not the number of
      devices, or several slices over which `data` does not divide.
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
    _arranged(sizes, devices),
    rules.MESH_AXES,
    axis_types=(AxisType.Auto,) * len(rules.MESH_AXES),
  )


def _arranged(sizes: list[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """The devices as an array of these sizes, neighbours side by side."""
  listed = np.asarray(devices).reshape(sizes)
  if devices[0].platform != "tpu":
    return listed
  slices = {getattr(device, "slice_index", None) for device in devices}
  if len(slices) > 1:
    if sizes[0] % len(slices):
      raise ValueError(
        f"The devices are {len(slices)} slices, over which config.mesh.data, "
        f"{sizes[0]}, does not divide. Make it a multiple: only data may span "
        "the slow network between slices."
      )
    return mesh_utils.create_hybrid_device_mesh(
      [sizes[0] // len(slices), *sizes[1:]],
      [len(slices), *[1] * len(sizes[1:])],
      devices,
      allow_split_physical_axes=True,
    )
  ring = _RINGS.get(devices[0].device_kind, 4)
  sides = [
    max(side) + 1 for side in zip(*(d.coords for d in devices), strict=True)
  ]
  if any(side > 2 and side % ring for side in sides) or max(sides) < ring:
    return listed
  try:
    return mesh_utils.create_device_mesh(sizes, devices)
  except NotImplementedError:  # the axes do not divide the torus
    return listed


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
