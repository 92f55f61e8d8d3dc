"""The platform that a program is traced for.

A program may be compiled for devices that this machine does not have; the mesh
in force (`jax.set_mesh`) knows them, the default backend does not.
"""

import jax


def platform() -> str:
  """Name of the mesh in force's devices, else of the default backend.

  Returns:
    "cpu", "gpu" or "tpu".
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
