"""What sampling holds at the least, against a hand count; and its refusal."""

import os
import types

import jax
import pytest

from opera_jax.models import lora, presets
from opera_jax.plan import memory_floor
from opera_jax.sharding import mesh as mesh_lib

SIZES = {
  "prompts": 4,
  "samples": 2,
  "prompt_tokens": 64,
  "new_tokens": 128,
  "cache_dtype": "bfloat16",
  "optimizer": "adamw",
  "moment_dtype": "bfloat16",
}


def test_floor_is_the_sum_of_its_shards():
  config = presets.PRESETS["Qwen/Qwen3-0.6B"]
  mesh = mesh_lib.create({"fsdp": 4, "tensor": 2})
  parts = memory_floor.floor(config, mesh, **SIZES)
  norms = config.num_hidden_layers * (
    2 * config.hidden_size + 2 * config.head_dim
  )
  norms += config.hidden_size
  weights = 596_049_920 - norms
  master = 4 * (weights // 8 + norms)
  token = 2 * 28 * 8 * 128 * 2
  assert parts == {
    "parameters": master,
    "optimizer": master,  # two moments of half the width
    "reference": master,
    "rollout weights": 4 * (weights // 2 + norms),  # float32 compute
    "caches": 4 * (64 + 2 * 128) * token // 8,
  }


def test_with_lora_the_base_is_held_once_and_only_an_adapter_has_moments():
  config = presets.PRESETS["Qwen/Qwen3-0.6B"]
  mesh = mesh_lib.create({"fsdp": 4, "tensor": 2})
  adapter = lora.Settings(rank=8, targets=("q", "down"))
  parts = memory_floor.floor(config, mesh, **SIZES, adapter=adapter)
  norms = config.num_hidden_layers * (
    2 * config.hidden_size + 2 * config.head_dim
  )
  norms += config.hidden_size
  weights = 596_049_920 - norms
  # q: A [1024, 8] over fsdp and B [8, 16, 128] over tensor; down: A [3072, 8]
  # over tensor and B [8, 1024] over fsdp.
  trained = 28 * 8 * (1024 // 4 + 2048 // 2 + 3072 // 2 + 1024 // 4)
  plain = memory_floor.floor(config, mesh, **SIZES)
  assert parts == {
    "parameters": 2 * (weights // 8 + norms) + 4 * trained,
    "optimizer": 2 * 2 * trained,
    "reference": 0,
    "rollout weights": 4 * 28 * (1024 * 2048 + 3072 * 1024) // 2,
    "caches": plain["caches"],
  }


def test_heads_that_a_tensor_axis_does_not_divide_are_whole():
  config = presets.PRESETS["Qwen/Qwen3-0.6B"]
  mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 16})
  assert memory_floor.num_cache_shards(config, mesh) == 1


def test_too_much_names_its_parts_and_what_to_turn():
  parts = {"parameters": 3 << 30, "caches": 2 << 30}
  memory_floor.check(parts, 5 << 30)
  memory_floor.check(parts, None)
  with pytest.raises(
    ValueError, match="5.00 GiB.*caches 2.00.*engine.prompt_slots"
  ):
    memory_floor.check(parts, (5 << 30) - 1)


def test_the_devices_of_a_cpu_share_what_the_machine_has_available():
  mesh = mesh_lib.create()
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = memory_floor.device_limit(mesh)
  assert 0 < limit <= total // len(mesh.local_devices)


def test_other_devices_state_their_limit_and_the_smallest_counts():
  devices = [
    types.SimpleNamespace(
      platform="gpu", memory_stats=lambda n=n: {"bytes_limit": n}
    )
    for n in (7, 5)
  ]
  assert (
    memory_floor.device_limit(types.SimpleNamespace(local_devices=devices)) == 5
  )


def test_shard_bytes_counts_one_device():
  mesh = mesh_lib.create({"fsdp": 8})
  split = jax.NamedSharding(mesh, jax.P("fsdp"))
  whole = jax.NamedSharding(mesh, jax.P())
  tree = [
    jax.ShapeDtypeStruct((16, 3), "float32", sharding=split),
    jax.ShapeDtypeStruct((5,), "bfloat16", sharding=whole),
  ]
  assert memory_floor.shard_bytes(tree) == 16 * 3 * 4 // 8 + 5 * 2
