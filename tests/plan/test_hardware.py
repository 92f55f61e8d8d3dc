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


LINE = [(x, 0, 0) for x in range(8)]


@pytest.mark.parametrize(
  ("name", "group", "bounds", "links"),
  [
    ("v5e", LINE, (8, 8, 1), 1),  # a row that ends
    ("v5e", [(x, 3, 0) for x in range(16)], (16, 16, 1), 2),  # a ring
    ("v6e", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)], (8, 8, 1), 2),
    ("v6e", LINE[::2], (8, 8, 1), 0.5),  # two groups share a row
    ("v5p", [(x, 0, 2) for x in range(4)], (4, 4, 4), 2),
    ("v5p", LINE[:2], (4, 4, 4), 1),  # a part of a ring
    (
      "v5p",
      [(0, y, z) for y in range(4) for z in range(4)],
      (4, 4, 4),
      4,
    ),
    ("tpu7x", [(1, 1, 0)] * 2, (2, 2, 1), 6),  # both devices of a chip
  ],
)
def test_a_group_has_the_links_of_the_sides_it_extends_along(
  name, group, bounds, links
):
  assert hardware.CHIPS[name].links_used(group, bounds) == links


@pytest.mark.parametrize(
  ("name", "gigabytes"), [("v5e", 50), ("v6e", 100), ("v5p", 100)]
)
def test_one_direction_of_one_link_is_its_share_of_a_chip(name, gigabytes):
  assert hardware.CHIPS[name].link_bandwidth == gigabytes * 1e9
