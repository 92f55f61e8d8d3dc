"""Rewards well-formed completions: one closed thought, then a finished
answer."""

import dataclasses

import numpy as np

from opera_jax import structs

OPEN, CLOSE = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class Reward:
  """1 for a well-formed completion, else 0."""

  def logprob_request(
    self, rollouts: structs.Rollouts
  ) -> structs.LogprobRequest:
    """Nothing is scored."""
    return structs.LogprobRequest()

  def rewards(
    self, rollouts: structs.Rollouts, result: structs.LogprobResult
  ) -> dict[str, np.ndarray]:
    """Float32 [B, N]."""
    fine_R = [
      sample.finished and well_formed(text)
      for sample, text in zip(rollouts.completions, rollouts.texts)
    ]
    shape = (len(rollouts.prompts), rollouts.samples)
    return {"total": np.asarray(fine_R, np.float32).reshape(shape)}


def well_formed(text: str) -> bool:
  """Whether a text is `<think> ... </think> answer`, each tag once.

  Args:
    text: the completion without special tokens, think tags kept.
  """
  if text.count(OPEN) != 1 or text.count(CLOSE) != 1:
    return False
  head, _, rest = text.partition(OPEN)
  thought, _, answer = rest.partition(CLOSE)
  return not head.strip() and bool(thought.strip()) and bool(answer.strip())
