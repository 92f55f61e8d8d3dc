"""The platform that a program is traced for.

A program may be compiled for devices that this machine does not have. Then the
mesh in force (`jax.set_mesh`) names the platform, not the default backend.
"""

import jax


def platform() -> str:
  """Platform of the mesh in force, or of the default backend without a mesh.

  Returns:
    "cpu", "gpu" or "tpu".
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
