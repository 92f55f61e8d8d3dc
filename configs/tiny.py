"""The whole method in minutes on a laptop CPU: storyworld and a 0.7M Qwen3.

  python -m experiments.opera_rl --config=configs/tiny.py --workdir=runs/tiny

docs/results.md shows what to expect. `--config=configs/tiny.py:smoke` runs the
same stages in about a minute, for tests; it is too small to learn anything.
"""

from opera_jax.configs import common


def get_config(arg: str = ""):
  """Returns the config; `arg` is "" or "smoke"."""
  config = common.get_config()
  config.tokenizer.bpe_size = 640
  config.model.hidden_size = 128
  config.model.num_hidden_layers = 3
  config.model.num_attention_heads = 4
  config.model.num_key_value_heads = 2
  config.model.head_dim = 32
  config.model.intermediate_size = 384
  config.model.rope_theta = 10_000.0

  config.data.synthesis = 384
  config.data.rl = 1_024
  config.data.held_out = 240
  config.data.documents = 10_240
  config.max_prompt_tokens = 96
  config.max_reference_tokens = 96

  config.base.batch_size = 16
  config.base.packed = True
  config.base.row_tokens = 288
  config.base.learning_rate = 3e-3
  config.base.checkpoint_every = 100

  config.engine.prompt_buckets = (96, 160, 224, 320)
  config.engine.cache_buckets = (256,)
  config.engine.prompt_slots = 16
  config.engine.slots = 16
  config.rollout.max_new_tokens = 224
  config.scoring.prefix_buckets = (160, 224, 288, 352)
  config.scoring.slot_buckets = (1, 8)
  config.scoring.continuation_buckets = (64, 96)

  config.synthesis.batch = 96
  config.synthesis.budget = 8
  config.synthesis.max_step_tokens = 96
  config.synthesis.max_thought_tokens = 192
  config.synthesis.max_answer_tokens = 96
  # The model is too small to follow a template; rewriting samples again.
  config.synthesis.guide = "{prompt}"

  config.sft.batch_size = 8
  config.sft.packed = True
  config.sft.row_tokens = 288
  config.sft.learning_rate = 5e-4
  config.sft.epochs = 2
  config.sft.checkpoint_every = 50

  # 16 prompts x 8 samples; the learning rate is high enough for 20 steps.
  config.rl.steps = 20
  config.rl.prompts = 16
  config.rl.samples = 8
  config.rl.mini_batch = 4
  config.rl.learning_rate = 2e-4
  config.rl.warmup = 0.1
  config.rl.completions_per_row = 4
  config.rl.row_buckets = (128, 224)
  config.rl.checkpoint_every = 8

  config.evaluate.samples = 2
  if arg == "smoke":
    config.data.synthesis = 24
    config.data.held_out = 16
    config.data.documents = 640
    config.data.rl = 64
    config.base.checkpoint_every = 8
    config.synthesis.batch = 12
    config.synthesis.budget = 3
    config.select.min_reflections = 0
    config.select.think_tags = True
    config.select.min_thought_words = 0
    config.sft.batch_size = 2
    config.rl.steps = 3
    config.rl.prompts = 4
    config.rl.samples = 4
    config.rl.mini_batch = 2
    config.rl.completions_per_row, config.rl.row_buckets = 1, (224, 288, 320)
    config.rl.checkpoint_every = 1
    config.evaluate.thoughts = 2
  elif arg:
    raise ValueError(f"configs/tiny.py takes '' or 'smoke', got {arg!r}.")
  return config.lock()
