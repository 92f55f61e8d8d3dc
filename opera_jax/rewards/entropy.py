"""Entropy minimisation (as a baseline in arXiv 2509.05489).

    R_EM = -log ppl(a | q) = mean log p of the sampled tokens

It rewards answers to which the policy assigns a high probability.
"""

import dataclasses

import numpy as np

from opera_jax import structs


@dataclasses.dataclass(frozen=True)
class Reward:
  """R_EM of every sample, nats per token, at most 0."""

  def logprob_request(
    self, rollouts: structs.Rollouts
  ) -> structs.LogprobRequest:
    """Nothing: completions are scored anyway."""
    return structs.LogprobRequest()

  def rewards(
    self, rollouts: structs.Rollouts, result: structs.LogprobResult
  ) -> dict[str, np.ndarray]:
    """Float32 [B, N]; 0 for an answer without tokens."""
    mean_R = [
      np.mean(logprob) if len(logprob) else 0.0
      for logprob in result.completion_logprob
    ]
    shape = (len(rollouts.prompts), rollouts.samples)
    return {"total": np.asarray(mean_R, np.float32).reshape(shape)}
