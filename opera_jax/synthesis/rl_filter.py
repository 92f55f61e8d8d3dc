"""Filters RL prompts by difficulty: drops those the policy always or never
solves.

arXiv 2606.25757 keeps a maths prompt if exactly 1 of 8 samples is right, and an
open-ended prompt if a judge gives the policy's answer 2 to 3 of 5 points.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

from opera_jax import structs

COLUMN = "column:"


@dataclasses.dataclass(frozen=True)
class Rules:
  """Settings of the filter; the defaults drop nothing.

  Attributes:
    samples: n, completions sampled for each maths prompt; 0 keeps all maths
      prompts.
    right: a maths prompt is kept if the number of right completions is one of
      these.
    judge: scores open-ended prompts: "column:NAME" reads a column of the
      dataset, "package.module:function" is called on one completion of the
      policy (see `rewards.function`); "" keeps all open-ended prompts.
    band: lowest and highest score that are kept.
  """

  samples: int = 0
  right: tuple[int, ...] = (1,)
  judge: str = ""
  band: tuple[float, float] = (2.0, 3.0)

  def __post_init__(self):
    """Refuses settings that no prompt can satisfy."""
    if self.samples and not (
      self.right and all(0 <= k <= self.samples for k in self.right)
    ):
      raise ValueError(
        f"Of {self.samples} samples none can have {self.right} right. Change "
        "config.select.rl.samples or config.select.rl.right."
      )
    if len(self.band) != 2 or self.band[0] > self.band[1]:
      raise ValueError(
        f"The band of scores is (lowest, highest), got {self.band}. Change "
        "config.select.rl.band."
      )

  def active(self) -> bool:
    """Whether the filter can drop any prompt."""
    return bool(self.samples or self.judge)


def column_scores(
  prompts: Sequence[structs.Prompt], judge: str
) -> dict[str, float]:
  """Reads the scores of open-ended prompts from the column of `judge`.

  Returns:
    Scores by prompt id.

  Raises:
    ValueError: a prompt without the column, or without a finite number in it.
  """
  name, out = judge.removeprefix(COLUMN), {}
  for prompt in prompts:
    score = prompt.columns.get(name)
    if (
      not isinstance(score, int | float)
      or isinstance(score, bool)
      or not math.isfinite(score)
    ):
      raise ValueError(
        f"Prompt {prompt.id!r}: config.select.rl.judge={judge!r} needs a "
        f"number in its column {name!r}, which is {score!r}; the prompt has "
        f"{sorted(prompt.columns)}. Add it, or name another column."
      )
    out[prompt.id] = float(score)
  return out


def verdicts(
  prompts: Sequence[structs.Prompt],
  rules: Rules,
  *,
  right: Mapping[str, int],
  score: Mapping[str, float],
) -> tuple[list[str | None], dict[str, int]]:
  """Filters RL prompts.

  Args:
    prompts: of both tasks.
    rules: settings.
    right: number of right completions by id of the maths prompt; read if
      `rules.samples` is set.
    score: by id of the open-ended prompt; read if `rules.judge` is set.

  Returns:
    For each prompt the reason why it is dropped, None if it is kept; and the
    number of prompts by reason, with "kept" for those that pass.

  Raises:
    ValueError: no prompt passed.
  """
  low, high = rules.band
  reasons: list[str | None] = []
  for prompt in prompts:
    reason = None
    if prompt.task == "math" and rules.samples:
      count = right[prompt.id]
      if count not in rules.right:
        reason = f"{count} of {rules.samples} right"
    elif prompt.task == "open_ended" and rules.judge:
      if score[prompt.id] < low:
        reason = f"score below {low:g}"
      elif score[prompt.id] > high:
        reason = f"score above {high:g}"
    reasons.append(reason)
  counts = collections.Counter(r for r in reasons if r is not None)
  if counts.total() == len(reasons):
    raise ValueError(
      f"No RL prompt passed the filters: {dict(counts)}. Loosen "
      "config.select.rl, or give more prompts."
    )
  return reasons, {"kept": len(reasons) - counts.total(), **counts}
