"""OPERA's rewards from the log-probabilities that `opera_requests` planned.

`rewards.opera` has the equations.

Shape key: B prompts, N completions of a prompt, R = B * N completions
(prompt-major), J steps of a thought, S slots of a completion, M scored tokens
of a completion (over all its continuations).
"""

from collections.abc import Sequence

import jax
import numpy as np

from opera_jax.kernels.perplexity_reward import api as perplexity_reward
from opera_jax.rewards import opera_requests

MODES = ("both", "r_self", "r_ppl", "one_hot")
# Jitted as a whole: op by op, every line would be compiled for every shape.
_perplexity_reward = jax.jit(
  perplexity_reward.perplexity_reward, static_argnames="tau"
)
_group_rank = jax.jit(perplexity_reward.group_rank)


def rewards(
  continuation_logprob: Sequence[np.ndarray],
  index: opera_requests.ContinuationIndex,
  *,
  samples: int,
  alpha: float = 0.3,
  tau: float = 2.0,
  mode: str = "both",
) -> dict[str, np.ndarray]:
  """Computes the reward and its terms.

  Args:
    continuation_logprob: [Q] float32 arrays, log-probabilities of the scored
      tokens of each continuation of `opera_requests.plan`, in nats.
    index: returned by `opera_requests.plan`.
    samples: N, completions of a prompt.
    alpha: weight of R_ppl.
    tau: number of productive reflections for which R_self is tanh(1).
    mode: "both" is R of the equations; "r_self" and "r_ppl" are one term alone;
      "one_hot" replaces R_ppl by 1 for the strict best of a group and 0 for the
      others.

  Returns:
    float32 [B, N] each: `total`, `r_ppl` (as used in the total), `r_self`,
    `count` (R_raw) and `score` (L, nats per token).

  Raises:
    ValueError: an unknown mode, alpha outside 0..1, tau that is not positive,
      fewer than 2 samples, completions that do not divide into groups, another
      number of continuations than planned, or a log-probability that is not
      finite.
  """
  completions = len(index.last)
  if mode not in MODES:
    raise ValueError(f"Unknown reward mode {mode!r}. Use one of {MODES}.")
  if not 0 <= alpha <= 1 or tau <= 0:
    raise ValueError(
      f"The reward needs 0 <= alpha <= 1 and tau > 0, got {alpha} and {tau}."
    )
  if samples < 2 or completions % samples:
    raise ValueError(
      f"R_ppl ranks a group of at least 2 samples, got {completions} "
      f"completions in groups of {samples}. Raise config.rl.samples, and give "
      "every prompt all of its samples."
    )
  logprob_RM, slot_RM = _concatenate(continuation_logprob, index)
  # The number of open-ended prompts differs from step to step. Padding it keeps
  # the number of compiled shapes small.
  mean_RS, _, count_R, self_R = _perplexity_reward(
    _pad(logprob_RM, 0.0),
    _pad(slot_RM, opera_requests.NONE),
    _pad(index.baseline, opera_requests.NONE),
    tau=float(tau),
  )
  count_R = np.asarray(count_R)[:completions]
  self_R = np.asarray(self_R)[:completions]
  score_R = np.asarray(mean_RS)[np.arange(completions), index.last]
  score_BN = score_R.reshape(-1, samples)
  rank_BN = np.asarray(_group_rank(_pad(score_BN, 0.0)))[: len(score_BN)]
  if mode == "one_hot":
    rank_BN = (rank_BN == 1.0).astype(np.float32)
  self_BN = self_R.reshape(score_BN.shape)
  total_BN = {
    "r_self": self_BN,
    "r_ppl": rank_BN,
    "both": alpha * rank_BN + (1 - alpha) * self_BN,
    "one_hot": alpha * rank_BN + (1 - alpha) * self_BN,
  }[mode]
  terms = {
    "total": total_BN,
    "r_ppl": rank_BN,
    "r_self": self_BN,
    "count": count_R.reshape(score_BN.shape),
    "score": score_BN,
  }
  return {name: term.astype(np.float32) for name, term in terms.items()}


def step_deltas(
  continuation_logprob: Sequence[np.ndarray],
  index: opera_requests.ContinuationIndex,
) -> np.ndarray:
  """`P_j - P_{j-1}` of each step, float32 [R, J], nats per token.

  NaN for steps that were not scored: `plan(all_steps=True)` scores every step,
  otherwise only reflective steps are scored.
  """
  mean_RS = np.full(index.baseline.shape, np.nan, np.float32)
  for q, logprob_G in enumerate(continuation_logprob):
    mean_RS[index.completion[q], index.slot[q]] = np.mean(logprob_G)
  row_R1 = np.arange(len(index.last))[:, None]
  delta_RJ = mean_RS[row_R1, index.after] - mean_RS[row_R1, index.before]
  return np.where(
    index.after == opera_requests.NONE, np.float32(np.nan), delta_RJ
  )


def _pad(x_RX: np.ndarray, value: float) -> np.ndarray:
  """Pads the first axis with `value`, up to `opera_requests.padded_size`."""
  missing = opera_requests.padded_size(len(x_RX)) - len(x_RX)
  return np.pad(x_RX, ((0, missing), (0, 0)), constant_values=value)


def _concatenate(
  continuation_logprob: Sequence[np.ndarray],
  index: opera_requests.ContinuationIndex,
) -> tuple[np.ndarray, np.ndarray]:
  """Concatenates the scored tokens of each completion.

  Returns:
    Log-probabilities float32 [R, M], and the slot of each int32 [R, M].
  """
  if len(continuation_logprob) != len(index.completion):
    raise ValueError(
      f"Got scores of {len(continuation_logprob)} continuations, the index has "
      f"{len(index.completion)}. Pass the log-probabilities of exactly the "
      "continuations that were planned."
    )
  completions = len(index.last)
  used_R = np.zeros(completions, np.int64)
  for q, logprob_G in enumerate(continuation_logprob):
    if not np.all(np.isfinite(logprob_G)):
      raise ValueError(
        f"The log-probability of continuation {q} (completion "
        f"{index.completion[q]}) holds "
        f"{logprob_G[~np.isfinite(logprob_G)][0]}; log-probabilities must be "
        "finite. Check the policy's parameters for NaN."
      )
    used_R[index.completion[q]] += len(logprob_G)
  M = opera_requests.padded_size(int(used_R.max(initial=1)))
  logprob_RM = np.zeros((completions, M), np.float32)
  slot_RM = np.full((completions, M), opera_requests.NONE, np.int32)
  used_R[:] = 0
  for q, logprob_G in enumerate(continuation_logprob):
    r, begin = index.completion[q], used_R[index.completion[q]]
    logprob_RM[r, begin : begin + len(logprob_G)] = logprob_G
    slot_RM[r, begin : begin + len(logprob_G)] = index.slot[q]
    used_R[r] += len(logprob_G)
  return logprob_RM, slot_RM
