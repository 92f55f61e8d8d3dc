"""Metrics of one RL step."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opera_jax import structs
from opera_jax.advantages import group as group_lib
from opera_jax.rewards import smoothing
from opera_jax.rl import score as score_lib

# Reward terms of open-ended prompts only, and of maths prompts only.
OPEN_ENDED = ("opera", "r_ppl", "r_self", "count", "score")
MATHS = ("verifiable", "correct", "cannot_tell", "check_failed", "undecided")
BY_TASK = {"open_ended": OPEN_ENDED, "math": MATHS}
NAMES = {
  "thought_tokens": "completions/mean_thought_length",
  "steps": "thought/steps",
  "reflections": "thought/reflections",
  "closed": "thought/closed",
  "steps_beyond_max": "thought/steps_beyond_max",
}


def term_means(scored: score_lib.Scored) -> dict[str, float]:
  """The mean of every reward term over the prompts that it is of.

  A term without such prompts is left out.
  """
  out = {}
  for name, term_BN in scored.terms.items():
    mine_B = np.ones_like(scored.open_ended_B)
    if name in OPEN_ENDED:
      mine_B = scored.open_ended_B
    elif name in MATHS:
      mine_B = ~scored.open_ended_B
    if mine_B.any():
      out[name] = float(term_BN[mine_B].mean())
  return out


def opens_with_close(text: str) -> bool:
  """Whether the answer of a completion opens with a stray closing tag.

  Args:
    text: of `Tokenizer.completion_text`.
  """
  answer = text.partition("</think>")[2] if "<think>" in text else text
  return answer.lstrip().startswith("</think>")


def histograms(
  scored: score_lib.Scored, advantage: np.ndarray
) -> dict[str, np.ndarray]:
  """Values of a step's completions, by name: rewards, lengths, advantages.

  Args:
    scored: rewards of the step's samples.
    advantage: of all tokens of the loss.
  """
  return {
    "reward": scored.total_BN,
    **{f"reward/{name}": scored.terms[name] for name in scored.weights},
    "completions/length": np.asarray(scored.completion_sizes()),
    "advantage": advantage,
  }


def texts(scored: score_lib.Scored) -> list[str]:
  """Prompt, completion and reward of the first sample of every prompt."""
  rollouts = scored.rollouts
  return [
    f"prompt: {prompt.prompt}\n\ncompletion: "
    f"{rollouts.texts[b * rollouts.samples]}\n\nreward: "
    f"{scored.total_BN[b, 0]:.4g}"
    for b, prompt in enumerate(rollouts.prompts)
  ]


def rl_step(
  scored: score_lib.Scored,
  samples: Sequence[Sequence[structs.Sample]],
  *,
  old: structs.Logprobs,
  ema: float | None,
  updates: Sequence[Mapping[str, Any]],
  clock: Mapping[str, float],
) -> dict[str, float]:
  """Computes the metrics of a step.

  Args:
    scored: rewards of the step's samples.
    samples: [B][N] completions.
    old: the trainer's log-probabilities of prompt + completion at the sampling
      temperature.
    ema: EMA of L, nats per token; used as a metric only. None before the first
      open-ended prompt.
    updates: metrics of each mini-batch.
    clock: monotonic seconds at the end of each phase, in order.

  Returns:
    Scalars by name.
  """
  flat = [s for group in samples for s in group]
  length_R = np.asarray([len(s.tokens) for s in flat])
  gap = np.concatenate(
    [
      np.abs(s.logprob - logprob[len(logprob) - len(s.tokens) :])
      for s, logprob in zip(flat, old.prefix_logprob)
    ]
  )
  total_BN = scored.total_BN
  out = {
    "reward/mean": total_BN.mean(),
    "reward/std": total_BN.std(axis=1, ddof=1).mean(),
    "reward/batch_std": total_BN.std(),
    "frac_reward_zero_std": 1
    - group_lib.has_different_rewards(total_BN).mean(),
    "completions/mean_length": length_R.mean(),
    "completions/min_length": length_R.min(),
    "completions/max_length": length_R.max(),
    "completions/clipped_ratio": np.mean([not s.finished for s in flat]),
    "sampler_trainer/logprob_diff": gap.mean(),
    "sampler_trainer/max_logprob_diff": gap.max(),
    "sampler_trainer/truncation_diff": np.concatenate(
      [s.behavior_logprob() - s.logprob for s in flat]
    ).mean(),
    "scoring/prefix_tokens": scored.logprobs.prefix_tokens,
    "scoring/continuation_tokens": scored.logprobs.continuation_tokens,
    "scoring/separate_tokens": scored.separate_tokens,
  }
  out["completions/stray_think_close"] = np.mean(
    [opens_with_close(text) for text in scored.rollouts.texts]
  )
  open_ended_B = scored.open_ended_B
  for task, mine_B in (("open_ended", open_ended_B), ("math", ~open_ended_B)):
    if mine_B.any():
      out[f"reward_by_task/{task}"] = total_BN[mine_B].mean()
  sets = [prompt.set for prompt in scored.rollouts.prompts]
  for name in filter(None, sorted(set(sets))):
    mine_B = np.asarray([one == name for one in sets])
    out[f"reward_by_set/{name}"] = total_BN[mine_B].mean()
  for name, mean in term_means(scored).items():
    out[NAMES.get(name, f"reward/{name}")] = mean
  if ema is not None:
    out["reward/score_ema"] = ema
  if ema is not None and open_ended_B.any() and "score" in scored.terms:
    score_ON = scored.terms["score"][open_ended_B]
    out["reward/score_smoothed"] = smoothing.smoothed(score_ON, ema).mean()
  for name in updates[0]:
    out[name] = np.mean([values[name] for values in updates])
  names = list(clock)
  for before, name in zip(names, names[1:]):
    out[name] = clock[name] - clock[before]
  out["step_time"] = clock[names[-1]] - clock[names[0]]
  out["time/reward_fraction"] = out["time/reward"] / out["step_time"]
  out["tokens_per_second"] = length_R.sum() / out["step_time"]
  return {name: float(value) for name, value in out.items()}


def shown(line: Mapping[str, float]) -> dict[str, str]:
  """The numbers of a step that the progress bar shows, by name."""
  forms = {
    "reward/mean": ("reward", ".3g"),
    "kl": ("KL", ".2g"),
    "completions/mean_length": ("length", ".0f"),
  }
  return {
    label: format(line[name], form)
    for name, (label, form) in forms.items()
    if name in line
  }
