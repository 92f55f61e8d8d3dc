"""The plan of a tiny run on absent chips, against sums made by hand."""

import dataclasses
import math
import os
import re

import jax
import pytest

from opera_jax.configs import qwen3_8b, tiny
from opera_jax.plan import analyse, hardware, programs, whole
from opera_jax.run import model_config, sizes
from opera_jax.sharding import mesh as mesh_lib

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
TOPOLOGY = "v5e:2x2"


def _config(**changes):
  """Sizes that fill whole registers, so that the chip pads nothing much."""
  config = tiny.get_config("smoke")
  values = {
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "model.vocab_size": 1024,
    "model.hidden_size": 256,
    "model.num_hidden_layers": 8,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.head_dim": 128,
    "model.intermediate_size": 512,
    "model.dtype": "bfloat16",
    "rollout.max_new_tokens": 32,
    "engine.prompt_buckets": (64,),
    "engine.cache_dtype": "bfloat16",
    "scoring.slot_buckets": (1, 2),
    "scoring.continuation_buckets": (64, 128),
    "scoring.prefix_buckets": (128,),
    "rl.row_buckets": (128,),
    "sft.row_tokens": 128,
    **changes,
  }
  config.update_from_flattened_dict(values)
  return config


def _sections(config, names=whole.SECTIONS):
  config = sizes.derive(config)
  model = model_config.resolve(config.model, config.checkpoint, offline=True)
  return {name: config[name] for name in names} | {"model": vars(model)}


def _programs(config, names=programs.NAMES):
  mesh = mesh_lib.create(dict(config.mesh), hardware.devices(TOPOLOGY))
  return mesh, programs.build(mesh, **_sections(config), names=names)


# A layer's weights: q and o, k and v, three of the feed-forward.
LAYER = 2 * 256 * 4 * 128 + 2 * 256 * 2 * 128 + 3 * 256 * 512
NORMS = 8 * (2 * 256 + 2 * 128) + 256
WEIGHTS = 8 * LAYER + 1024 * 256


@pytest.mark.slow
def test_update_takes_the_bytes_and_flops_of_a_hand_count(nothing_cached):
  mesh, [update] = _programs(_config(), ("update",))
  cost = analyse.analyse(update, mesh, hardware.CHIPS["v5e"])
  rows, tokens = 2 * 4, 128
  # Weights and two moments, float32, over 4 devices; norms are whole. Seven
  # arrays a batch, over 2 data shards.
  state = 3 * 4 * (WEIGHTS // 4 + NORMS)
  batch = 7 * 4 * rows * tokens // 2
  assert cost.argument_bytes == pytest.approx(state + batch, rel=0.02)
  assert cost.beside_bytes == 4 * (WEIGHTS // 4 + NORMS)
  # The new state takes the old one's place.
  assert cost.output_bytes < 0.01 * state
  pairs = rows * tokens * (tokens + 1) / 2
  forward = rows * tokens * 2 * WEIGHTS + 4 * 8 * 4 * 128 * pairs
  assert cost.forward_flops == forward
  assert cost.backward_flops == 2 * forward
  total = forward * 3 + cost.recompute_flops
  assert cost.flops_seconds == pytest.approx(total / (4 * 197e12))
  assert cost.fits and cost.calls == 2
  assert cost.collective_bytes["all-gather"] > 0


def test_decoding_holds_its_caches_once(nothing_cached):
  config = _config(
    **{"engine.prompt_slots": 64, "rollout.max_new_tokens": 1024}
  )
  mesh, [decode] = _programs(config, ("decode",))
  cost = analyse.analyse(decode, mesh, hardware.CHIPS["v5e"])
  token = 2 * 8 * 2 * 128 * 2  # keys and values, layers, heads, features, bf16
  # A prompt's cache is a whole number of blocks of 128.
  caches = 64 * (128 + 4 * 1024) * token // 4
  assert cost.argument_bytes == pytest.approx(
    2 * (WEIGHTS // 2 + NORMS) + caches, rel=0.05
  )
  # The state and the reference; three counters and a key.
  assert cost.beside_bytes == 4 * 4 * (WEIGHTS // 4 + NORMS) + 3 * 4 + 8


def test_a_decode_step_copies_no_cache(nothing_cached):
  """With several key-value heads a device, which XLA may lay out otherwise."""
  config = _config(
    **{
      "model.num_key_value_heads": 4,
      "engine.prompt_slots": 64,
      "rollout.max_new_tokens": 1024,
    }
  )
  mesh, [decode] = _programs(config, ("decode",))
  with jax.set_mesh(mesh):
    lowered = decode.jitted.lower(*decode.arguments, **decode.static)
  compiled = lowered.compile()
  # Of one layer and kind, over 4 devices: 32 prompts, 4 samples, 2 heads.
  layer = 32 * 4 * 2 * 1024 * 128
  caches = 2 * 8 * layer * 2
  assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * caches
  moved = [
    line.strip()[:120]
    for line in compiled.as_text().splitlines()
    if (found := re.search(r"= \(?bf16\[([\d,]+)\]\S* (\S+?)\(", line))
    and math.prod(map(int, found[1].split(","))) >= layer
    and found[2].partition("-")[0] in ("copy", "transpose", "slice", "dynamic")
  ]
  assert not moved, moved


@pytest.mark.slow
def test_with_lora_an_update_holds_the_base_once_and_no_reference(
  nothing_cached,
):
  config = _config(**{"rl.lora.rank": 8})
  mesh, [decode, score, update] = _programs(
    config, ("decode", "score", "update")
  )
  cost = analyse.analyse(update, mesh, hardware.CHIPS["v5e"])
  # A and B of q and o, of k and v, and of the feed-forward: each axis that is
  # no rank is split in two, over fsdp or tensor.
  D, N, K, F = 256, 4 * 128, 2 * 128, 512
  adapter = 8 * 8 * (2 * (D + N) + 2 * (D + K) + 3 * (D + F)) // 2
  batch = 7 * 4 * 8 * 128 // 2
  base = 2 * (WEIGHTS // 4 + NORMS)
  assert cost.argument_bytes == pytest.approx(
    base + 3 * 4 * adapter + batch, rel=0.05
  )
  assert cost.beside_bytes == 4 * adapter
  assert cost.fits
  # While it samples: the base, the adapter and its moments, another adapter
  # that is switched off, three counters and a key. The merged weights are an
  # argument, as is the base where it scores.
  held = base + 4 * 4 * adapter + 3 * 4 + 8
  cost = analyse.analyse(decode, mesh, hardware.CHIPS["v5e"])
  assert cost.beside_bytes == pytest.approx(held, rel=0.01)
  assert cost.argument_bytes > 2 * (WEIGHTS // 2 + NORMS)
  cost = analyse.analyse(score, mesh, hardware.CHIPS["v5e"])
  assert cost.beside_bytes == pytest.approx(3 * 4 * adapter, rel=0.01)
  assert cost.argument_bytes == pytest.approx(base + 4 * adapter, rel=0.05)


def test_programs_are_those_of_the_run():
  _, built = _programs(_config())
  assert tuple(p.name for p in built) == programs.NAMES
  calls = {p.name: p.calls for p in built}
  assert calls == {
    "sft": 0,
    "prefill": 1,
    "grow": 0,
    "decode": 1,
    "score": 13,  # 4 of its buckets hold 13 of 25 continuations
    "reference": 1,
    "update": 2,
  }


def test_a_run_compiles_a_program_for_each_combination_of_buckets():
  config = _config()
  mesh = mesh_lib.create(dict(config.mesh), hardware.devices(TOPOLOGY))
  sections = _sections(config, ("engine", "scoring", "rl"))
  # One prompt length and one cache length, to empty and to assign; one prefix
  # length, two numbers and two lengths of continuations.
  assert programs.most(mesh, **sections) == {
    "sample": 4,
    "score": 4,
    "update": 1,
  }


def test_at_another_temperature_the_policy_is_scored_again():
  _, [reference] = _programs(
    _config(**{"rollout.temperature": 0.7}), ("reference",)
  )
  assert reference.calls == 2


def test_too_large_says_what_to_turn(nothing_cached):
  mesh, [reference] = _programs(_config(), ("reference",))
  small = dataclasses.replace(hardware.CHIPS["v5e"], hbm_bytes=1 << 20)
  cost = analyse.analyse(reference, mesh, small)
  assert not cost.fits
  assert "config.scoring.batch_size (16; a multiple of 2)" in cost.remedies[0]


def test_what_the_compiler_refuses_does_not_fit(nothing_cached):
  config = _config(
    **{"rollout.max_new_tokens": 65_536, "engine.prompt_slots": 512}
  )
  mesh, [decode] = _programs(config, ("decode",))
  cost = analyse.analyse(decode, mesh, hardware.CHIPS["v5e"])
  assert not cost.fits and cost.argument_bytes is None
  assert cost.total_bytes > hardware.CHIPS["v5e"].hbm_bytes


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("model.vocab_size", 0, "config.model.vocab_size"),
    ("model.vocab_size", 1023, "config.mesh"),
    ("engine.prompt_slots", 3, "config.engine.prompt_slots"),
    ("scoring.batch_size", 5, "config.scoring.batch_size"),
    ("sft.batch_size", 7, "config.sft.batch_size"),
  ],
)
def test_wrong_values_are_named(field, value, message):
  with pytest.raises(ValueError, match=message):
    _programs(_config(**{field: value}))


def test_an_unknown_program_lists_the_known():
  with pytest.raises(ValueError, match="rollout.*sft, prefill, grow"):
    _programs(_config(), ("rollout",))


@pytest.mark.slow
def test_the_8b_update_compiles_and_fits():
  config = qwen3_8b.get_config("v5p_4x4x4")
  sections = _sections(config)
  cached = jax.config.jax_enable_compilation_cache
  with jax.default_matmul_precision("default"):
    plan = whole.make(
      "v5p:4x4x4", config.mesh, sections, name="8b", names=("update",)
    )
  jax.config.update("jax_enable_compilation_cache", cached)
  [update] = plan["programs"]
  assert update["fits"]
  # Float32 weights and two moments over 64 chips, and the batch.
  assert update["argument_bytes"] == pytest.approx(
    12 * plan["parameters"] / 64, rel=0.05
  )
