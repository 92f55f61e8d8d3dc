"""OPERA on Qwen3-8B at the paper's lengths, on a TPU slice.

  python -m experiments.opera_rl --config=configs/qwen3_8b.py:v5p_4x4x4 \
    --config.data.path=FILE.jsonl --workdir=runs/qwen3_8b

The argument names the slice: v5p_4x4x4 (the default), v5e_8x8, v6e_8x8 or
tpu7x_2x2x1. docs/plans/README.md lists the memory each program needs per
device; docs/tpu.md explains how to get a slice and start there. For another
slice, start from the nearest one and check with `python -m experiments.plan`
whether it fits.
"""

from opera_jax.configs import common

# Slice -> mesh (fsdp, tensor), prompts in flight, prefixes per scoring call,
# micro-batches of an SFT update and of a policy update.
SLICES = {
  "v5p_4x4x4": ((16, 4), 64, 16, 1, 4),
  "v5e_8x8": ((8, 8), 16, 8, 2, 16),
  "v6e_8x8": ((16, 4), 32, 16, 1, 8),
  "tpu7x_2x2x1": ((4, 2), 8, 4, 4, 32),
}


def get_config(arg: str = ""):
  """Returns the config; `arg` is a key of SLICES, "" means the first."""
  slice_name = arg or next(iter(SLICES))
  if slice_name not in SLICES:
    raise ValueError(
      f"configs/qwen3_8b.py takes one of {', '.join(SLICES)}, got {arg!r}."
    )
  config = common.get_config()
  common.full_size(config, "Qwen/Qwen3-8B")
  (
    (config.mesh.fsdp, config.mesh.tensor),
    config.engine.prompt_slots,
    config.scoring.batch_size,
    config.sft.micro_batches,
    config.rl.micro_batches,
  ) = SLICES[slice_name]
  return config.lock()
