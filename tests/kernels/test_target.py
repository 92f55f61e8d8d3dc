"""A program is traced for the devices of its mesh, present or absent."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from opera_jax.kernels import target
from opera_jax.kernels.token_logprob import api as token_logprob

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def test_without_a_mesh_it_is_the_default_backend():
  assert target.platform() == jax.default_backend() == "cpu"


def test_kernels_are_picked_for_the_mesh_in_force():
  devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
  mesh = jax.sharding.Mesh(
    np.array(devices[:1]), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  place = jax.NamedSharding(mesh, jax.P())

  def whole(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  arrays = (
    whole((64, 128), jnp.bfloat16),
    whole((128, 512), jnp.bfloat16),
    whole((64,), jnp.int32),
  )
  with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
    assert target.platform() == "tpu"
    text = jax.jit(token_logprob.token_logprob).lower(*arrays).as_text()
  assert "tpu_custom_call" in text
