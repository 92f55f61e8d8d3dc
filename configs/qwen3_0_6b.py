"""OPERA on Qwen3-0.6B at the paper's lengths, on four TPU v5e chips.

  python -m experiments.opera_rl --config=configs/qwen3_0_6b.py \
    --config.data.path=FILE.jsonl --workdir=runs/qwen3_0_6b

For v5e:2x2 and other small slices. docs/plans/README.md lists the memory it
needs per device; docs/tpu.md explains how to start it there.
"""

from opera_jax.configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  common.full_size(config, "Qwen/Qwen3-0.6B")
  config.model.hidden_size = 1_024
  config.model.num_hidden_layers = 28
  config.model.num_attention_heads = 16
  config.model.intermediate_size = 3_072
  config.mesh.fsdp = 2
  config.mesh.tensor = 2
  config.engine.prompt_slots = 2
  config.engine.slots = 8
  config.scoring.batch_size = 2
  config.sft.micro_batches = 8
  config.rl.micro_batches = 64
  return config.lock()
