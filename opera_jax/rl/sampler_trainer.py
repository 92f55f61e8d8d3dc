"""Stops a run whose sampler and trainer disagree.

Both compute log-probabilities of the same tokens with the same weights, so the
mean |difference| is rounding (0.02 at most in bfloat16). A larger one, step
after step, means that the policy learns from samples that are not its own.
"""


class Watch:
  """Counts the steps in a row beyond the bound."""

  def __init__(self, bound: float, steps: int):
    """Nothing seen yet.

    Args:
      bound: nats; 0 watches nothing.
      steps: beyond the bound in a row that end the run, at least 1.

    Raises:
      ValueError: a negative bound, or no step.
    """
    if bound < 0 or steps < 1:
      raise ValueError(
        f"The agreement of sampler and trainer needs max_logprob_diff >= 0 and "
        f"max_logprob_diff_steps >= 1, got {bound} and {steps}. Change "
        "config.rl.max_logprob_diff or config.rl.max_logprob_diff_steps."
      )
    self._bound, self._steps, self._beyond = bound, steps, 0

  def check(self, delta: float, step: int) -> None:
    """Takes the mean |difference| of a step, in nats.

    Raises:
      FloatingPointError: it was beyond the bound too often in a row.
    """
    self._beyond = self._beyond + 1 if delta > self._bound > 0 else 0
    if self._beyond >= self._steps:
      raise FloatingPointError(
        f"Step {step}: sampler and trainer differ by {delta:.3g} nats a token "
        f"on average, for {self._beyond} steps more than "
        f"config.rl.max_logprob_diff={self._bound}. Take a wider "
        "config.engine.cache_dtype or config.model.dtype, or weigh the "
        "difference with config.rl.importance_cap=2.0, and resume from the "
        "last checkpoint."
      )
