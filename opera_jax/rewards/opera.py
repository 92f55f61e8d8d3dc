"""OPERA's reward (arXiv 2606.25757): the policy's own log-probability of the
reference.

With `lp(a | c)` the mean log-probability per token of `a` after `c`,

    P_0   = lp(y_ref | x, <think>)    P_j = lp(y_ref | x, <think>, s_1 .. s_j)
    R_raw = #{ j : step j is reflective and P_j > P_{j-1} }
    R_self = tanh(R_raw / tau)
    L_i   = lp(y_ref | x, z_i, y_i)
    R_ppl_i = #{ k != i : L_k < L_i } / (N - 1)
    R     = alpha R_ppl + (1 - alpha) R_self

`opera_requests` plans the continuations that have to be scored, `opera_reward`
computes the rewards from their log-probabilities, and `Reward` here joins the
two for the run.
"""

import dataclasses

import jax
import numpy as np

from opera_jax import structs
from opera_jax.rewards import opera_requests, opera_reward


@dataclasses.dataclass(frozen=True)
class Reward:
  """OPERA's reward for open-ended prompts; other prompts get 0.

  Attributes:
    alpha: see `opera_reward.rewards`.
    tau: see `opera_reward.rewards`.
    mode: see `opera_reward.rewards`.
    bridge_ids: see `opera_requests.plan`.
    compare: see `opera_requests.plan`.
    every_step: every step counts as reflective, with or without a keyword.
    all_steps: see `opera_requests.plan`.
  """

  alpha: float = 0.3
  tau: float = 2.0
  mode: str = "both"
  bridge_ids: tuple[int, ...] = ()
  compare: str = "previous"
  every_step: bool = False
  all_steps: bool = False

  def logprob_request(
    self, rollouts: structs.Rollouts
  ) -> structs.LogprobRequest:
    """The continuations of open-ended completions.

    The request's `aux` is their `opera_requests.ContinuationIndex`.
    """
    chosen = _open_ended(rollouts)
    if not chosen:
      return structs.LogprobRequest()
    thoughts = jax.tree.map(lambda x: x[chosen], rollouts.thoughts)
    if self.every_step:
      steps = np.arange(thoughts.reflective.shape[1])
      thoughts = thoughts.replace(
        reflective=steps[None] < thoughts.count[:, None]
      )
    prompts = [rollouts.prompt_index(r) for r in chosen]
    continuations, index = opera_requests.plan(
      thoughts,
      prompt_length_R=np.asarray(
        [len(rollouts.prompt_ids[b]) for b in prompts]
      ),
      completion_length_R=np.asarray(
        [len(rollouts.completions[r].tokens) for r in chosen]
      ),
      reference_ids=[
        rollouts.encode(rollouts.prompts[b].reference) for b in prompts
      ],
      bridge_ids=self.bridge_ids,
      all_steps=self.all_steps,
      compare=self.compare,
      prefixes=chosen,
    )
    return structs.LogprobRequest(continuations=continuations, aux=index)

  def rewards(
    self, rollouts: structs.Rollouts, result: structs.LogprobResult
  ) -> dict[str, np.ndarray]:
    """The terms of `opera_reward.rewards`, float32 [B, N] each; 0 for prompts
    that are not open-ended."""
    shape = (len(rollouts.prompts), rollouts.samples)
    chosen = _open_ended(rollouts)
    if not chosen:
      return {"total": np.zeros(shape, np.float32)}
    terms = opera_reward.rewards(
      result.continuation_logprob,
      result.aux,
      samples=rollouts.samples,
      alpha=self.alpha,
      tau=self.tau,
      mode=self.mode,
    )
    out = {}
    for name, term in terms.items():
      full_R = np.zeros(np.prod(shape), np.float32)
      full_R[chosen] = term.reshape(-1)
      out[name] = full_R.reshape(shape)
    return out


def _open_ended(rollouts: structs.Rollouts) -> list[int]:
  """Indices of the completions of open-ended prompts."""
  return [
    r
    for r in range(len(rollouts.completions))
    if rollouts.prompts[rollouts.prompt_index(r)].task == "open_ended"
  ]
