"""The saved plans are those of the shipped configs, and all of them fit."""

import dataclasses
import json
import os

import pytest
from conftest import ROOT

from opera_jax.configs import instruct_grpo, qwen3_0_6b, qwen3_8b
from opera_jax.models import hf_config, presets
from opera_jax.plan import (
  analyse,
  hardware,
  memory_floor,
  programs,
  render,
  whole,
)
from opera_jax.run import model_config, sizes
from opera_jax.sharding import mesh as mesh_lib

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
FOLDER = ROOT / "docs" / "plans"
PLANS = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def test_every_shipped_config_has_its_plan():
  assert {(p["config"], p["topology"]) for p in PLANS} == {
    ("configs/qwen3_0_6b.py", "v5e:2x2"),
    ("configs/qwen3_0_6b.py:v5e_1x1", "v5e:1x1"),
    *((f"configs/qwen3_0_6b.py:{card}", card) for card in ("h100", "l4", "t4")),
    ("configs/instruct_grpo.py", "l4"),
    *(
      (f"configs/qwen3_8b.py:{name}", name.replace("_", ":", 1))
      for name in qwen3_8b.SLICES
    ),
  }


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan["config"])
def test_all_of_an_rl_step_fits(plan):
  planned = {p["name"]: p for p in plan["programs"]}
  # Plain GRPO has no SFT.
  without = {"sft"} if plan["config"] == "configs/instruct_grpo.py" else set()
  assert set(planned) == set(programs.NAMES) - without
  assert all(p["fits"] for p in planned.values())


def test_the_page_is_what_the_plans_say():
  assert (FOLDER / "README.md").read_text() == render.markdown(PLANS)


# What the compiler keeps in another layout, as a share of the caches. Of a
# TPU7x it relays the weights, in tiles of 16 rows, once a call.
RELAYED = {"tpu7x:2x2x1": 0.35}


def _decode(config, topology):
  """The decode program of a shipped config, its mesh, chip and caches."""
  config = sizes.derive(config)
  model = model_config.resolve(config.model, config.checkpoint, offline=True)
  mesh = mesh_lib.create(dict(config.mesh), hardware.devices(topology))
  sections = {name: config[name] for name in whole.SECTIONS}
  [program] = programs.build(
    mesh, **sections | {"model": vars(model)}, names=("decode",)
  )
  slots = program.arguments[1]
  caches = memory_floor.shard_bytes((slots.cache, slots.prefix))
  return program, mesh, hardware.parse(topology)[0], caches


@pytest.mark.slow
@pytest.mark.parametrize(
  ("config", "topology"),
  [
    (qwen3_0_6b.get_config(), "v5e:2x2"),
    (qwen3_0_6b.get_config("v5e_1x1"), "v5e:1x1"),
    *(
      (qwen3_8b.get_config(name), name.replace("_", ":", 1))
      for name in qwen3_8b.SLICES
    ),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_decoding_moves_weights_and_caches_once_as_its_plan_says(
  config, topology, nothing_cached
):
  """Temporaries, bytes moved, and that the saved plan is not stale."""
  program, mesh, chip, caches = _decode(config, topology)
  cost = analyse.analyse(program, mesh, chip)
  assert cost.temporary_bytes < RELAYED.get(topology, 0.05) * caches
  floor = cost.stream_seconds * chip.hbm_bandwidth
  assert 0.9 * floor < cost.moved_bytes < 1.3 * floor
  assert not cost.read_once
  [plan] = [
    plan
    for plan in PLANS
    if plan["topology"] == topology and "qwen3" in plan["config"]
  ]
  [saved] = [p for p in plan["programs"] if p["name"] == "decode"]
  now = json.loads(json.dumps(dataclasses.asdict(cost)))
  measured = {"compile_seconds": 0.0}  # on whatever machine
  assert now | measured == saved | measured


@pytest.mark.parametrize(
  "config, size",
  [
    (qwen3_0_6b.get_config(), "0.6B"),
    (qwen3_0_6b.get_config("v5e_1x1"), "0.6B"),
    (qwen3_0_6b.get_config("h100"), "0.6B"),
    *((qwen3_8b.get_config(name), "8B") for name in qwen3_8b.SLICES),
  ],
)
def test_shipped_models_are_the_published_ones(config, size):
  model = model_config.resolve(config.model, config.checkpoint, offline=True)
  published = presets.PRESETS[f"Qwen/Qwen3-{size}"]
  config = sizes.derive(config)
  free = {name: getattr(model, name) for name in hf_config.FREE}
  assert model == dataclasses.replace(published, **free)
  assert (model.dtype, model.remat) == ("bfloat16", "full")
  # The recipe's lengths: rows hold the longest prompt and response.
  longest = config.max_prompt_tokens + config.rollout.max_new_tokens
  assert longest == 16_384 == config.rl.row_buckets[-1]
  assert max(config.engine.prompt_buckets) == config.max_prompt_tokens
  assert config.rl.samples == 16


@pytest.mark.parametrize("name", ["l4", "t4", "h100", "v5e_1x1"])
def test_one_device_has_what_its_docstring_says(name):
  config = qwen3_0_6b.get_config(name)
  assert all(size == 1 for size in config.mesh.values())
  adapted = name != "h100"
  for lora in (config.sft.lora, config.rl.lora):
    assert bool(lora.rank) == adapted
  # No field asks a T4 for bfloat16, which it does not have.
  dtypes = {
    *(config.model.dtype, config.engine.cache_dtype, config.rl.moment_dtype),
    *(config.rl.lora.base_dtype, config.sft.lora.base_dtype),
  }
  assert (dtypes == {"float32"}) == (name == "t4")


def test_plain_grpo_starts_from_an_instruct_model():
  config = sizes.derive(instruct_grpo.get_config())
  assert (config.stages, config.rl.init) == ("rl,evaluate,report", "base")
  assert config.reward.terms == "verifiable" and config.rl.advantage == "grpo"
  assert config.data.shares[0] == 0
  assert config.rl.row_buckets[-1] == config.rollout.max_new_tokens
  assert config.rl.prompts == config.rl.mini_batch  # on-policy
