"""Length penalties in tokens: O1-pruner, Efficient Reasoner, DAPO.

Shape key: B prompts, N samples a prompt.
"""

import dataclasses

import numpy as np

from opera_jax import structs
from opera_jax.rewards import verifiable

KINDS = ("o1_pruner", "efficient", "overlong")


@dataclasses.dataclass(frozen=True)
class Reward:
  """One of the formulas below.

  Attributes:
    kind: "o1_pruner", "efficient" or "overlong".
    limit: L_max of "overlong", tokens.
    buffer: L_buf of "overlong", tokens.
    method: how "efficient" checks maths answers, see `verifiable`.
  """

  kind: str = "o1_pruner"
  limit: int = 20_480
  buffer: int = 4_096
  method: str = "exact"

  def __post_init__(self):
    """Refuses an unknown kind, and a buffer outside (0, limit]."""
    if self.kind not in KINDS:
      raise ValueError(f"Unknown kind {self.kind!r}. Use one of {KINDS}.")
    if not 0 < self.buffer <= self.limit:
      raise ValueError(
        f"Overlong shaping needs 0 < buffer <= limit, got {self.buffer} and "
        f"{self.limit}. Set both, in tokens of a completion."
      )

  def logprob_request(
    self, rollouts: structs.Rollouts
  ) -> structs.LogprobRequest:
    """Nothing is scored."""
    return structs.LogprobRequest()

  def rewards(
    self, rollouts: structs.Rollouts, result: structs.LogprobResult
  ) -> dict[str, np.ndarray]:
    """Float32 [B, N]."""
    length_BN = rollouts.lengths()
    if self.kind == "o1_pruner":
      return {"total": o1_pruner(length_BN)}
    if self.kind == "overlong":
      return {"total": overlong(length_BN, self.limit, self.buffer)}
    right_BN = verifiable.right(rollouts, method=self.method)
    return {"total": efficient(length_BN, right_BN)}


def o1_pruner(length_BN: np.ndarray) -> np.ndarray:
  """`-clip((len - mean of the group) / len, -1, 1)` (arXiv 2501.12570).

  Returns:
    float32 [B, N]; an empty answer counts as one token.
  """
  length_BN = np.maximum(np.asarray(length_BN, np.float64), 1.0)
  mean_B1 = length_BN.mean(axis=1, keepdims=True)
  gap_BN = (length_BN - mean_B1) / length_BN
  return -np.clip(gap_BN, -1, 1).astype(np.float32)


def efficient(length_BN: np.ndarray, right_BN: np.ndarray) -> np.ndarray:
  """Efficient Reasoner (arXiv 2502.04463).

      -2 (sigmoid((len - mean_right) / (std_right + 1e-5)) - 0.5)

  for right answers in groups with at least two of them, else 0. Mean and
  deviation (ddof 0) are over the lengths of the right answers.

  Returns:
    float32 [B, N].
  """
  out_BN = np.zeros(np.shape(length_BN), np.float32)
  for b, (length_N, right_N) in enumerate(zip(length_BN, right_BN)):
    mine = np.flatnonzero(right_N)
    if len(mine) < 2:
      continue
    length = length_N[mine].astype(np.float64)
    score = (length - length.mean()) / (length.std() + 1e-5)
    out_BN[b, mine] = -2 * (1 / (1 + np.exp(-score)) - 0.5)
  return out_BN


def overlong(length_BN: np.ndarray, limit: int, buffer: int) -> np.ndarray:
  """DAPO's `min(-(len - (limit - buffer)) / buffer, 0)` (arXiv 2503.14476).

  Returns:
    float32 [B, N], from 0 down to -1 at the limit.
  """
  over_BN = np.asarray(length_BN, np.float64) - (limit - buffer)
  return np.minimum(-over_BN / buffer, 0.0).astype(np.float32)
