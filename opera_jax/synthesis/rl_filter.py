"""Which prompts RL learns from: those the policy neither masters nor fails.

arXiv 2606.25757 keeps a maths prompt if exactly 1 of 8 samples is right, and
an open-ended one if a judge gives the policy's answer 2 to 3 of 5.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

from opera_jax import structs

COLUMN = "column:"


@dataclasses.dataclass(frozen=True)
class Rules:
  """Settings of the filter; as they stand they drop nothing.

  Attributes:
    samples: n, completions sampled of a maths prompt; 0 keeps all of them.
    right: the numbers of right ones among n with which it is kept.
    judge: scores an open-ended prompt: "column:NAME" of the data set, or
      "package.module:function" on one completion of the policy (see
      `rewards.function`); "" keeps all of them.
    band: lowest and highest score that are kept.
  """

  samples: int = 0
  right: tuple[int, ...] = (1,)
  judge: str = ""
  band: tuple[float, float] = (2.0, 3.0)

  def __post_init__(self):
    """Refuses what no prompt could fulfil."""
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
    """Whether anything may be dropped."""
    return bool(self.samples or self.judge)


def column_scores(
  prompts: Sequence[structs.Prompt], judge: str
) -> dict[str, float]:
  """Scores of open-ended prompts by id, from the column that `judge` names.

  Raises:
    ValueError: a prompt without the column, or with no finite number in it.
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
    rules: what is kept.
    right: right samples of each maths prompt by id, where `rules.samples`.
    score: of each open-ended prompt by id, where `rules.judge`.

  Returns:
    Why each prompt is dropped, None for those that are kept; and counts by
    reason ("kept" among them).

  Raises:
    ValueError: nothing kept.
  """
  low, high = rules.band
  why: list[str | None] = []
  for prompt in prompts:
    word = None
    if prompt.task == "math" and rules.samples:
      count = right[prompt.id]
      if count not in rules.right:
        word = f"{count} of {rules.samples} right"
    elif prompt.task == "open_ended" and rules.judge:
      if score[prompt.id] < low:
        word = f"score below {low:g}"
      elif score[prompt.id] > high:
        word = f"score above {high:g}"
    why.append(word)
  counts = collections.Counter(word for word in why if word is not None)
  if counts.total() == len(why):
    raise ValueError(
      f"No RL prompt passed the filters: {dict(counts)}. Loosen "
      "config.select.rl, or give more prompts."
    )
  return why, {"kept": len(why) - counts.total(), **counts}
