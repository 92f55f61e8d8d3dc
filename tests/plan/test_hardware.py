"""The table of chips against the compiler that knows them."""

import os
import re

import jax
import jax.numpy as jnp
import pytest

from opera_jax.plan import hardware

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.mark.parametrize("name", hardware.CHIPS)
def test_every_listed_topology_has_the_devices_that_libtpu_sees(name):
  for shape in hardware.CHIPS[name].topologies:
    chip, count = hardware.parse(f"{name}:{shape}")
    devices = hardware.devices(f"{name}:{shape}")
    assert len(devices) == count, shape
    chips = {tuple(d.coords) for d in devices}
    assert len(chips) * chip.devices == count


@pytest.mark.parametrize("name", hardware.CHIPS)
def test_memory_is_what_the_compiler_leaves(name, nothing_cached):
  chip = hardware.CHIPS[name]
  device = hardware.devices(f"{name}:{chip.topologies[1]}")[0]
  place = jax.sharding.SingleDeviceSharding(device)
  huge = jax.ShapeDtypeStruct((1 << 40,), jnp.float32, sharding=place)
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jax.jit(lambda x: jnp.sin(x)[::-1]).lower(huge).compile()
  stated = re.search(r"available HBM \(([\d.]+)G\)", str(caught.value))
  assert chip.hbm_bytes / hardware.GIB == pytest.approx(
    float(stated.group(1)), abs=0.005
  )


@pytest.mark.parametrize(
  "topology", ["v5p:3x4x4", "v9:2x2", "v5e", "v6e:2x2x1"]
)
def test_an_unknown_topology_lists_the_known(topology):
  with pytest.raises(
    ValueError, match=f"'{topology}'(.|\n)*v5e:8x8(.|\n)*tpu7x:2x2x1"
  ):
    hardware.parse(topology)
