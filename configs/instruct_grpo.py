"""Plain GRPO on maths, from an instruct model: no cold start, no SFT.

  python -m experiments.opera_rl --config=configs/instruct_grpo.py \
    --config.data.math_path=FILE.jsonl --workdir=runs/instruct_grpo

Each line of the file is {"question": ..., "answer": ...} with the final number
after ####, as in GSM8K; `hf:openai/gsm8k:main` reads that from the hub, and
`config.data.math_fields` maps other columns. The reward is 1 for a right answer
and 0 for another one; 5 % of the tasks are held out.

Qwen3-0.6B has been trained to think and to answer, so that RL starts from the
checkpoint itself (config.rl.init). `--config.checkpoint=` takes any other
instruct model. The sizes are for one GPU of 24 GB or more (config.mesh spreads
them over what there is); `python -m experiments.plan --topology=NAME --solve`
finds others.
"""

from opera_jax.configs import common


def get_config():
  """Returns the config."""
  config = common.get_config()
  config.stages = "rl,evaluate,report"
  config.checkpoint = "Qwen/Qwen3-0.6B"
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.data.kind = "jsonl"
  config.data.shares = (0.0, 0.95, 0.05)
  config.max_prompt_tokens = 512
  config.max_reference_tokens = 512
  config.rollout.max_new_tokens = 2_048

  config.reward.terms = "verifiable"
  config.rl.init = "base"
  config.rl.steps = 100
  config.rl.prompts = 32
  config.rl.samples = 8
  # One update a step, so that every update is on-policy.
  config.rl.mini_batch = 32
  config.rl.micro_batches = 32
  config.rl.completions_per_row = 2
  config.rl.warmup = 0.05
  config.rl.checkpoint_every = 10

  config.engine.prompt_slots = 2
  config.engine.cache_dtype = "bfloat16"
  config.scoring.batch_size = 8
  return config.lock()
