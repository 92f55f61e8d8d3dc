"""Validation on held-out prompts during RL: best model and early stop.

Every so many steps the policy samples prompts that RL does not train on, and
the run's rewards are computed. The random key is the same every time, so that
two validations differ by the policy alone.

The parameters of the best validation lie in a folder of their own, named after
their step. Which step is the best is part of the host state of the stage's
checkpoint, written after the folder: a run that is killed between the two still
refers to an older folder, which is kept.
"""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opera_jax import structs
from opera_jax.rl import score as score_lib
from opera_jax.rl import step_metrics
from opera_jax.rollout import engine as engine_lib
from opera_jax.rollout import sampling
from opera_jax.sharding import runtime
from opera_jax.train import checkpoint

# Folders of parameters that are kept: those of the newest checkpoint, and of
# the one before, which is used if the newest is damaged.
_KEPT = 2


@dataclasses.dataclass(frozen=True)
class Settings:
  """Fields of `config.rl.validation`."""

  every: int  # steps between two validations; 0 turns validation off
  prompts: int  # taken from the end of RL's prompts
  samples: int  # completions per prompt
  metric: str  # "reward", or a reward term; higher is better
  patience: int  # validations without a new best that end RL; 0 is no limit
  keep_best: bool  # the stage's model is the best, not the last

  def split(
    self, prompts: Sequence[structs.Prompt]
  ) -> tuple[list[structs.Prompt], list[structs.Prompt]]:
    """Divides RL's prompts into those to train and those to validate on."""
    count = self.prompts if self.every else 0
    cut = len(prompts) - count
    return list(prompts[:cut]), list(prompts[cut:])

  def due(self, step: int, steps: int) -> bool:
    """Whether a validation follows this step, of so many in all."""
    return bool(self.every) and (step % self.every == 0 or step == steps)


@dataclasses.dataclass(frozen=True)
class Progress:
  """What validation has found so far; part of a checkpoint's host state."""

  best: float | None = None
  best_step: int = 0
  misses: int = 0  # validations since the best

  def after(self, value: float, step: int) -> "Progress":
    """The progress after one more validation."""
    if self.best is None or value > self.best:
      return Progress(value, step, 0)
    return dataclasses.replace(self, misses=self.misses + 1)


def validate(
  checks: Settings,
  found: Progress,
  folder: pathlib.Path,
  engine: engine_lib.Engine,
  reward_scorer: score_lib.RewardScorer,
  prompts: Sequence[structs.Prompt],
  prompt_ids: Sequence[np.ndarray],
  *,
  step: int,
  trained: Any,
  params: Any,
  for_rollout: Callable[[Any], Any],
  settings: sampling.Sampling,
  key: jax.Array,
  advance: Callable[[int], None],
) -> tuple[Progress, dict[str, float]]:
  """Validates the policy of a step, and saves it if it is the best so far.

  Args:
    checks: settings of validation.
    found: the progress before.
    folder: of all best parameters of the stage.
    engine: samples completions.
    reward_scorer: computes rewards.
    prompts: to validate on.
    prompt_ids: their tokens.
    step: that has just ended.
    trained: the trained parameters, which are saved.
    params: the policy in the TRAIN layout.
    for_rollout: reshards the policy for sampling.
    settings: sampling settings.
    key: random key, the same at every validation.
    advance: progress callback, called with the number of tokens.

  Returns:
    The progress after, and metrics by name.
  """
  began = time.monotonic()
  value, validated = measure(
    engine,
    reward_scorer,
    prompts,
    prompt_ids,
    params=params,
    rollout_params=for_rollout(params),
    settings=settings,
    key=key,
    samples=checks.samples,
    metric=checks.metric,
    advance=advance,
  )
  found = found.after(value, step)
  if checks.keep_best and found.best_step == step:
    save_best(folder, step, trained)
  return found, validated | {
    "validation/best_step": found.best_step,
    "time/validation": time.monotonic() - began,
  }


def measure(
  engine: engine_lib.Engine,
  reward_scorer: score_lib.RewardScorer,
  prompts: Sequence[structs.Prompt],
  prompt_ids: Sequence[np.ndarray],
  *,
  params: Any,
  rollout_params: Any,
  settings: sampling.Sampling,
  key: jax.Array,
  samples: int,
  metric: str,
  advance: Any = None,
) -> tuple[float, dict[str, float]]:
  """Samples and scores the validation prompts.

  Args:
    engine: samples completions.
    reward_scorer: computes rewards.
    prompts: to validate on.
    prompt_ids: their tokens.
    params: the policy in the TRAIN layout.
    rollout_params: the same in the ROLLOUT layout.
    settings: sampling settings.
    key: random key, the same at every validation.
    samples: N >= 2 per prompt.
    metric: "reward", or a reward term.
    advance: progress callback, called with the number of tokens.

  Returns:
    The value of `metric`, and all metrics by name.

  Raises:
    ValueError: `metric` is not a reward term of this run.
  """
  groups = engine.sample(
    rollout_params,
    prompt_ids,
    settings,
    key,
    samples=samples,
    ids=[p.id for p in prompts],
    advance=advance,
  )
  scored = reward_scorer.score(
    params, prompts, prompt_ids, groups, advance=advance
  )
  values = {"reward": float(scored.total_BN.mean())}
  values |= step_metrics.term_means(scored)
  if metric not in values:
    raise ValueError(
      f"config.rl.validation.metric is {metric!r}, and this run has "
      f"{sorted(values)}. Name one of them."
    )
  flat = [s for group in groups for s in group]
  return values[metric], {
    **{f"validation/{name}": value for name, value in values.items()},
    "validation/length": float(np.mean([len(s.tokens) for s in flat])),
    "validation/finished": float(np.mean([s.finished for s in flat])),
  }


def save_best(folder: pathlib.Path, step: int, params: Any) -> None:
  """Writes the parameters of a new best validation; all processes call it.

  Args:
    folder: of all best parameters of the stage.
    step: of the validation.
    params: the trained parameters.
  """
  if runtime.is_main_process():
    # Of a run that was killed before it recorded this step as its best.
    shutil.rmtree(folder / str(step), ignore_errors=True)
  runtime.barrier(f"best {step} cleared")
  saves = checkpoint.Checkpoints(folder / str(step))
  saves.save(0, params, {})
  saves.close()


def clean(folder: pathlib.Path) -> None:
  """Removes all but the newest best parameters; call it after a checkpoint."""
  if not runtime.is_main_process() or not folder.exists():
    return
  steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  for step in steps[:-_KEPT]:
    shutil.rmtree(folder / str(step))


def load_best(folder: pathlib.Path, step: int, like: Any) -> Any:
  """Reads the parameters of the best validation.

  Args:
    folder: see `save_best`.
    step: of the best validation.
    like: the trained parameters, for their shapes and shardings.

  Raises:
    FileNotFoundError: they are not there, or damaged.
  """
  saves = checkpoint.Checkpoints(folder / str(step), write=False)
  restored = saves.restore(like)
  saves.close()
  if restored is None:
    raise FileNotFoundError(
      f"The best parameters of step {step} are not in {folder / str(step)}, or "
      "damaged. Restore them from a copy, or repeat the stage with "
      "--config.redo=rl."
    )
  return restored[1]
