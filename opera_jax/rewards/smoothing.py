"""The released code's smoothing of L (2606.25757), used only as metrics."""

import numpy as np


def update_ema(
  ema: float | None, score_BN: np.ndarray, *, rate: float = 0.1
) -> float:
  """Updates the released code's EMA of L, which is only a metric here.

  The release feeds `0.8 L + 0.2 ema` to the reward. That is the same increasing
  affine map for the whole batch, so it changes neither ranks nor signs of
  differences, and the reward here uses L itself.

  Args:
    ema: the value so far, nats per token; None before the first batch.
    score_BN: L of the batch.
    rate: weight of the batch's mean.

  Returns:
    The new value, nats per token.
  """
  mean = float(np.mean(score_BN))
  return mean if ema is None else (1 - rate) * ema + rate * mean


def smoothed(
  score_BN: np.ndarray, ema: float, *, weight: float = 0.2
) -> np.ndarray:
  """`(1 - weight) L + weight ema`, the release's smoothed score; a metric."""
  return (1 - weight) * score_BN + weight * ema
