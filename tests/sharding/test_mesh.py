"""The mesh, the tables and moving between them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from opera_jax.models import decoder, presets
from opera_jax.sharding import layout, rules
from opera_jax.sharding import mesh as mesh_lib


def test_every_device_is_on_fsdp_unless_told():
  assert dict(mesh_lib.create().shape) == {
    "data": 1,
    "fsdp": 8,
    "sequence": 1,
    "tensor": 1,
  }


def test_one_axis_takes_what_is_left():
  mesh = mesh_lib.create({"data": 2, "fsdp": -1, "tensor": 2})
  assert mesh.devices.shape == (2, 2, 1, 2)
  assert mesh_lib.num_data_shards(mesh) == 4
  # Neighbours share a tensor axis: its traffic is the heaviest.
  assert [d.id for d in mesh.devices[0, 0, 0]] == [0, 1]


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the mesh reads of a TPU's device."""

  id: int
  coords: tuple[int, int, int]
  device_kind: str
  slice_index: int = 0
  platform: str = "tpu"
  process_index: int = 0
  core_on_chip: int = 0


def _torus(kind, sides, slices=1):
  """Devices in JAX's order: squares of two by two chips, one host each."""
  blocks = sorted(
    np.ndindex(*sides), key=lambda c: (c[2], c[1] // 2, c[0] // 2, c[1], c[0])
  )
  return [
    Chip(i, coords, kind, slice_index)
    for slice_index in range(slices)
    for i, coords in enumerate(blocks, start=slice_index * len(blocks))
  ]


def _coords(devices):
  return [device.coords for device in devices]


@pytest.fixture
def any_device(monkeypatch):
  """A Mesh takes only real devices; keep the array that it would get."""
  monkeypatch.setattr(
    mesh_lib,
    "Mesh",
    lambda devices, *_, **__: types.SimpleNamespace(devices=devices),
  )


@pytest.mark.parametrize(
  ("kind", "sides", "shape", "tensor", "fsdp"),
  [
    # Rings: whole rows and whole planes.
    (
      *("TPU v5", (4, 4, 4), (16, 4)),
      {(x, 0, 0) for x in range(4)},
      {(0, y, z) for y in range(4) for z in range(4)},
    ),
    (
      *("TPU v5 lite", (16, 16, 1), (16, 16)),
      {(x, 0, 0) for x in range(16)},
      {(0, y, 0) for y in range(16)},
    ),
    # Sides of 8 end: blocks of neighbours, around which a ring closes.
    (
      *("TPU v5 lite", (8, 8, 1), (8, 8)),
      {(x, y, 0) for x in range(4) for y in range(2)},
      {(x, y, 0) for x in (0, 4) for y in (0, 2, 4, 6)},
    ),
    (
      *("TPU v6 lite", (8, 8, 1), (16, 4)),
      {(x, y, 0) for x in range(2) for y in range(2)},
      {(x, y, 0) for x in (0, 2, 4, 6) for y in (0, 2, 4, 6)},
    ),
    # 16 x 4 does not divide the sides of 16 x 16.
    (
      *("TPU v6 lite", (16, 16, 1), (64, 4)),
      {(x, y, 0) for x in range(2) for y in range(2)},
      {(x, y, 0) for x in range(0, 16, 2) for y in range(0, 16, 2)},
    ),
  ],
)
def test_axes_follow_the_torus(any_device, kind, sides, shape, tensor, fsdp):
  mesh = mesh_lib.create(
    {"fsdp": shape[0], "tensor": shape[1]}, _torus(kind, sides)
  )
  placed = mesh.devices.reshape(shape)
  assert set(_coords(placed[0])) == tensor
  assert set(_coords(placed[:, 0])) == fsdp


def test_data_alone_spans_several_slices(any_device):
  devices = _torus("TPU v5", (4, 4, 4), slices=2)
  mesh = mesh_lib.create({"data": 2, "fsdp": 16, "tensor": 4}, devices)
  for number, part in enumerate(mesh.devices):
    assert {device.slice_index for device in part.flat} == {number}
  with pytest.raises(ValueError, match="2 slices, over which config.mesh.data"):
    mesh_lib.create({"fsdp": 32, "tensor": 4}, devices)


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ({"model": 8}, "Unknown mesh axis"),
    ({"fsdp": -1, "tensor": -1}, "At most one mesh axis may be -1"),
    ({"fsdp": 3, "tensor": 2}, "the number of devices, 8"),
    ({"fsdp": -1, "tensor": 3}, "the number of devices, 8"),
    ({"fsdp": 0, "tensor": -1}, "the number of devices, 8"),
    ({"fsdp": -2, "tensor": -4}, "the number of devices, 8"),
    ({}, None),
  ],
)
def test_shapes_that_do_not_fit_are_refused(shape, message):
  if message is None:
    assert mesh_lib.create(shape).size == 8
    return
  with pytest.raises(ValueError, match=message):
    mesh_lib.create(shape)


def test_check_lists_every_axis_that_does_not_divide():
  config = decoder.Config(
    vocab_size=300,
    hidden_size=36,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
  )
  shapes = decoder.abstract(config)[1]
  axes = decoder.logical_axes(shapes)
  fits = mesh_lib.create({"fsdp": 4, "tensor": 2})
  layout.check(shapes, axes, fits, rules.TRAIN)
  wrong = mesh_lib.create({"fsdp": 2, "tensor": 4})
  with pytest.raises(ValueError) as error:
    layout.check(shapes, axes, wrong, rules.TRAIN)
  text = str(error.value)
  assert "config.mesh" in text
  assert text.count("kv_heads has 2, mesh axis 'tensor' has 4") == 2
  assert text.count(": heads has 6, mesh axis 'tensor' has 4") == 2
  assert text.count("\n") == 4  # vocabulary and feed-forward divide


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_the_published_sizes_divide_over_every_mesh(name, tensor):
  heads = presets.PRESETS[name].num_key_value_heads
  if heads % tensor:
    pytest.skip(f"{heads} key-value heads are not divided by {tensor}")
  shapes = decoder.abstract(presets.PRESETS[name])[1]
  mesh = mesh_lib.create({"fsdp": -1, "tensor": tensor})
  for table in (rules.TRAIN, rules.ROLLOUT):
    layout.check(shapes, decoder.logical_axes(shapes), mesh, table)


def test_moving_between_tables_changes_no_value(tiny_model):
  _, _, params = tiny_model
  axes = decoder.logical_axes(params)
  mesh = mesh_lib.create({"fsdp": 4, "tensor": 2})
  train = layout.move(params, axes, mesh, rules.TRAIN)
  rollout = layout.move(train, axes, mesh, rules.ROLLOUT)
  back = layout.move(rollout, axes, mesh, rules.TRAIN)
  for tree in (train, rollout, back):
    jax.tree.map(np.testing.assert_array_equal, tree, params)
  gate = train["layers"]["mlp"]["gate"][...]
  wanted = PartitionSpec(None, ("fsdp", "sequence"), "tensor")
  assert gate.sharding.spec == wanted
  assert gate.addressable_shards[0].data.size == gate.size // 8
  gate = rollout["layers"]["mlp"]["gate"][...]
  assert gate.addressable_shards[0].data.size == gate.size // 2


def test_constraints_pin_what_divides_and_leave_the_rest():
  mesh = mesh_lib.create({"fsdp": 4, "tensor": 2})
  axes = ("batch", "length", "heads", None)

  @jax.jit
  def pin(x):
    return rules.constrain(x * 1, axes)

  with jax.set_mesh(mesh):
    spec = pin(jnp.ones((8, 3, 6, 2))).sharding.spec
    odd = pin(jnp.ones((8, 3, 5, 2))).sharding.spec
  assert spec[0] in (("data", "fsdp"), "fsdp") and spec[2] == "tensor"
  assert len(odd) < 3 or odd[2] is None
  x = jnp.ones((8, 3, 6, 2))
  assert rules.constrain(x, axes) is x  # no mesh in force


def test_to_devices_and_back_changes_no_value():
  mesh = mesh_lib.create({"fsdp": 4, "tensor": 2})
  host = {"a": np.arange(16.0).reshape(8, 2), "b": np.arange(8)}
  placed = layout.to_devices(host, layout.batch_sharding(mesh))
  assert placed["a"].addressable_shards[0].data.shape == (2, 2)
  jax.tree.map(np.testing.assert_array_equal, layout.to_host(placed), host)
  key = layout.to_devices(jax.random.key(3), layout.replicated(mesh))
  assert key.sharding.is_fully_replicated
  assert jax.random.bits(key) == jax.random.bits(jax.random.key(3))
