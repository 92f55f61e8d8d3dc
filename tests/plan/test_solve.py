"""What is proposed fits, gives up no more than it must, and can be pasted."""

import pytest

from opera_jax.configs import qwen3_0_6b
from opera_jax.plan import hardware, solve
from opera_jax.run import model_config
from opera_jax.stages import config_check

# The programs that hold most while sampling and while updating.
LARGEST = ("decode", "update")


def _solver(card, **changes):
  config = qwen3_0_6b.get_config().unlock()
  config.mesh.fsdp = config.mesh.tensor = 1
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in changes.items()}
  )
  model = model_config.resolve(config.model, config.checkpoint, offline=True)
  return config, solve.Solver(
    hardware.card(card), config.to_dict(), vars(model), LARGEST
  )


def test_what_is_proposed_fits_and_nothing_of_it_can_be_left_out():
  config, solver = _solver("l4")
  assert solver.overflow({}) > 0
  changes = solver.fit()
  assert changes and solver.overflow(changes) == 0
  for field in changes:
    fewer = {f: v for f, v in changes.items() if f != field}
    assert solver.overflow(fewer) > 0, field
  largest = solver.grow(changes)
  assert solver.overflow(largest) == 0
  # The flags give the config that was meant, and the check accepts it.
  pasted = config.copy_and_resolve_references()
  for flag in solve.flags(largest).split():
    field, _, text = flag.removeprefix("--config.").partition("=")
    pasted.update_from_flattened_dict({field: int(text)})
  assert pasted.to_dict() == solver.changed(largest)
  pasted.data.path = "tasks.jsonl"
  config_check.check(pasted.to_dict(), {"synthesize", "select", "sft", "rl"})


def test_what_fits_stays_and_grows_in_what_costs_time():
  _, solver = _solver("h100")
  assert solver.fit() == {}
  # As many prefixes at once as a step has prompts, and no micro-batch more
  # than the update needs.
  grown = solver.grow({})
  assert grown["scoring.batch_size"] > 2 and grown["rl.micro_batches"] < 64
  assert set(grown) <= {
    *("engine.slots", "engine.prompt_slots", "scoring.batch_size"),
    *("rl.micro_batches", "sft.micro_batches"),
  }


@pytest.mark.slow
def test_the_method_changes_where_time_does_not_suffice_and_the_task_last():
  _, solver = _solver("cpu:8GiB", engine__prompt_slots=1, engine__slots=1)
  assert solver.fit() == {"rl.lora.rank": 16, "sft.lora.rank": 16}
  # Sizes that are stated are given up with the length that they followed.
  _, solver = _solver(
    "cpu:5GiB",
    engine__prompt_slots=1,
    engine__slots=1,
    max_prompt_tokens=512,
    rl__lora__rank=4,
    sft__lora__rank=4,
    rl__micro_batches=128,
    rl__row_buckets=(10_752,),
  )
  assert solver.overflow({}) > 0
  changes = solver.fit()
  assert changes["rollout.max_new_tokens"] < 10_240
  assert changes["rl.row_buckets"] == ()


@pytest.mark.slow
def test_a_device_that_is_too_small_for_the_weights_has_no_answer():
  _, solver = _solver("cpu:300MiB", engine__prompt_slots=1, engine__slots=1)
  assert solver.fit() is None


def test_rows_of_one_completion_hold_their_prompt_too():
  config, _ = _solver("l4", rl__completions_per_row=4, rl__row_buckets=(64,))
  values = config.to_dict()
  step = solve._completions_per_row(values)
  assert step == {"rl.completions_per_row": 2}
  values["rl"]["completions_per_row"] = 2
  step = solve._completions_per_row(values)
  assert step == {"rl.completions_per_row": 1, "rl.row_buckets": ()}
  values["rl"]["completions_per_row"] = 1
  assert solve._completions_per_row(values) is None


def test_flags_quote_what_a_shell_would_read():
  assert solve.flags({"rl.row_buckets": (), "rl.micro_batches": 2}) == (
    "'--config.rl.row_buckets=()' --config.rl.micro_batches=2"
  )


@pytest.mark.parametrize(
  ("topology", "name", "gb"),
  [
    ("t4", "t4", 16),
    ("L4", "l4", 24),
    ("a100", "a100-40", 40),
    ("a100-80", "a100-80", 80),
    ("h100", "h100", 80),
  ],
)
def test_gpus_are_named_as_people_name_them(topology, name, gb):
  card = hardware.card(topology)
  assert card.name == name and card.memory_bytes == int(gb * 0.9e9)
  assert card.flops("float32") < (card.flops("bfloat16") or 1e15)


def test_a_cpus_memory_is_this_machines_or_the_one_that_is_named():
  assert hardware.card("cpu:16GiB").memory_bytes == 16 << 30
  assert hardware.card("cpu:1.5gb").memory_bytes == 1_500_000_000
  here = hardware.card("cpu").memory_bytes
  assert here == pytest.approx(hardware.available_memory(), rel=0.5)
  assert hardware.card("v5e:2x2") is None
  with pytest.raises(ValueError, match="cpu:lots cannot be read.*cpu:16GiB"):
    hardware.card("cpu:lots")
  assert hardware.card("t4").flops("bfloat16") is None  # Turing has none
