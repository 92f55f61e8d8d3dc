"""Builds a method config in one of three sizes.

  ""          the paper's sizes, without a model or data
  "smoke"     seconds per step, for tests
  "ablation"  storyworld with sums, for `experiments.ablate`

A method's file has a function `method`, which sets what defines the method at
any size, and optionally `paper`, which sets the sizes of its paper. Everything
else is OPERA's recipe.
"""

from collections.abc import Callable
from typing import TypeAlias

import ml_collections

from opera_jax.configs import common, tiny

Config: TypeAlias = ml_collections.ConfigDict


def build(
  arg: str,
  method: Callable[[Config], None],
  paper: Callable[[Config], None] | None = None,
) -> Config:
  """Returns the locked config of a method in the size `arg`."""
  if arg == "":
    config = common.get_config()
    if paper is not None:
      paper(config)
  elif arg == "smoke":
    config = smoke()
  elif arg == "ablation":
    config = ablation()
  else:
    raise ValueError(
      f"A method config takes '', 'smoke' or 'ablation', got {arg!r}."
    )
  method(config)
  if config.rl.divergence_coef and arg:
    # The vocabulary is small.
    config.rl.teacher_top_k = {"smoke": 8, "ablation": 16}[arg]
  return config.lock()


def smoke() -> Config:
  """One RL step of a barely trained model."""
  config = tiny.get_config("smoke").copy_and_resolve_references()
  config.unlock()
  config.data.math_share = 0.5
  config.data.documents = 160
  config.data.synthesis = 12
  config.rl.steps = 1
  config.rollout.max_new_tokens = 48
  config.scoring.prefix_buckets = (192, 384)
  config.scoring.slot_buckets = (8,)
  config.scoring.continuation_buckets = (96,)
  config.rl.completions_per_row, config.rl.row_buckets = 1, (192, 384)
  return config


def ablation() -> Config:
  """The task and the sizes of the ablations."""
  config = tiny.get_config().copy_and_resolve_references()
  config.unlock()
  config.data.math_share = 0.35
  config.data.held_out = 120
  config.rollout.max_new_tokens = 160
  config.rl.steps = 400  # the token budget ends RL earlier
  config.rl.warmup = 0.0  # so that no learning rate depends on `steps`
  config.rl.prompts = 8
  config.rl.samples = 8
  config.rl.mini_batch = 4
  config.rl.learning_rate = 2e-4
  config.rl.checkpoint_every = 10
  config.rl.completions_per_row, config.rl.row_buckets = 1, (192, 256)
  return config
