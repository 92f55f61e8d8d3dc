"""OPERA on Qwen3-0.6B: four TPU v5e chips, one of them, or one GPU.

  python -m experiments.opera_rl --config=configs/qwen3_0_6b.py \
    --config.data.path=FILE.jsonl --workdir=runs/qwen3_0_6b

That is for v5e:2x2 and other small slices, at the paper's lengths. The argument
names one device instead:

  v5e_1x1  a TPU chip of 16 GiB: LoRA adapters of rank 16, the paper's lengths
  h100     80 GB: all parameters, the paper's lengths
  l4       24 GB: LoRA, prompts of 2,048 and completions of 4,096 tokens
  t4       16 GB: LoRA, prompts and completions of 1,024 tokens, float32

The small GPUs could hold the paper's lengths too, but read and write a token's
memory so slowly that a step of 1,024 completions would take from 9 hours (L4)
to 29 (T4) at their stated peaks, so lengths and batches are smaller there.

A T4 is of the Turing generation, whose units multiply float16 but no bfloat16.
float16 overflows at 65,504, so that it needs a loss scale, which this code does
not have; the config computes in float32 instead (config.model.dtype), without
tensor cores.

docs/plans/README.md lists the memory that each needs; docs/tpu.md and
docs/gpu.md explain how to start there.
"""

from opera_jax.configs import common


def get_config(arg: str = ""):
  """Returns the config; `arg` is "" or a key of DEVICES."""
  config = common.get_config()
  common.full_size(config, "Qwen/Qwen3-0.6B")
  config.mesh.fsdp = 2
  config.mesh.tensor = 2
  config.engine.prompt_slots = 2
  config.engine.slots = 8
  config.scoring.batch_size = 2
  config.sft.micro_batches = 8
  config.rl.micro_batches = 64
  if arg in DEVICES:
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    DEVICES[arg](config)
  elif arg:
    raise ValueError(
      f"configs/qwen3_0_6b.py takes '' or one of {', '.join(DEVICES)}, got "
      f"{arg!r}."
    )
  return config.lock()


def _adapt(config) -> None:
  """Trains LoRA adapters in both stages."""
  for lora in (config.sft.lora, config.rl.lora):
    lora.rank = 16
    lora.alpha = 32.0
  # An adapter learns at a higher rate than all parameters do.
  config.sft.learning_rate = 1e-4
  config.rl.learning_rate = 1e-5


def _v5e_1x1(config) -> None:
  config.engine.prompt_slots = 1
  config.engine.slots = 4
  config.scoring.batch_size = 1
  config.sft.micro_batches = 16
  config.rl.micro_batches = 128
  _adapt(config)


def _h100(config) -> None:
  config.engine.slots = 16
  config.scoring.batch_size = 16
  config.sft.micro_batches = 2
  config.rl.micro_batches = 16


def _l4(config) -> None:
  config.max_prompt_tokens = 2_048
  config.max_reference_tokens = 2_048
  config.rollout.max_new_tokens = 4_096
  config.rl.prompts = 32
  config.rl.samples = 8
  config.engine.prompt_slots = 2
  config.scoring.batch_size = 8
  config.sft.micro_batches = 4
  config.rl.micro_batches = 16
  _adapt(config)


def _t4(config) -> None:
  config.max_prompt_tokens = 1_024
  config.max_reference_tokens = 1_024
  config.rollout.max_new_tokens = 1_024
  config.rl.prompts = 16
  config.rl.samples = 8
  config.rl.mini_batch = 4
  config.engine.prompt_slots = 2
  config.scoring.batch_size = 4
  config.sft.micro_batches = 8
  config.rl.micro_batches = 16
  _adapt(config)
  config.model.dtype = "float32"  # a T4 has no bfloat16
  config.engine.cache_dtype = "float32"
  for lora in (config.sft.lora, config.rl.lora):
    lora.base_dtype = "float32"


DEVICES = {"v5e_1x1": _v5e_1x1, "h100": _h100, "l4": _l4, "t4": _t4}
