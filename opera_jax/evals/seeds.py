"""Confidence intervals over both seeds and prompts.

Shape key: S seeds, B prompts.
"""

import math

import numpy as np

from opera_jax.evals import bootstrap


def crossed_interval(
  values_SB: np.ndarray,
  *,
  level: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> bootstrap.Interval:
  """The mean over seeds and prompts, and its percentile interval.

  Seeds and prompts are resampled independently, since both vary from run to run
  (the pigeonhole bootstrap, Owen 2007). Applied to differences between two
  methods at the same seeds and prompts, it gives the paired interval.

  Args:
    values_SB: one finite number per seed and prompt.
    level: coverage.
    resamples: number of resamples.
    seed: of the resampling.

  Returns:
    The interval; its count is the number of prompts. With one seed only prompts
    vary; a single value has no interval.

  Raises:
    ValueError: not two axes, no value, or one that is not finite.
  """
  values_SB = np.asarray(values_SB, np.float64)
  if values_SB.ndim != 2 or not values_SB.size:
    raise ValueError(
      f"Give one number a seed and prompt, got shape {values_SB.shape}."
    )
  if not np.isfinite(values_SB).all():
    s, b = np.argwhere(~np.isfinite(values_SB))[0]
    raise ValueError(
      f"The value of seed {s}, prompt {b} is {values_SB[s, b]}; means need "
      "finite values."
    )
  S, B = values_SB.shape
  mean = float(values_SB.mean())
  if values_SB.size == 1:
    return bootstrap.Interval(mean, math.nan, math.nan, B, level)
  rng = np.random.default_rng(seed)
  means = np.empty(resamples)
  for i in range(resamples):
    rows = values_SB[rng.integers(0, S, S)]
    means[i] = rows[:, rng.integers(0, B, B)].mean()
  tail = (1 - level) / 2
  low, high = np.quantile(means, [tail, 1 - tail])
  return bootstrap.Interval(mean, float(low), float(high), B, level)


def compare(
  values_SB: np.ndarray,
  baseline_SB: np.ndarray,
  *,
  resamples: int = 2000,
  seed: int = 0,
) -> bootstrap.Interval:
  """The paired difference of two methods at the same seeds and prompts.

  Raises:
    ValueError: shapes that differ, or as `crossed_interval`.
  """
  values_SB, baseline_SB = np.asarray(values_SB), np.asarray(baseline_SB)
  if values_SB.shape != baseline_SB.shape:
    raise ValueError(
      f"A paired difference needs the same seeds and prompts, got shapes "
      f"{values_SB.shape} and {baseline_SB.shape}."
    )
  return crossed_interval(
    values_SB - baseline_SB, resamples=resamples, seed=seed
  )


def aes(
  accuracy: float,
  length: float,
  reference_accuracy: float,
  reference_length: float,
) -> float:
  """The accuracy-efficiency score of arXiv 2509.05489.

      AES = (len_ref - len) / len_ref + 5 (acc - acc_ref) / acc_ref

  Raises:
    ValueError: a reference of 0 or less.
  """
  if reference_accuracy <= 0 or reference_length <= 0:
    raise ValueError(
      "AES divides by the reference's accuracy and length, got "
      f"{reference_accuracy} and {reference_length}; both must be above 0."
    )
  shorter = (reference_length - length) / reference_length
  return shorter + 5 * (accuracy - reference_accuracy) / reference_accuracy
