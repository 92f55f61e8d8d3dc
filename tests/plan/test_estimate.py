"""Estimates from shapes, against programs that a compiler has laid out."""

import json

import jax
import pytest
from conftest import ROOT

from opera_jax.configs import qwen3_0_6b, tiny
from opera_jax.models import decoder
from opera_jax.plan import analyse, estimate, hardware, programs, whole
from opera_jax.run import model_config, sizes
from opera_jax.sharding import mesh as mesh_lib

CARD = hardware.CARDS["l4"]


def _sections(config):
  config = sizes.derive(config)
  model = model_config.resolve(config.model, config.checkpoint, offline=True)
  return {n: config[n] for n in whole.SECTIONS} | {"model": vars(model)}


def test_totals_are_within_a_third_of_what_a_tpus_compiler_needs():
  """The saved plan holds what libtpu says of the same config on one v5e."""
  saved = json.loads((ROOT / "docs/plans/qwen3_0_6b_v5e_1x1.json").read_text())
  compiled = {p["name"]: p for p in saved["programs"]}
  config = qwen3_0_6b.get_config("v5e_1x1")
  found = list(estimate.costs(CARD, config.mesh, _sections(config)))
  assert [cost.name for cost in found] == list(programs.NAMES)
  for cost in found:
    known = compiled[cost.name]
    assert cost.argument_bytes == pytest.approx(
      known["argument_bytes"], rel=0.01
    )
    assert cost.output_bytes == pytest.approx(
      known["output_bytes"], rel=0.01, abs=1 << 20
    )
    assert cost.beside_bytes == known["beside_bytes"]
    # Attention on a TPU keeps no chunk of scores, which a GPU's does.
    over = cost.total_bytes / known["total_bytes"]
    assert 0.95 < over < (1.5 if cost.name == "reference" else 1.33), cost.name
    assert cost.forward_flops == known["forward_flops"]
  largest = max(found, key=lambda cost: cost.total_bytes)
  assert largest.name == max(
    compiled, key=lambda name: compiled[name]["total_bytes"]
  )


def _small(**changes):
  """Large enough that arrays outweigh what a compiler adds."""
  config = tiny.get_config("smoke")
  config.update_from_flattened_dict(
    {
      "model.vocab_size": 2048,
      "model.hidden_size": 256,
      "model.num_hidden_layers": 6,
      "model.num_attention_heads": 4,
      "model.num_key_value_heads": 2,
      "model.head_dim": 64,
      "model.intermediate_size": 768,
      "sft.batch_size": 8,
      "sft.row_tokens": 512,
      "rl.mini_batch": 2,
      "rl.row_buckets": (512,),
      "scoring.batch_size": 4,
      "scoring.prefix_buckets": (512,),
      "scoring.slot_buckets": (4,),
      "scoring.continuation_buckets": (128,),
      "engine.prompt_buckets": (256,),
      "engine.prompt_slots": 4,
      "rollout.max_new_tokens": 512,
      **changes,
    }
  )
  return config


@pytest.mark.slow
@pytest.mark.parametrize(
  ("changes", "name"),
  [
    ({"model.remat": "full"}, "sft"),
    ({"rl.micro_batches": 4, "model.remat": "dots"}, "update"),
  ],
)
def test_temporaries_are_within_a_factor_of_two_of_a_cpus(
  changes, name, nothing_cached
):
  config = _small(**changes)
  sections = _sections(config)
  mesh = mesh_lib.create(dict(config.mesh), jax.devices()[:1])
  [cost] = estimate.costs(CARD, config.mesh, sections, (name,))
  [program] = programs.build(mesh, **sections, names=(name,))
  known = analyse.analyse(program, mesh, hardware.CHIPS["v5e"])
  assert known.argument_bytes == pytest.approx(cost.argument_bytes, rel=0.02)
  assert 0.5 < cost.temporary_bytes / known.temporary_bytes < 2


def test_what_is_saved_for_the_backward_pass_costs_memory():
  def update(remat):
    [cost] = estimate.costs(
      CARD,
      {"fsdp": 1},
      _sections(_small(**{"model.remat": remat})),
      ("update",),
    )
    return cost.temporary_bytes

  kept = [update(remat) for remat in ("full", "attention", "dots", "none")]
  assert kept == sorted(kept) and len(set(kept)) == 4


def test_a_cpu_holds_the_weights_twice_where_it_decodes():
  sections = _sections(_small())
  cpu = hardware.card("cpu:8GiB")
  gpu, here = (
    next(estimate.costs(card, {"fsdp": 1}, sections, ("decode",)))
    for card in (CARD, cpu)
  )
  shapes = decoder.abstract(decoder.Config(**sections["model"]))[1]
  width = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert here.beside_bytes - gpu.beside_bytes == width
  assert here.seconds is None and gpu.seconds > 0  # a CPU states no peak


def test_a_mesh_of_several_devices_is_refused():
  with pytest.raises(ValueError, match="takes 4 devices.*--config.mesh.fsdp=1"):
    estimate.one_device({"data": 1, "fsdp": 2, "sequence": 1, "tensor": 2})
