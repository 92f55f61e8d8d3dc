"""Confidence intervals over prompts by the percentile bootstrap (Efron,
1979)."""

import dataclasses
import math

import numpy as np

# Index arrays are drawn in blocks of about this many, to bound memory.
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over prompts with its confidence interval."""

  mean: float
  low: float
  high: float
  count: int  # prompts
  level: float = 0.95  # coverage

  def excludes_zero(self) -> bool:
    """Whether 0 lies outside the interval."""
    return self.low > 0 or self.high < 0


def mean_interval(
  values: np.ndarray,
  *,
  level: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> Interval:
  """The mean of `values` and its percentile interval.

  Args:
    values: [B] one number per prompt; samples of one prompt are not
      independent, so take their mean first.
    level: coverage, between 0 and 1.
    resamples: draws of B prompts with replacement.
    seed: of the resampling; the same seed and length give the same resamples.

  Returns:
    The interval; its bounds are NaN if there is only one prompt.

  Raises:
    ValueError: no values, more than one axis, a value that is not finite, or
      a level or number of resamples out of range.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not values.size:
    raise ValueError(
      f"A bootstrap takes one number a prompt, got shape {values.shape}. Take "
      "the mean over a prompt's samples first."
    )
  if not np.all(np.isfinite(values)):
    worst = int(np.flatnonzero(~np.isfinite(values))[0])
    raise ValueError(
      f"The value of prompt {worst} is {values[worst]}; a mean needs finite "
      "values. Leave that prompt out of every stage, and count it."
    )
  if not 0 < level < 1 or resamples < 1:
    raise ValueError(
      f"A bootstrap needs 0 < level < 1 and resamples >= 1, got {level} and "
      f"{resamples}."
    )
  mean, count = float(values.mean()), values.size
  if count == 1:
    return Interval(mean, math.nan, math.nan, 1, level)
  generator = np.random.default_rng(seed)
  means = np.empty(resamples)
  rows = max(1, _BLOCK // count)
  for begin in range(0, resamples, rows):
    block = means[begin : begin + rows]
    block[:] = values[generator.integers(0, count, (block.size, count))].mean(1)
  tail = (1 - level) / 2
  low, high = np.quantile(means, [tail, 1 - tail])
  return Interval(mean, float(low), float(high), count, level)


def paired_difference(
  after: np.ndarray,
  before: np.ndarray,
  *,
  level: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> Interval:
  """The interval of the mean of `after - before` over the same prompts.

  Pairing removes the variance between prompts, so a difference can be
  significant although the intervals of the two means overlap.

  Args:
    after: [B] one number per prompt.
    before: [B] the same prompts in the same order.
    level: see `mean_interval`.
    resamples: see `mean_interval`.
    seed: see `mean_interval`.

  Returns:
    The interval of the difference.

  Raises:
    ValueError: lengths that differ, or as `mean_interval`.
  """
  after, before = np.asarray(after), np.asarray(before)
  if after.shape != before.shape:
    raise ValueError(
      f"A paired difference needs the same prompts, got shapes {after.shape} "
      f"and {before.shape}. Evaluate both stages on one held-out set."
    )
  return mean_interval(
    after - before, level=level, resamples=resamples, seed=seed
  )
