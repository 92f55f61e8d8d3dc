"""Stops a run whose sampler and trainer disagree.

Both compute log-probabilities of the same tokens with the same weights, so the
mean |difference| is rounding (0.02 at most in bfloat16). If it is larger step
after step, the samples are off-policy.
"""


class Watch:
  """Counts consecutive steps whose difference exceeds the bound."""

  def __init__(self, bound: float, steps: int):
    """Starts with a count of 0.

    Args:
      bound: in nats; 0 turns the check off.
      steps: consecutive steps above the bound that end the run, at least 1.

    Raises:
      ValueError: a negative bound, or less than 1 step.
    """
    if bound < 0 or steps < 1:
      raise ValueError(
        f"The check of sampler against trainer needs max_logprob_diff >= 0 and "
        f"max_logprob_diff_steps >= 1, got {bound} and {steps}. Change "
        "config.rl.max_logprob_diff or config.rl.max_logprob_diff_steps."
      )
    self._bound, self._steps, self._above = bound, steps, 0

  def check(self, delta: float, step: int) -> None:
    """Adds the mean |difference| of a step, in nats.

    Raises:
      FloatingPointError: too many consecutive steps exceeded the bound.
    """
    self._above = self._above + 1 if delta > self._bound > 0 else 0
    if self._above >= self._steps:
      raise FloatingPointError(
        f"Step {step}: sampler and trainer differ by {delta:.3g} nats a token "
        f"on average; it exceeded config.rl.max_logprob_diff={self._bound} for "
        f"{self._above} consecutive steps. Use a wider "
        "config.engine.cache_dtype or config.model.dtype, or correct the "
        "difference with config.rl.importance_cap=2.0, and resume from the "
        "last checkpoint."
      )
