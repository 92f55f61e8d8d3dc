"""OPERA on Qwen3-0.6B at the paper's lengths, on four TPU v5e chips or on one.

  python -m experiments.opera_rl --config=configs/qwen3_0_6b.py \
    --config.data.path=FILE.jsonl --workdir=runs/qwen3_0_6b

For v5e:2x2 and other small slices. `--config=configs/qwen3_0_6b.py:v5e_1x1`
trains LoRA adapters of rank 16 on one chip of 16 GiB. docs/plans/README.md
lists the memory it needs per device; docs/tpu.md explains how to start it
there.
"""

from opera_jax.configs import common


def get_config(arg: str = ""):
  """Returns the config; `arg` is "" or "v5e_1x1"."""
  config = common.get_config()
  common.full_size(config, "Qwen/Qwen3-0.6B")
  config.mesh.fsdp = 2
  config.mesh.tensor = 2
  config.engine.prompt_slots = 2
  config.engine.slots = 8
  config.scoring.batch_size = 2
  config.sft.micro_batches = 8
  config.rl.micro_batches = 64
  if arg == "v5e_1x1":
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    config.engine.prompt_slots = 1
    config.engine.slots = 4
    config.scoring.batch_size = 1
    config.sft.micro_batches = 16
    config.rl.micro_batches = 128
    for lora in (config.sft.lora, config.rl.lora):
      lora.rank = 16
      lora.alpha = 32.0
    # An adapter learns at a higher rate than all parameters do.
    config.sft.learning_rate = 1e-4
    config.rl.learning_rate = 1e-5
  elif arg:
    raise ValueError(
      f"configs/qwen3_0_6b.py takes '' or 'v5e_1x1', got {arg!r}."
    )
  return config.lock()
